"""What is known to go wrong with inverted images, as numbers and as sentences.

Letters: B images, K teachers, C classes, P patches of the full grid, L patches kept.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from fedmitr_flwr.pipeline.stage_costs import stage_costs
from fedmitr_flwr.stages.inversion.batch import InversionTask
from fedmitr_flwr.stages.inversion.methods import patches_left
from fedmitr_flwr.stages.synthetic import SyntheticImages

LOOKED_AT = 256
"""Images looked at, at most: each costs K forward passes."""
EXCESS = 1.25
"""From here on a stage is said to cost too much; a stop of 0.3 that changes nothing costs 1.43 times what it should."""


@dataclass(frozen=True)
class Diagnostics:
    """Of a set of synthetic images.

    Attributes
    ----------
    black, saturated
        Fraction of the pixels at the lower and at the upper end of the valid range.
    ensemble_agrees
        Fraction of the images whose most probable class under A is y.
    teachers_agree
        The same for single teachers, mean weighted by their weights for y.
    diversity
        Mean distance between two images of a class over that between any two; 1: classes look alike or are as diverse
        as the whole, 0: all images of a class are the same. 1 if no class has two images.
    kept, expected
        Patches that were in the graph at the end, and that the schedule leaves.
    cost
        Iteration cost at the end over that of dense inversion, by the number of tokens: what the schedule saves.
    flops_excess, memory_excess
        Of an image and a teacher taken through the schedule again: what the worst stage computes, and what it asks
        memory for, over what its patches should cost (`stage_costs.py`). 1: the stopped patches are out of the graph.
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
        """The content of ``diagnostics`` in ``metrics.json``."""
        return {name: round(value, 4) for name, value in asdict(self).items()}

    def warnings(self) -> list[str]:
        """One sentence for each known failure."""
        found = []
        if self.black > 0.9:
            found.append(
                f"{_percent(self.black)} of the synthetic pixels are black: inversion found little to draw. Try "
                "another inversion.start, a lower inversion.tv-weight or l2-weight, or more inversion.iterations."
            )
        if self.saturated > 0.5:
            found.append(
                f"{_percent(self.saturated)} of the synthetic pixels are saturated: the images are over-driven. A "
                "lower inversion.learning-rate keeps them softer."
            )
        if self.ensemble_agrees < 0.8:
            found.append(
                f"The ensemble takes only {_percent(self.ensemble_agrees)} of the images for what they were inverted "
                "for: more inversion.iterations, or a higher inversion.learning-rate."
            )
        if self.teachers_agree < 0.5:
            found.append(
                f"The client models disagree: asked one by one, {_percent(self.teachers_agree)} of those with a say "
                "in a class recognise its images. Their labels are a compromise."
            )
        if self.diversity < 0.5:
            found.append(
                f"Images of one class are nearly the same (diversity {self.diversity:.2f}): more of them will teach "
                "little. Vary inversion.start."
            )
        if self.kept != self.expected:
            found.append(f"{self.kept} patches were in the graph at the end, the schedule leaves {self.expected}")
        for excess, what in ((self.flops_excess, "computes"), (self.memory_excess, "asks memory for")):
            if excess > EXCESS:
                found.append(
                    f"A stage of inversion {what} {excess:.2f} times what its patches should cost: stopped patches are "
                    "still in the graph, and stopping them saves less than it should."
                )
        return found


def _percent(rate: float) -> str:
    return f"{100 * rate:.0f} %"


@torch.no_grad()
def diagnose(task: InversionTask, synthetic: SyntheticImages) -> Diagnostics:
    """Look at up to `LOOKED_AT` of the images, evenly spread."""
    ensemble, grid = task.ensemble, task.grid
    B = len(synthetic.labels)
    rows = torch.linspace(0, B - 1, min(B, LOOKED_AT), device=synthetic.labels.device).round().long()
    images, y, P = synthetic.images[rows], synthetic.labels[rows], grid.num_patches
    low, high = (bound.to(images)[:, None, None] for bound in (grid.low, grid.high))
    logits = ensemble.see(grid.to_patches(images)).logits
    right = (logits.argmax(-1) == y).float()  # (K, b)
    weights = ensemble.weights[:, y]
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
    """Mean distance between two images of a class over that between any two."""
    distance = torch.cdist(images.flatten(1), images.flatten(1), compute_mode="donot_use_mm_for_euclid_dist")
    pairs = ~torch.eye(len(images), dtype=torch.bool, device=images.device)
    same = pairs & (labels[:, None] == labels)
    if not bool(same.any()):
        return 1.0
    overall = distance[pairs].mean()
    return float(distance[same].mean() / overall) if float(overall) > 0 else 0.0
