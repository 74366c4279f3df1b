"""Define and time the variants: a plain reference and our engine, on the same images and kept patches.

Letters: B images, K teachers, L patches kept.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from benchmarks.inversion.peak_memory import PeakMemory
from benchmarks.inversion.reference import PlainInversion
from fedmitr_flwr.ensemble.engine.graphs import Graphs
from fedmitr_flwr.ensemble.engine.precision import compute_dtype
from fedmitr_flwr.ensemble.ensemble import Ensemble
from fedmitr_flwr.models.patch_grid import PatchGrid
from fedmitr_flwr.models.vit import grid_size, patch_size
from fedmitr_flwr.settings import InversionSettings, Precision
from fedmitr_flwr.stages.inversion.batch import InversionBatch, InversionTask
from fedmitr_flwr.stages.inversion.schedule import most_attended

ITERATIONS, STOPS, FRACTION = 4000, (50, 100, 200, 300), 0.3
QUICK_REPEATS, RESULTS = 5, Path("benchmarks/results")
BOTH: tuple[Precision, ...] = ("fp32", "bf16")


@dataclass(frozen=True)
class Case:
    """A model with B images and K teachers."""

    name: str
    model: str
    options: dict[str, Any]
    images: int
    teachers: int = 1

    def build(self, count: int) -> list[VisionTransformer]:
        torch.manual_seed(0)
        models = [timm.create_model(self.model, **self.options).eval() for _ in range(count)]
        return cast(list[VisionTransformer], models)


TINY = Case("tiny", "deit_tiny_patch16_224", {}, 16)
BASE = Case("base", "deit_base_patch16_224", {}, 4)
DEMO_MODEL = {"img_size": 28, "patch_size": 4, "in_chans": 1, "embed_dim": 64, "depth": 4, "num_heads": 4}
DEMO = [Case(f"demo K={K}", "vit_tiny_patch16_224", {**DEMO_MODEL, "num_classes": 10}, 40, K) for K in (1, 10, 50, 200)]
FULL = [TINY, BASE, Case("tiny K=10", TINY.model, {}, 16, 10), *DEMO]


class Bench:
    """All variants of one case, on the same images and kept patches."""

    def __init__(self, case: Case, device: str = "cpu") -> None:
        self.case, self.device = case, torch.device(device)
        self.teachers = [teacher.to(self.device) for teacher in case.build(case.teachers)]
        model = self.teachers[0]
        channels = model.patch_embed.proj.in_channels
        side = patch_size(model)[0] * grid_size(model)[0]
        bound = torch.full((channels,), 2.0)
        self.grid = PatchGrid(channels, side, patch_size(model), -bound, bound)
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(case.images, channels, side, side, generator=generator).clamp(-2, 2)
        self.labels = torch.arange(case.images) % model.num_classes
        self.weights = torch.full((case.teachers, model.num_classes), 1 / case.teachers)
        order = torch.rand(case.images, self.grid.num_patches, generator=generator)
        self.kept = [torch.arange(self.grid.num_patches).repeat(case.images, 1)]
        for _ in STOPS:
            self.kept.append(self.kept[-1].gather(1, most_attended(order.gather(1, self.kept[-1]), FRACTION)))
        self.images, self.labels, self.weights = (
            values.to(self.device) for values in (self.images, self.labels, self.weights)
        )
        self.kept = [kept.to(self.device) for kept in self.kept]

    @property
    def tokens(self) -> list[int]:
        """Number of tokens at each stage."""
        return [kept.shape[1] + self.teachers[0].num_prefix_tokens for kept in self.kept]

    def reference(self, stage: int, dtype: torch.dtype = torch.float32) -> Callable[[], Tensor]:
        """Return a function that runs one iteration of the plain reference; stage 0 is dense."""
        settings = InversionSettings(tv_weight=0.05, learning_rate=0.25)
        kept = self.kept[stage] if stage else None
        plain = PlainInversion(self.teachers, self.weights, self.images, self.labels, kept, self.grid, settings, dtype)
        return plain.step

    def ours(self, stage: int, precision: Precision, ensemble: Ensemble, announced: int = 0) -> Callable[[], Tensor]:
        """Return a function that runs one iteration of our engine.

        `announced` is the number of iterations that the engine is told to expect; it decides about CUDA graphs.
        """
        settings = InversionSettings(tv_weight=0.05, learning_rate=0.25, precision=precision)
        batch = InversionBatch(InversionTask(ensemble, self.grid, settings), self.labels, self.images, self.kept[stage])
        batch.expect(announced)
        return batch.step

    def ensemble(self, graphs: Graphs | None = None) -> Ensemble:
        """Return an ensemble of newly built teachers, with CUDA graphs whose state is `graphs`."""
        teachers = [teacher.to(self.device) for teacher in self.case.build(self.case.teachers)]
        return Ensemble(teachers, self.weights, graphs=graphs)


def interleaved(variants: dict[str, Callable[[], Tensor]], repeats: int) -> dict[str, list[float]]:
    """Return the seconds of each variant; the variants alternate, and a first round is not counted."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for repeat in range(repeats + 1):
        for name, run in variants.items():
            start = clock()
            run()
            if repeat:
                seconds[name].append(clock() - start)
    return seconds


