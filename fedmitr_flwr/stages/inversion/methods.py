"""Stages 1 to 3 for a batch of images, as the settings choose them: inversion, density split, relabeling.

Letters: B images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from fedmitr_flwr.ensemble.ensemble import Ensemble
from fedmitr_flwr.ensemble.loss_terms import Term
from fedmitr_flwr.models.patch_grid import PatchGrid
from fedmitr_flwr.settings import InversionSettings
from fedmitr_flwr.stages.inversion.batch import NOBODY, Watch
from fedmitr_flwr.stages.inversion.rebirth import invert_by_rebirth
from fedmitr_flwr.stages.inversion.sparse import invert
from fedmitr_flwr.stages.synthetic import SyntheticImages


class InversionMethod(Protocol):
    """A way of inverting: `sparse.invert`, or another of the same signature."""

    def __call__(
        self,
        ensemble: Ensemble,
        labels: Tensor,
        grid: PatchGrid,
        settings: InversionSettings,
        *,
        generator: torch.Generator,
        watch: Watch = NOBODY,
        terms: Sequence[Term] = (),
    ) -> SyntheticImages:
        """Invert the ensemble; see `sparse.invert`."""


INVERSION: dict[str, InversionMethod] = {"sparse": invert, "rebirth": invert_by_rebirth}
"""By `inversion.method`."""


def invert_batch(
    ensemble: Ensemble,
    labels: Tensor,
    grid: PatchGrid,
    settings: InversionSettings,
    *,
    number: int,
    seed: int,
    watch: Watch = NOBODY,
    terms: Sequence[Term] = (),
) -> SyntheticImages:
    """Stage 1 of one batch, which depends on no other one.

    Parameters
    ----------
    labels
        ``(B,)`` int64.
    number
        Of the batch in the run, from 0: with the run's seed it decides noise, teachers, jitter and colours.
    seed
        Of the run.
    watch, terms
        As for `sparse.invert`.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
    few = ensemble.draw(settings.teachers_per_batch, labels, generator)
    method = INVERSION[settings.method]
    return method(few, labels, grid, settings, generator=generator, watch=watch, terms=terms)
