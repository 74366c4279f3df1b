"""Known failures of synthetic images, measured, and put into plain words.

Letters: B images, K teachers, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedmitr_flwr.ensemble import Ensemble
from fedmitr_flwr.grid import PatchGrid
from fedmitr_flwr.inversion import SyntheticImages
from fedmitr_flwr.vit import forward_patches

SAMPLE = 64
SAMPLED_TEACHERS = 50


@torch.no_grad()
def diagnose(
    synthetic: SyntheticImages, ensemble: Ensemble, grid: PatchGrid, probabilities: Tensor | None
) -> dict[str, float]:
    """Measure the synthetic images.

    Parameters
    ----------
    synthetic
        Images of stage 1.
    ensemble
        Its teachers are asked one by one on up to 64 of the images.
    grid
        Geometry and pixel range.
    probabilities
        ``(B, C)`` A(x) of the finished images; None if it is not known.

    Returns
    -------
    dict
        ``dark``: fraction of images of which 95 % of the pixels are at the lower bound; ``clipped``: mean fraction of
        pixels at a bound; ``diversity``: mean distance between images of a class over that between any two; ``target``:
        fraction of images that the ensemble takes for what they were inverted for; ``teachers``: fraction of single
        teachers, of those with a say in the class, that do.
    """
    images = synthetic.images.cpu()
    low, high = (bound.view(1, -1, 1, 1) for bound in (grid.low.cpu(), grid.high.cpu()))
    reach = 1e-3 * (high - low)
    at_low, at_high = (images <= low + reach), (images >= high - reach)
    found = {
        "dark": float((at_low.float().flatten(1).mean(1) > 0.95).float().mean()),
        "clipped": float((at_low | at_high).float().mean()),
        "diversity": _diversity(images, synthetic.labels.cpu()),
        "teachers": _single_teachers(synthetic, ensemble, grid),
    }
    if probabilities is not None:
        found["target"] = float((probabilities.argmax(1).cpu() == synthetic.labels.cpu()).float().mean())
    return found


def warnings_of(measured: dict[str, float]) -> list[str]:
    """Say what the measurements of `diagnose` mean where they are out of the ordinary."""
    warnings = []
    if measured["dark"] > 0.05:
        warnings.append(
            f"{measured['dark']:.0%} of the synthetic images are black: inversion found nothing to draw. Try other "
            "inversion.start noise, a lower inversion.tv-weight or more inversion.iterations."
        )
    if measured["clipped"] > 0.6:
        warnings.append(
            f"{measured['clipped']:.0%} of all pixels are pure black or white: the images are over-driven. A lower "
            "inversion.learning-rate keeps them softer."
        )
    if measured["diversity"] < 0.5:
        warnings.append(
            "Images of one class look much alike (their distance is "
            f"{measured['diversity']:.0%} of that between any two images): more images will teach little. Raise "
            "inversion.start-std or vary inversion.start."
        )
    if measured.get("target", 1.0) < 0.8:
        warnings.append(
            f"The ensemble takes only {measured['target']:.0%} of the finished images for the class that they were "
            "inverted for: more inversion.iterations, or a higher inversion.learning-rate."
        )
    if measured["teachers"] < 0.5:
        warnings.append(
            f"The client models disagree: asked one by one, {measured['teachers']:.0%} of those with a say in a class "
            "recognise its synthetic images. Their labels are a compromise."
        )
    return warnings


def _diversity(images: Tensor, labels: Tensor) -> float:
    """Mean distance within a class over the mean distance of all pairs, of up to 400 images; 1 without pairs."""
    rows = torch.linspace(0, len(images) - 1, min(len(images), 400)).long()
    flat, named = images[rows].flatten(1).float(), labels[rows]
    distance = torch.cdist(flat, flat)
    pairs = torch.ones_like(distance, dtype=torch.bool).triu(1)
    same = pairs & (named[:, None] == named[None])
    if not bool(same.any()) or float(distance[pairs].mean()) == 0.0:
        return 1.0 if not bool(same.any()) else 0.0
    return float(distance[same].mean() / distance[pairs].mean())


def _single_teachers(synthetic: SyntheticImages, ensemble: Ensemble, grid: PatchGrid) -> float:
    rows = torch.linspace(0, len(synthetic.labels) - 1, min(len(synthetic.labels), SAMPLE)).long()
    patches = grid.to_patches(synthetic.images[rows.to(synthetic.images.device)])
    labels = synthetic.labels[rows.to(synthetic.labels.device)]
    K = len(ensemble.teachers)
    right = asked = 0.0
    for number in torch.linspace(0, K - 1, min(K, SAMPLED_TEACHERS)).long().tolist():
        has_say = ensemble.weights[number, labels] >= 1 / K
        said = forward_patches(ensemble.teachers[number], patches, None).logits.argmax(1)
        right += float(((said == labels) & has_say).sum())
        asked += float(has_say.sum())
    return right / asked if asked else 1.0
