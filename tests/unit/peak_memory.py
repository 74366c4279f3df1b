"""Extra peak memory of one inversion step, measured in a process of its own."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from benchmarks.inversion.peak_memory import PeakMemory
from fedmitr_flwr.ensemble.engine.teachers import MemoryLimits, load_teachers
from fedmitr_flwr.ensemble.ensemble import Ensemble
from fedmitr_flwr.runs.tensors import StoredState


class Apart(StoredState):
    """Weights in a file of which one number differs from that of all others, so that no block is shared."""

    def __init__(self, path: Path, names: Sequence[str], number: int) -> None:
        super().__init__(path, names)
        self._number = number

    def __getitem__(self, name: str) -> Tensor:
        value = super().__getitem__(name)
        return value + self._number if name == "cls_token" else value

    def read(self, needed: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
        state = super().read(needed)
        return {**state, "cls_token": state["cls_token"] + self._number}


def apart(model: VisionTransformer, number: int) -> VisionTransformer:
    """A model that shares no block with those of other numbers."""
    with torch.no_grad():
        model.cls_token.add_(number)
    return model


def measure(model: dict[str, int], teachers: int, images: int, limits: dict[str, int], file: str | None) -> float:
    """MiB that loading and one dense step add; only the step where teachers are in memory already."""
    blank = timm.create_model("vit_tiny_patch16_224", **model).eval()
    E, P = blank.patch_embed.proj.weight[0].numel(), blank.patch_embed.num_patches
    patches, labels = torch.zeros(images, P, E), torch.zeros(images, dtype=torch.int64)
    weights = torch.full((teachers, blank.num_classes), 1 / teachers)
    # what the first product of a process takes is no teacher's
    Ensemble([blank], torch.ones(1, blank.num_classes)).loss_gradient(patches[:1], None, labels[:1])
    if file is None:
        made = [apart(copy.deepcopy(blank), number) for number in range(teachers)]
    peak = PeakMemory()
    if file is not None:
        states = [Apart(Path(file), tuple(blank.state_dict()), number) for number in range(teachers)]
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
