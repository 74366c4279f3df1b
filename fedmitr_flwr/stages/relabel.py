"""Stage 3: label the low-density patches of each synthetic image by the ensemble.

Letters: B images, C classes, P patches of the full grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fedmitr_flwr.ensemble.ensemble import Ensemble
from fedmitr_flwr.settings import RelabelSettings
from fedmitr_flwr.stages.density import PatchSplit, subsets
from fedmitr_flwr.stages.synthetic import SyntheticImages


@dataclass(frozen=True)
class LowTargets:
    """Labels of the low-density patches.

    Attributes
    ----------
    probabilities
        ``(B, C)``; a row sums to one where `present` is True and is zero elsewhere.
    present
        ``(B,)`` bool: whether the image has low-density patches and relabeling is on.
    """

    probabilities: Tensor
    present: Tensor

    def __getitem__(self, rows: Tensor) -> LowTargets:
        return LowTargets(self.probabilities[rows], self.present[rows])

    @staticmethod
    def join(parts: Sequence[LowTargets]) -> LowTargets:
        """Concatenate the targets of all images of `parts`."""
        return LowTargets(
            torch.cat([part.probabilities for part in parts]), torch.cat([part.present for part in parts])
        )


@dataclass(frozen=True)
class RelabelledImages:
    """Result of stages 1 to 3: synthetic images, their density split, and the labels of their low-density patches.

    Attributes
    ----------
    synthetic
        B images with their pseudo-labels y, which also label their high-density patches.
    split
        Density split of the same images.
    low_targets
        q_low of the same images.
    """

    synthetic: SyntheticImages
    split: PatchSplit
    low_targets: LowTargets


@torch.no_grad()
def relabel(
    ensemble: Ensemble, patches: Tensor, split: PatchSplit, settings: RelabelSettings, batch_size: int = 256
) -> LowTargets:
    """Compute ``q_low = A(x_low)`` from [CLS] and the low-density patches alone.

    Parameters
    ----------
    patches
        ``(B, P, E)`` flattened normalised patches.
    split
        Density split of the same images.
    settings
        ``soft`` returns the distribution at `relabel.temperature` (1: unchanged), ``hard`` its arg max as one-hot
        vector; ``off`` computes nothing and sets `present` to False.
    batch_size
        Largest number of images in a forward pass.
    """
    B, C = len(patches), ensemble.weights.shape[1]
    probabilities = patches.new_zeros(B, C)
    present = torch.zeros(B, dtype=torch.bool, device=patches.device)
    if settings.labels == "off":
        return LowTargets(probabilities, present)
    for rows, index in subsets(split.low):
        for part, places in zip(rows.split(batch_size), index.split(batch_size), strict=True):
            low = patches[part].gather(1, places[..., None].expand(-1, -1, patches.shape[-1]))
            probabilities[part] = ensemble(low, places).probabilities
            present[part] = True
    if settings.labels == "hard":
        probabilities = F.one_hot(probabilities.argmax(1), C).to(probabilities) * present[:, None]
    elif settings.temperature != 1.0:
        probabilities[present] = soften(probabilities[present], settings.temperature)
    return LowTargets(probabilities, present)


def soften(probabilities: Tensor, temperature: float) -> Tensor:
    """Return ``p^(1/T)`` normalised, ``(B, C)``: the softmax with temperature T of the logits ``log p``."""
    return (probabilities.clamp_min(1e-12).log() / temperature).softmax(-1)
