"""Extra peak memory of one inversion step, measured in a process of its own."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import timm
import torch

from benchmarks.inversion.peak_memory import PeakMemory
from fedmitr_flwr.ensemble.engine.teachers import MemoryLimits, load_teachers
from fedmitr_flwr.ensemble.ensemble import Ensemble
from fedmitr_flwr.runs.tensors import StoredState


def measure(model: dict[str, int], teachers: int, images: int, limits: dict[str, int], file: str | None) -> float:
    """MiB that loading and one dense step add; only the step where teachers are in memory already."""
    blank = timm.create_model("vit_tiny_patch16_224", **model).eval()
    E, P = blank.patch_embed.proj.weight[0].numel(), blank.patch_embed.num_patches
    patches, labels = torch.zeros(images, P, E), torch.zeros(images, dtype=torch.int64)
    weights = torch.full((teachers, blank.num_classes), 1 / teachers)
    # what the first product of a process takes is no teacher's
    Ensemble([blank], torch.ones(1, blank.num_classes)).loss_gradient(patches[:1], None, labels[:1])
    if file is None:
        made = [copy.deepcopy(blank) for _ in range(teachers)]
    peak = PeakMemory()
    if file is not None:
        states = [StoredState(Path(file), tuple(blank.state_dict()))] * teachers
        made = load_teachers(blank, states, MemoryLimits(**limits), torch.device("cpu"))
    Ensemble(made, weights, MemoryLimits(**limits)).loss_gradient(patches, None, labels)
    return peak.extra


def extra_peak_mb(
    model: dict[str, int], teachers: int, images: int, limits: dict[str, int], file: Path | None = None
) -> float:
    """`measure` in a new process."""
    asked = json.dumps([model, teachers, images, limits, None if file is None else str(file)])
    run = [sys.executable, "-m", "tests.unit.peak_memory", asked]
    return float(subprocess.run(run, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.stdout.write(f"{measure(*json.loads(sys.argv[1]))}\n")
