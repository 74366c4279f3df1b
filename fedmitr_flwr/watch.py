"""Who looks on while a batch is inverted.

Letters: B images, L patches kept, S side in pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Watch:
    """Callbacks of an inversion; none is called where it is None.

    Attributes
    ----------
    on_iteration
        Called with the iteration, from 0, and the ``(B,)`` detached cross-entropies, still on the device.
    on_stop
        Called at each stop with the iteration, the ``(B, ch, S, S)`` images as they are then, and the ``(B, L)``
        patches that go on.
    """

    on_iteration: Callable[[int, Tensor], None] | None = None
    on_stop: Callable[[int, Tensor, Tensor], None] | None = None


NOBODY = Watch()
