"""The inversion methods that `inversion.method` can name, and stage 1 for one batch.

Letters: B images, P patches of the full grid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from fedmitr_flwr.ensemble.loss_terms import Term
from fedmitr_flwr.settings import InversionSettings
from fedmitr_flwr.settings.seeds import batch_seed
from fedmitr_flwr.stages.inversion import rebirth, schedule
from fedmitr_flwr.stages.inversion.batch import NOBODY, InversionTask, Watch
from fedmitr_flwr.stages.inversion.rebirth import invert_by_rebirth
from fedmitr_flwr.stages.inversion.sparse import invert
from fedmitr_flwr.stages.synthetic import SyntheticImages


class Invert(Protocol):
    """Signature of a function that inverts one batch, such as `sparse.invert`."""

    def __call__(
        self,
        task: InversionTask,
        labels: Tensor,
        *,
        generator: torch.Generator,
        watch: Watch = NOBODY,
        terms: Sequence[Term] = (),
    ) -> SyntheticImages:
        """Invert the ensemble; see `sparse.invert`."""


def _one(settings: InversionSettings) -> int:
    return 1


@dataclass(frozen=True)
class InversionMethod:
    """An inversion method, and the numbers that progress reports, diagnostics and the count of FLOPs need.

    Attributes
    ----------
    invert
        Inverts one batch.
    images_per_run
        Returns how many images one label yields, given the settings.
    kept_after_stops
        Returns how many of P patches remain in the graph after each stop, given P and the settings.
    """

    invert: Invert
    images_per_run: Callable[[InversionSettings], int] = _one
    kept_after_stops: Callable[[int, InversionSettings], list[int]] = schedule.kept_after_stops


INVERSION: dict[str, InversionMethod] = {
    "sparse": InversionMethod(invert),
    "rebirth": InversionMethod(invert_by_rebirth, rebirth.images_per_run, rebirth.kept_after_stops),
}
"""Methods by their name in `inversion.method`, in the order of `settings.choices.InversionName`."""


def images_per_run(settings: InversionSettings) -> int:
    """Return how many images one label yields."""
    return INVERSION[settings.method].images_per_run(settings)


def runs(settings: InversionSettings) -> int:
    """Return how many labels must be inverted to get at least `inversion.images` images."""
    return -(-settings.images // images_per_run(settings))


def patches_left(patches: int, settings: InversionSettings) -> int:
    """Return how many of P patches a finished image keeps."""
    return [patches, *INVERSION[settings.method].kept_after_stops(patches, settings)][-1]


def invert_batch(
    task: InversionTask,
    labels: Tensor,
    *,
    number: int,
    seed: int,
    watch: Watch = NOBODY,
    terms: Sequence[Term] = (),
) -> SyntheticImages:
    """Run stage 1 on one batch. The result does not depend on other batches.

    Parameters
    ----------
    task
        Teachers, geometry and settings.
    labels
        ``(B,)`` int64 target classes.
    number
        Number of the batch in the run, from 0. Together with the run's seed it determines the starting images, the
        teachers of the batch, jitter and colour shifts.
    seed
        Seed of the run.
    watch, terms
        As for `sparse.invert`.
    """
    generator = torch.Generator().manual_seed(batch_seed(seed, number))
    few = replace(task, ensemble=task.ensemble.draw(task.settings.teachers_per_batch, labels, generator))
    return INVERSION[task.settings.method].invert(few, labels, generator=generator, watch=watch, terms=terms)
