"""Write the full table of `benchmarks.inversion`: every case at every stage, our engine and the plain reference.

An interrupted run keeps the cases that it finished. A later run adds to them if hardware and threads are the same.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.inversion.bench import BOTH, ITERATIONS, STOPS, Bench, Case, hardware, measure, memory_of, schedule
from fedmitr_flwr.ensemble.engine.flops import pass_flops

EVERY, LAST = range(len(STOPS) + 1), len(STOPS)
HEAD = """\
# Speed of sparse inversion

`python -m benchmarks.inversion`. {hardware}.

Times are {clock}, medians of alternating repetitions. Weights are random.{no_bf16}

- Stages have 197, 138, 97, 68 and 47 tokens (demo: 50, 35, 24, 17 and 12). B is the number of images.
- Schedule: 4000 iterations with stops at 50, 100, 200 and 300, projected from the stages.
- Reference: `benchmarks/inversion/reference.py` in the same precision; sparse with the same patches, dense without
  stops.
- Spread: (largest - smallest) / median of our last stage.
- GFLOP: of an iteration at the first and the last stage, counted by `fedmitr_flwr.ensemble.engine.flops.pass_flops`.
- MiB: extra peak memory of one step at the first and the last stage. It includes packed weights but not the teachers,
  whose size is in the last column.

"""
COLUMNS = (
    "case",
    "precision",
    "ours, ms an iteration",
    "reference, ms",
    "reference / ours",
    "schedule, sparse / ours",
    "schedule, dense / ours",
    "schedule, s",
    "images/s",
    "spread",
    "GFLOP",
    "ours, MiB",
    "reference, MiB",
    "teachers, MiB",
)


def full(cases: Sequence[Case], repeats: int, folder: Path) -> dict[str, float]:
    """Measure the cases and write ``inversion.json`` and ``inversion.md``.

    With more than one thread the number of threads is part of the names.

    Returns
    -------
    dict
        Ratios reference / ours of these cases.
    """
    machine = hardware()
    name = "inversion" if machine["threads"] == 1 else f"inversion-{machine['threads']}-threads"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    raw: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    if raw.get("hardware") != machine or "cases" not in raw:
        raw = {"hardware": machine, "cases": {}}
    summary: dict[str, float] = {}
    for case in cases:
        found = raw["cases"][case.name] = measure_case(case, repeats, bf16=bool(machine["avx512_bf16"]))
        for precision in ("fp32", "bf16"):
            for key, value in ratios_of(found["seconds"], precision).items():
                summary[f"{case.name} {precision} {key}"] = round(value, 2)
        path.write_text(json.dumps(raw, indent=1) + "\n")
        (folder / f"{name}.md").write_text(table(raw))
        print(*rows(case.name, found), sep="\n", flush=True)
    return summary


def measure_case(case: Case, repeats: int, *, bf16: bool) -> dict[str, Any]:
    """Return the seconds, memory and FLOPs of a case.

    The plain reference keeps the autograd graphs of all teachers. It is therefore measured with up to ten teachers, and
    at the last stage with up to 50. bf16 is measured with a single teacher if the processor has instructions for it.
    """
    compared = EVERY if case.teachers <= 10 else (LAST,) if case.teachers <= 50 else ()
    precisions = BOTH if bf16 and case.teachers == 1 else BOTH[:1]
    seconds = measure(
        case,
        EVERY,
        compared,
        precisions,
        repeats if case.teachers == 1 else 1,
        reference_bf16="bf16" in precisions,
    )
    memory = {
        f"{variant} {stage}": memory_of(case.name, variant, stage)
        for variant in (*precisions, "reference")
        for stage in (0, LAST)
        if variant != "reference" or stage in compared
    }
    bench = Bench(dataclasses.replace(case, teachers=1))
    passes = [pass_flops(bench.teachers[0], bench.grid, kept.shape[1]) for kept in bench.kept]
    flops = [count * case.images * case.teachers for count in passes]
    return {"images": case.images, "tokens": bench.tokens, "flops": flops, "seconds": seconds, "memory": memory}


def ratios_of(seconds: dict[str, list[float]], precision: str) -> dict[str, float]:
    """Return the ratios reference / ours at the last stage and over the schedule, where both were measured."""
    middle = {key: statistics.median(values) for key, values in seconds.items()}
    if f"{precision} {LAST}" not in middle:
        return {}
    plain = "reference" if precision == "fp32" else "reference-bf16"
    ours, found = schedule([middle[f"{precision} {stage}"] for stage in EVERY]), {}
    if f"{plain} {LAST}" in middle:
        found["last stage"] = middle[f"{plain} {LAST}"] / middle[f"{precision} {LAST}"]
    if f"{plain} 0" in middle:
        found["schedule, sparse"] = schedule([middle[f"{plain} {stage}"] for stage in EVERY]) / ours
        found["schedule, dense"] = ITERATIONS * middle[f"{plain} 0"] / ours
    return found


def rows(name: str, case: dict[str, Any]) -> list[str]:
    """Return the lines of the table for a case, one per precision."""
    middle = {key: statistics.median(values) for key, values in case["seconds"].items()}
    lines = []
    for precision in ("fp32", "bf16"):
        if f"{precision} {LAST}" not in middle:
            continue
        plain, memory = ("reference" if precision == "fp32" else "reference-bf16"), case["memory"]
        ours, last = [middle[f"{precision} {stage}"] for stage in EVERY], case["seconds"][f"{precision} {LAST}"]
        ratio = ratios_of(case["seconds"], precision)
        reference = [middle.get(f"{plain} {stage}") for stage in EVERY]
        both = [None if value is None else value / own for value, own in zip(reference, ours, strict=True)]
        spread = (max(last) - min(last)) / statistics.median(last)
        cells = [
            f"{name}, B={case['images']}",
            precision,
            _joined([1000 * value for value in ours]),
            _joined([None if value is None else 1000 * value for value in reference]),
            _joined(both, 2),
            _joined([ratio.get("schedule, sparse")], 2),
            _joined([ratio.get("schedule, dense")], 2),
            f"{schedule(ours):.0f}",
            f"{case['images'] / schedule(ours):.4f}",
            f"{100 * spread:.0f} %" if len(last) > 1 else "one run",
            _joined([case["flops"][stage] / 1e9 for stage in (0, LAST)], 1),
            _joined([memory.get(f"{precision} {stage}", {}).get("extra_peak_mb") for stage in (0, LAST)]),
            _joined([memory.get(f"reference {stage}", {}).get("extra_peak_mb") for stage in (0, LAST)]),
            f"{memory['fp32 0']['teachers_mb']:.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def table(raw: dict[str, Any]) -> str:
    """Return the Markdown page."""
    machine = raw["hardware"]
    clock = "CPU time" if machine["threads"] == 1 else "wall-clock time"
    no_bf16 = (
        "" if machine["avx512_bf16"] else " bf16 is not measured, because the processor has no instructions for it."
    )
    named = ", ".join(f"{key.replace('_', ' ')}: {value}" for key, value in machine.items())
    head = HEAD.format(hardware=named, clock=clock, no_bf16=no_bf16)
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for name, case in raw["cases"].items():
        lines += rows(name, case)
    return head + "\n".join(lines) + "\n"


def _joined(values: Sequence[float | None], digits: int = 0) -> str:
    """Return the numbers separated by slashes; an empty text if there is none."""
    if all(value is None for value in values):
        return ""
    return " / ".join("-" if value is None else f"{value:.{digits}f}" for value in values)