def schedule(stages: Sequence[float]) -> float:
    """Return the seconds of the whole schedule, given the seconds of an iteration at each stage."""
    ends = (*STOPS, ITERATIONS)
    lengths = [end - start for start, end in zip((0, *STOPS), ends, strict=True)]
    return sum(length * seconds for length, seconds in zip(lengths, stages, strict=True))


def measure(
    case: Case,
    stages: Sequence[int],
    reference: Sequence[int],
    precisions: Sequence[Precision],
    repeats: int,
    *,
    reference_bf16: bool = False,
) -> dict[str, list[float]]:
    """Return the seconds of an iteration by ``VARIANT STAGE``; the reference only at the stages `reference`."""
    bench = Bench(case)
    ensembles = {precision: bench.ensemble() for precision in precisions}
    found: dict[str, list[float]] = {}
    for stage in stages:
        variants = {f"{p} {stage}": bench.ours(stage, p, ensemble) for p, ensemble in ensembles.items()}
        if stage in reference:
            variants[f"reference {stage}"] = bench.reference(stage)
            if reference_bf16:
                variants[f"reference-bf16 {stage}"] = bench.reference(stage, torch.bfloat16)
        found |= interleaved(variants, repeats)
    return found


def ratios(tiny: dict[str, list[float]], base: dict[str, list[float]]) -> dict[str, float]:
    """Return the ratios reference / ours of the last line of `--quick`."""
    last = len(STOPS)
    found = {}
    for precision in BOTH:
        for name, seconds in (("tiny", tiny), ("base", base)):
            middle = {key: statistics.median(values) for key, values in seconds.items()}
            found[f"{name}_{precision}"] = middle[f"reference {last}"] / middle[f"{precision} {last}"]
    middle = {key: statistics.median(values) for key, values in tiny.items()}
    for precision in BOTH:
        ours = schedule([middle[f"{precision} {stage}"] for stage in range(last + 1)])
        found[f"schedule_tiny_{precision}_vs_dense"] = ITERATIONS * middle["reference 0"] / ours
    return {key: round(value, 2) for key, value in found.items()}


def extra_peak_mb(case: Case, variant: str, stage: int) -> dict[str, float]:
    """Return the extra peak memory of one step, packed weights included, and the size of the teachers, in MiB.

    Parameters
    ----------
    variant
        ``reference``, ``fp32`` or ``bf16``.
    """
    bench = Bench(case)
    weights = sum(p.numel() * p.element_size() for teacher in bench.teachers for p in teacher.parameters())
    if variant == "reference":
        step = bench.reference(stage)
    else:
        step = bench.ours(stage, cast(Precision, variant), Ensemble(bench.teachers, bench.weights))
    peak = PeakMemory()
    step()
    return {
        "teachers_mb": round(weights / 2**20, 1),
        "extra_peak_mb": round(peak.extra, 1),
        "peak_mb": round(peak.highest, 1),
    }


def memory_of(name: str, variant: str, stage: int) -> dict[str, float]:
    """Run `extra_peak_mb` in a separate process."""
    asked = ["--memory", name, "--variant", variant, "--stage", str(stage)]
    run = [sys.executable, "-m", "benchmarks.inversion", *asked]
    out = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    found: dict[str, float] = json.loads(out.splitlines()[-1])
    return found


def hardware() -> dict[str, str | int | bool]:
    """Return the description of this machine."""
    cpu = platform.processor() or platform.machine()
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), cpu)
    return {
        "cpu": cpu,
        "cores": os.cpu_count() or 0,
        "avx512": torch.cpu._is_avx512_supported(),
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
        "amx": torch.cpu._is_amx_tile_supported(),
        "auto_precision": str(compute_dtype("auto", 192, torch.device("cpu"))).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
