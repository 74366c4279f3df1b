"""What the server asks a client for, and what the client answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from fedmitr_flwr.data import ImageSpec
from fedmitr_flwr.settings import Settings


@dataclass(frozen=True)
class ClientTask:
    """What the server asks for.

    Attributes
    ----------
    settings
        The server's settings. They replace the client's own run-config.
    spec
        Classes, image size and normalisation, as the server has them.
    round_number
        Counted from 1.
    initial
        State dict to start from, fp32.
    """

    settings: Settings
    spec: ImageSpec
    round_number: int
    initial: Mapping[str, Tensor]


@dataclass(frozen=True)
class ClientUpload:
    """What leaves a client.

    Attributes
    ----------
    state
        State dict of the trained model, fp32 on the CPU.
    num_examples
        Number of local training images.
    histogram
        Number of them in each of the C classes; None if the client does not share it.
    loss, accuracy
        Training loss (nats) and accuracy (0..1), mean over the last epoch.
    numbers
        By name, what `reported.REPORTED` computes from the rest; empty before that.
    """

    state: Mapping[str, Tensor]
    num_examples: int
    histogram: tuple[int, ...] | None
    loss: float
    accuracy: float
    numbers: Mapping[str, float] = field(default_factory=dict)
