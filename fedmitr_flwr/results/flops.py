"""Floating-point operations of a run's stages, counted on one image and multiplied out.

Letters: K teachers, P patches of the full grid, L patches kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from fedmitr_flwr.models.flops import count_flops
from fedmitr_flwr.models.patch_grid import PatchGrid
from fedmitr_flwr.settings import InversionSettings, Settings
from fedmitr_flwr.stages.inversion.methods import INVERSION, images_per_run, runs
from fedmitr_flwr.stages.inversion.schedule import growth


def kept_schedule(
    settings: InversionSettings, patches: int, grown: Mapping[int, Tensor] | None = None
) -> list[tuple[int, int]]:
    """``(iterations, L)`` of each span between two stops; the iteration of a stop still sees the patches before it.

    Parameters
    ----------
    patches
        P.
    grown
        Of `centring.growth`, the patches that are there from an iteration on; None: all from the start.
    """
    steps = sorted((grown or {}).items())
    spans = [(after - before, len(there)) for (before, there), (after, _) in pairwise(steps)]
    start, kept = steps[-1][0] if steps else 0, patches
    after = INVERSION[settings.method].kept_after_stops(patches, settings)
    for stop, following in zip(settings.stops, after, strict=True):
        spans.append((stop + 1 - start, kept))
        start, kept = stop + 1, following
    spans.append((settings.iterations - start, kept))
    return [(length, number) for length, number in spans if length > 0]


def stage_flops(settings: Settings, model: VisionTransformer, grid: PatchGrid, teachers: int) -> dict[str, float]:
    """Estimate the FLOPs of the server's stages from the settings.

    Inversion counts forward and pixel gradients of all K teachers; ``invert_dense`` is what it would take without
    stopping any patch. Distillation counts K labels for each image of the pool once, and three forwards for each image
    of each step, and the inversion of hard images; the low-density term is left out.
    """
    P, inversion, distill = grid.num_patches, settings.inversion, settings.distill
    spans, each = kept_schedule(inversion, P, growth(grid, inversion.centring)), images_per_run(inversion)
    cost = {L: count_flops(model, grid, L, pixel_gradient=True) for L in {L for _, L in spans} | {P}}
    forward = count_flops(model, grid, P)
    images = runs(inversion) * each
    run = inversion.copies * sum(length * cost[L] for length, L in spans)
    hard = distill.adversarial_rounds * -(-distill.adversarial_images // each)
    pool = images * (distill.views + distill.mix + distill.noise) + hard * each * distill.views
    return {
        "invert": float(runs(inversion) * teachers * run),
        "invert_dense": float(runs(inversion) * teachers * inversion.copies * inversion.iterations * cost[P]),
        "relabel": float(2 * images * teachers * forward),
        "distill": float(
            forward * (pool * teachers + 3 * distill.steps * distill.batch_size) + hard * (teachers + 1) * run
        ),
    }
