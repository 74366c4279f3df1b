"""Stage 1: sparse model inversion of the ensemble into synthetic images.

After SMI (arXiv 2510.27186): pixels start as noise and minimise ``CE(A(x), y) + a_tv TV(x) + a_2 |x|^2``
under Adam with clipping to the valid pixel range; at the stop iterations the patches with the least
[CLS] attention leave the token sequence for good. Departures, each because the authors' code does not
do what the paper says: a stopped patch is out of the graph and of the optimiser and keeps its pixels
bit for bit; the final kept set is the one that was inverted; total variation and loss are
sums over images, so that an image does not depend on the batch it is in; jitter shifts by
whole patches, so that each patch's gradient lands in that patch.

Letters: B images, C classes, P patches of the full grid, L patches kept, E = channels x patch pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from fedmitr_flwr.ensemble.loss_terms import Term
from fedmitr_flwr.stages.inversion.batch import NOBODY, InversionBatch, InversionTask, Watch, optimise, starting_images
from fedmitr_flwr.stages.inversion.schedule import most_attended
from fedmitr_flwr.stages.synthetic import SyntheticImages


def invert(
    task: InversionTask,
    labels: Tensor,
    *,
    generator: torch.Generator,
    watch: Watch = NOBODY,
    terms: Sequence[Term] = (),
) -> SyntheticImages:
    """Invert the ensemble into one image for each label.

    Parameters
    ----------
    task
        Teachers, geometry and settings.
    labels
        ``(B,)`` int64 target classes.
    generator
        CPU generator of the starting images, jitter and colours.
    watch
        Callbacks.
    terms
        Terms of the loss beside those that the settings ask for.

    Raises
    ------
    InversionDivergedError
        If pixels or loss are not finite; checked at stops, at the end and every `CHECK` iterations.
    """
    settings = task.settings
    start = starting_images(len(labels), task.grid, settings, generator).to(labels.device)
    batch = InversionBatch(task, labels, start, terms=terms)
    fractions = zip(settings.stops, settings.fractions, strict=True)
    stops = {stop: partial(most_attended, fraction=fraction) for stop, fraction in fractions}
    optimise(batch, stops, generator, watch)
    return batch.result()
