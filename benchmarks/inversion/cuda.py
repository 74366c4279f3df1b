"""Measure inversion on a GPU: the plain reference, our engine without CUDA graphs, and our engine with them.

A sample is the wall-clock time between two synchronisations with the device, over as many iterations as take about
`SAMPLE` seconds. Variants alternate, and each value is the median time of an iteration. fp32 is without TF32.

Letters: B images, K teachers.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.inversion.bench import BASE, BOTH, ITERATIONS, STOPS, TINY, Bench, Case, schedule
from fedmitr_flwr.ensemble.engine.graphs import Graphs
from fedmitr_flwr.settings import Precision
from fedmitr_flwr.stages.inversion.cuda_graphs import WARM_UP

SAMPLE, MOST = 0.1, 100
"""Seconds of a sample, and its largest number of iterations."""
MOST_PLAIN = 50
"""Largest number of teachers with which the reference is measured at every stage.

With more it is measured only at the last stage, because it keeps the autograd graphs of all teachers.
"""
EVERY, LAST = range(len(STOPS) + 1), len(STOPS)
HEAD = """\
# Speed of sparse inversion on a GPU

`python -m benchmarks.inversion --device cuda`. {hardware}.

Wall-clock time in ms per iteration, medians of alternating repetitions. Weights are random.

- Stages have 197, 138, 97, 68 and 47 tokens (demo: 50, 35, 24, 17 and 12). B is the number of images.
- Schedule: 4000 iterations with stops at 50, 100, 200 and 300, projected from the stages.
- Reference: `benchmarks/inversion/reference.py` in the same precision; sparse with the same patches, dense without
  stops.
- Graph: iterations as a CUDA graph, which inversion uses between two stops that are far enough apart. Eager: the same
  iterations without a graph.
- Spread: (largest - smallest) / median of the graph at the last stage.

"""
COLUMNS = (
    "case",
    "precision",
    "graph",
    "eager",
    "reference",
    "eager / graph, last stage",
    "reference / graph, last stage",
    "schedule, sparse / graph",
    "schedule, dense / graph",
    "schedule, s",
    "images/s",
    "spread",
)


def hardware() -> dict[str, str]:
    """Return the description of the GPU."""
    return {
        "gpu": torch.cuda.get_device_name(),
        "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "cuda": str(torch.version.cuda),
        "torch": torch.__version__,
    }


def quick(repeats: int) -> dict[str, float | str]:
    """Return the ratios of `--quick`: reference in fp32 / ours with graphs, and without them as ``..._eager``."""
    tiny = middle(measure(TINY, EVERY, (0, LAST), repeats, plain_bf16=False))
    base = middle(measure(BASE, (LAST,), (LAST,), repeats, plain_bf16=False))
    found = {}
    for precision in BOTH:
        for kind, suffix in (("graph", ""), ("eager", "_eager")):
            for name, times in (("tiny", tiny), ("base", base)):
                key = f"{name}_{precision}{suffix}"
                found[key] = times[f"reference-fp32 {LAST}"] / times[f"{kind}-{precision} {LAST}"]
            ours = schedule([tiny[f"{kind}-{precision} {stage}"] for stage in EVERY])
            key = f"schedule_tiny_{precision}_vs_dense{suffix}"
            found[key] = ITERATIONS * tiny["reference-fp32 0"] / ours
    return {"gpu": torch.cuda.get_device_name()} | {key: round(value, 2) for key, value in found.items()}


def full(cases: Sequence[Case], repeats: int, folder: Path) -> dict[str, float]:
    """Measure the cases and write ``inversion-cuda.json`` and ``inversion-cuda.md``; other cases in them stay.

    Returns
    -------
    dict
        Ratios reference / graph of these cases in the same precision.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, machine = folder / "inversion-cuda.json", hardware()
    raw: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    if raw.get("hardware") != machine:
        raw = {"hardware": machine, "cases": {}}
    summary: dict[str, float] = {}
    for case in cases:
        compared = EVERY if case.teachers <= MOST_PLAIN else (LAST,)
        graphs = Graphs()
        seconds = measure(case, EVERY, compared, repeats, plain_bf16=True, graphs=graphs)
        found = raw["cases"][case.name] = {"images": case.images, "graphs": graphs.works, "seconds": seconds}
        for precision in BOTH:
            for key, value in ratios(middle(seconds), precision).items():
                summary[f"{case.name} {precision} {key}"] = round(value, 2)
        path.write_text(json.dumps(raw, indent=1) + "\n")
        (folder / "inversion-cuda.md").write_text(table(raw))
        print(*rows(case.name, found), sep="\n", flush=True)
    return summary


