"""Count the FLOPs and memory of each stage of inversion, to find stopped patches that are still in the graph.

Letters: L patches kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fedmitr_flwr.ensemble.engine.flops import pass_flops
from fedmitr_flwr.ensemble.engine.passes import activation_bytes
from fedmitr_flwr.ensemble.engine.precision import compute_dtype
from fedmitr_flwr.ensemble.ensemble import Ensemble
from fedmitr_flwr.stages.inversion import schedule
from fedmitr_flwr.stages.inversion.batch import InversionBatch, InversionTask
from fedmitr_flwr.stages.inversion.schedule import most_attended


@dataclass(frozen=True)
class StageCost:
    """Cost of one iteration with one image and one teacher, in the stage between two stops.

    Attributes
    ----------
    expected, patches
        L by the schedule, and the number of patches in the graph.
    flops
        Floating-point operations that were counted.
    held
        Bytes of the buffers that the passes requested; 0 for a teacher that runs by autograd.
    flops_excess, held_excess
        Ratio of `flops` and `held` to those of the first stage, divided by the ratio expected for L patches; 1: as
        expected.
    """

    expected: int
    patches: int
    flops: int
    held: int
    flops_excess: float
    held_excess: float


def stage_costs(task: InversionTask, image: Tensor, label: Tensor) -> list[StageCost]:
    """Invert one image with the first teacher through all stops, with one iteration in each stage.

    Parameters
    ----------
    task
        Teachers, geometry and settings.
    image, label
        ``(1, ch, S, S)`` and ``(1,)`` int64.
    """
    ensemble, grid, settings = task.ensemble, task.grid, task.settings
    teacher = ensemble.teachers[0]
    classes = ensemble.weights.shape[1]
    alone = Ensemble([teacher], torch.ones(1, classes, device=label.device), ensemble.limits)
    batch = InversionBatch(InversionTask(alone, grid, settings), label, image)
    dtype = compute_dtype(settings.precision, teacher.embed_dim, label.device)
    seen = []
    for fraction in (*settings.fractions, 0.0):
        patches = batch.kept.shape[1]
        alone.release()  # buffers never shrink, so each stage starts without any
        with FlopCounterMode(display=False) as counter:
            batch.step(choose=partial(schedule.most_attended, fraction=fraction) if fraction else None)
        seen.append((patches, counter.get_total_flops(), alone.activation_bytes))
    alone.release()
    P = L = grid.num_patches
    dense_flops, dense_room = pass_flops(teacher, grid, P), activation_bytes(teacher, 1, 1, P, dtype)
    found = []
    for (patches, flops, held), fraction in zip(seen, (*settings.fractions, 0.0), strict=True):
        flops_excess = flops / seen[0][1] / (pass_flops(teacher, grid, L) / dense_flops)
        measurable = dense_room > 0 and seen[0][2] > 0
        room = activation_bytes(teacher, 1, 1, L, dtype) / dense_room if measurable else 1.0
        found.append(StageCost(L, patches, flops, held, flops_excess, held / seen[0][2] / room if measurable else 1.0))
        L = most_attended(torch.zeros(1, L), fraction).shape[1]
    return found
