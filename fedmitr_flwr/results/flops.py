"""Estimate the floating-point operations of a run's stages from those of one image.

Letters: K teachers, P patches of the full grid, L patches kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from fedmitr_flwr.models.flops import count_flops, count_parts
from fedmitr_flwr.models.patch_grid import PatchGrid
from fedmitr_flwr.pipeline.steps import images_in_memory
from fedmitr_flwr.settings import InversionSettings, Settings
from fedmitr_flwr.stages.distillation.frozen import frozen_part, keeps_tokens
from fedmitr_flwr.stages.inversion.methods import INVERSION, images_per_run, runs
from fedmitr_flwr.stages.inversion.schedule import growth


def kept_schedule(
    settings: InversionSettings, patches: int, grown: Mapping[int, Tensor] | None = None
) -> list[tuple[int, int]]:
    """Return ``(iterations, L)`` of each span of iterations with the same number of patches L.

    The iteration of a stop belongs to the span before it, because its forward pass includes the patches that it stops.

    Parameters
    ----------
    settings
        Settings of the inversion.
    patches
        P.
    grown
        Patches included from an iteration on, as `schedule.growth` returns them; None: all patches in all iterations.
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


def stage_flops(
    settings: Settings, model: VisionTransformer, grid: PatchGrid, teachers: int, shared_blocks: int = 0
) -> dict[str, float]:
    """Estimate the FLOPs of the server's stages from the settings.

    Parameters
    ----------
    settings
        Settings of the run.
    model, grid
        Architecture of teachers and student, and its patches.
    teachers
        K.
    shared_blocks
        Number of leading blocks that no client trained. All teachers together run them once.

    Returns
    -------
    dict
        ``invert``: forward passes and pixel gradients of all K teachers. ``invert_dense``: the same if no patch was
        stopped. ``relabel``: two forward passes of all K teachers for each synthetic image. ``distill``: labels of K
        teachers for each image of the pool, three forward passes of the trained part for each image of each step, and
        the inversion of hard images. Frozen blocks of the student count once for each image of the pool, unless the
        labels need them too; if their output is not kept, once for each image of each step. The low-density loss term
        is not counted.
    """
    P, inversion, distill = grid.num_patches, settings.inversion, settings.distill
    spans, each = kept_schedule(inversion, P, growth(grid, inversion.centring)), images_per_run(inversion)

    def cost(patches: int, pixel_gradient: bool) -> float:
        trunk, tail = count_parts(model, grid, patches, shared_blocks, pixel_gradient=pixel_gradient)
        return float((trunk if shared_blocks else teachers * trunk) + teachers * tail)

    iteration = {L: cost(L, True) for L in {L for _, L in spans} | {P}}
    single = {L: count_flops(model, grid, L, pixel_gradient=True) for L in iteration}
    run, student_run = (inversion.copies * sum(length * of[L] for length, L in spans) for of in (iteration, single))
    forward = cost(P, False)
    images = runs(inversion) * each
    hard = distill.adversarial_rounds * -(-distill.adversarial_images // each)
    pool = images * (distill.views + distill.mix + distill.noise) + hard * each * distill.views
    frozen = frozen_part(distill.trainable, len(model.blocks), shared_blocks).blocks or 0
    before, after = count_parts(model, grid, P, frozen)
    steps = float(distill.steps * distill.batch_size)
    if frozen == 0:
        student = 3 * steps * (before + after)
    elif keeps_tokens(model, frozen, distill, *images_in_memory(settings)):
        student = 3 * steps * after + (0 if frozen == shared_blocks else pool * before)
    else:
        student = steps * (before + 3 * after)
    return {
        "invert": float(runs(inversion) * run),
        "invert_dense": float(runs(inversion) * inversion.copies * inversion.iterations * iteration[P]),
        "relabel": 2 * images * forward,
        "distill": float(forward * pool + student + hard * (run + student_run)),
    }