def measure(
    case: Case,
    stages: Sequence[int],
    compared: Sequence[int],
    repeats: int,
    *,
    plain_bf16: bool,
    graphs: Graphs | None = None,
) -> dict[str, list[float]]:
    """Return seconds of an iteration by ``VARIANT-PRECISION STAGE``; the reference at the stages `compared`."""
    bench = Bench(case, "cuda")
    graphs = graphs or Graphs()
    ensembles = {precision: bench.ensemble(graphs) for precision in BOTH}
    found: dict[str, list[float]] = {}
    for stage in stages:
        variants: dict[str, Callable[[], Tensor]] = {}
        for precision, ensemble in ensembles.items():
            variants[f"eager-{precision} {stage}"] = bench.ours(stage, precision, ensemble)
            announced = WARM_UP + 2 + MOST * (repeats + 2)
            variants[f"graph-{precision} {stage}"] = bench.ours(stage, precision, ensemble, announced)
        if stage in compared:
            variants[f"reference-fp32 {stage}"] = bench.reference(stage)
            if plain_bf16:
                variants[f"reference-bf16 {stage}"] = bench.reference(stage, torch.bfloat16)
        found |= interleaved(variants, repeats)
        del variants
        torch.cuda.empty_cache()
    return found


def interleaved(variants: dict[str, Callable[[], Tensor]], repeats: int) -> dict[str, list[float]]:
    """Return seconds per iteration of each variant; they alternate, after enough iterations to record a graph."""
    counts = {}
    for name, run in variants.items():
        timed(run, WARM_UP + 2)
        counts[name] = min(MOST, max(1, math.ceil(SAMPLE / timed(run, 1))))
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, run in variants.items():
            seconds[name].append(timed(run, counts[name]))
    return seconds


def timed(run: Callable[[], Tensor], count: int) -> float:
    """Return the mean seconds of `count` calls, including the work on the device."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        run()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / count


def middle(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Return the median of each list."""
    return {key: statistics.median(values) for key, values in seconds.items()}


def ratios(times: dict[str, float], precision: Precision) -> dict[str, float]:
    """Return the ratios of eager and reference to graph, at the last stage and over the schedule, where measured."""
    graph = times[f"graph-{precision} {LAST}"]
    ours = schedule([times[f"graph-{precision} {stage}"] for stage in EVERY])
    plain = {stage: times[key] for stage in EVERY if (key := f"reference-{precision} {stage}") in times}
    found = {"eager, last stage": times[f"eager-{precision} {LAST}"] / graph}
    if LAST in plain:
        found["last stage"] = plain[LAST] / graph
    if 0 in plain:
        found["schedule, sparse"] = schedule(list(plain.values())) / ours
        found["schedule, dense"] = ITERATIONS * plain[0] / ours
    return found


def rows(name: str, case: dict[str, Any]) -> list[str]:
    """Return the lines of the table for a case, one per precision."""
    times, lines = middle(case["seconds"]), []
    for precision in BOTH:
        kinds = ("graph", "eager", "reference")
        stages = {kind: [times.get(f"{kind}-{precision} {stage}") for stage in EVERY] for kind in kinds}
        ratio = ratios(times, precision)
        last = case["seconds"][f"graph-{precision} {LAST}"]
        total = schedule([times[f"graph-{precision} {stage}"] for stage in EVERY])
        cells = [
            f"{name}, B={case['images']}" + ("" if case["graphs"] else " (no graphs)"),
            precision,
            *(" / ".join("-" if value is None else f"{1000 * value:.2f}" for value in stages[kind]) for kind in kinds),
            *(
                f"{ratio[key]:.2f}" if key in ratio else "-"
                for key in ("eager, last stage", "last stage", "schedule, sparse", "schedule, dense")
            ),
            f"{total:.1f}",
            f"{case['images'] / total:.3f}",
            f"{100 * (max(last) - min(last)) / statistics.median(last):.0f} %",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def table(raw: dict[str, Any]) -> str:
    """Return the Markdown page."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for name, case in raw["cases"].items():
        lines += rows(name, case)
    return (
        HEAD.format(hardware=", ".join(f"{key}: {value}" for key, value in raw["hardware"].items()))
        + "\n".join(lines)
        + "\n"
    )
