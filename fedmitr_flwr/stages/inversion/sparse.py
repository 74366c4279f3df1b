"""Stage 1: sparse model inversion of the ensemble into synthetic images.

This follows SMI (arXiv 2510.27186). Pixels start as noise. Adam minimises ``CE(A(x), y) + a_tv TV(x) + a_2 |x|^2`` and
the pixels are clipped to the valid range. At each stop the patches with the least [CLS] attention are removed from the
token sequence for the rest of the run. Departures from the authors' code, which does not do what the paper says:

- A stopped patch is removed from the graph and the optimiser, and its pixels stay bit for bit the same.
- The returned kept patches are those that were inverted to the end.
- Total variation and loss are sums over the images, so an image does not depend on the batch that it is in.
- Jitter shifts by whole patches, so the gradient of a patch belongs to that patch alone.

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
        Further terms of the loss, beside those that the settings turn on.

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
