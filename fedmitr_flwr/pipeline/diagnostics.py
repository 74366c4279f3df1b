"""Measure known failures of inverted images, and describe them as warnings.

Letters: B images, K teachers, C classes, P patches of the full grid, L patches kept.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from fedmitr_flwr.stages.inversion.batch import InversionTask
from fedmitr_flwr.stages.inversion.methods import patches_left
from fedmitr_flwr.stages.stage_costs import stage_costs
from fedmitr_flwr.stages.synthetic import SyntheticImages

LOOKED_AT = 256
"""Largest number of images that are checked; each costs K forward passes."""
EXCESS = 1.25
"""A stage that costs more than this many times the expected cost gives a warning.

A stop of 0.3 that removes no patch from the graph costs 1.43 times as much.
"""


@dataclass(frozen=True)
class Diagnostics:
    """Measurements on a set of synthetic images.

    Attributes
    ----------
    black, saturated
        Fraction of the pixels at the lower and at the upper end of the valid range.
    ensemble_agrees
        Fraction of the images whose most probable class under A(x) is their label y.
    teachers_agree
        The same fraction for the single teachers, averaged by their weights for y.
    diversity
        Mean distance between two images of the same class, divided by that between any two images. 1: images of a class
        differ as much as images of different classes; 0: all images of a class are equal. 1 if no class has two images.
    kept, expected
        Number of patches in the graph at the end, and the number that the schedule leaves.
    cost
        Number of tokens at the end divided by that of dense inversion: the relative cost of an iteration.
    flops_excess, memory_excess
        FLOPs and memory of the worst stage, divided by the values expected from its number of patches
        (`stage_costs.py`), measured on one image and one teacher. 1: no stopped patch is in the graph.
    """

    black: float
    saturated: float
    ensemble_agrees: float
    teachers_agree: float
    diversity: float
    kept: int
    expected: int
    cost: float
    flops_excess: float
    memory_excess: float

    def as_dict(self) -> dict[str, float | int]:
        """Return the content of ``diagnostics`` in ``metrics.json``."""
        return {name: round(value, 4) for name, value in asdict(self).items()}

    def warnings(self) -> list[str]:
        """Return one warning for each failure that is found."""
        found = []
        if self.black > 0.9:
            found.append(
                f"{_percent(self.black)} of the synthetic pixels are black: the images have little content. Try "
                "another inversion.start, a lower inversion.tv-weight or inversion.l2-weight, or more "
                "inversion.iterations."
            )
        if self.saturated > 0.5:
            found.append(
                f"{_percent(self.saturated)} of the synthetic pixels are saturated, at the upper end of the valid "
                "range. Try a lower inversion.learning-rate."
            )
        if self.ensemble_agrees < 0.8:
            found.append(
                f"The ensemble assigns only {_percent(self.ensemble_agrees)} of the images to the class that they were "
                "inverted for. Try more inversion.iterations, or a higher inversion.learning-rate."
            )
        if self.teachers_agree < 0.5:
            found.append(
                f"The client models disagree: on average, weighted by class, a single client model assigns only "
                f"{_percent(self.teachers_agree)} of the images to the class that they were inverted for."
            )
        if self.diversity < 0.5:
            found.append(
                f"Images of one class are nearly the same (diversity {self.diversity:.2f}), so more images add little. "
                "Try another inversion.start."
            )
        if self.kept != self.expected:
            found.append(f"{self.kept} patches were in the graph at the end; the schedule leaves {self.expected}.")
        for excess, what in ((self.flops_excess, "FLOPs"), (self.memory_excess, "memory")):
            if excess > EXCESS:
                found.append(
                    f"A stage of inversion needs {excess:.2f} times the {what} expected for its number of patches: "
                    "stopped patches are still in the graph."
                )
        return found


def _percent(rate: float) -> str:
    return f"{100 * rate:.0f} %"


@torch.no_grad()
def diagnose(task: InversionTask, synthetic: SyntheticImages) -> Diagnostics:
    """Measure up to `LOOKED_AT` of the images, evenly spread over the set."""
    ensemble, grid = task.ensemble, task.grid
    B = len(synthetic.labels)
    rows = torch.linspace(0, B - 1, min(B, LOOKED_AT), device=synthetic.labels.device).round().long()
    images, y, P = synthetic.images[rows], synthetic.labels[rows], grid.num_patches
    low, high = (bound.to(images)[:, None, None] for bound in (grid.low, grid.high))
    logits = ensemble.see(grid.to_patches(images)).logits
    weights = ensemble.weights[:, y]
    right = (logits[: len(weights)].argmax(-1) == y).float()  # (K, b)
    kept = synthetic.kept.shape[1]
    costs = stage_costs(task, images[:1], y[:1])
    return Diagnostics(
        black=float((images <= low).float().mean()),
        saturated=float((images >= high).float().mean()),
        ensemble_agrees=float((ensemble.combine(logits).argmax(-1) == y).float().mean()),
        teachers_agree=float((right * weights).sum() / weights.sum()),
        diversity=diversity(images, y),
        kept=kept,
        expected=patches_left(P, task.settings),
        cost=(kept + 1) / (P + 1),
        flops_excess=max(stage.flops_excess for stage in costs),
        memory_excess=max(stage.held_excess for stage in costs),
    )


def diversity(images: Tensor, labels: Tensor) -> float:
    """Return the mean distance between two images of a class, divided by that between any two images."""
    distance = torch.cdist(images.flatten(1), images.flatten(1), compute_mode="donot_use_mm_for_euclid_dist")
    pairs = ~torch.eye(len(images), dtype=torch.bool, device=images.device)
    same = pairs & (labels[:, None] == labels)
    if not bool(same.any()):
        return 1.0
    overall = distance[pairs].mean()
    return float(distance[same].mean() / overall) if float(overall) > 0 else 0.0
