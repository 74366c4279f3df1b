"""Speed of sparse inversion: our engine against a plain reference with the same mathematics.

    python -m benchmarks.inversion --quick    # final stage of DeiT-Tiny and DeiT-Base, projected schedules; 2 minutes
    python -m benchmarks.inversion            # every stage, more models and teachers; writes benchmarks/results/
    python -m benchmarks.inversion --only demo --threads 0    # the cases with this in their names, on all cores
    python -m benchmarks.inversion --memory "demo K=200"      # one step in this process: its extra peak memory
    python -m benchmarks.inversion --device cuda [--quick]    # on a GPU, with and without graphs: cuda.py

Weights and images are random: the time of an iteration doesn't depend on them. Variants take turns in one process, on
one thread unless `--threads` says otherwise; CPU time counts (wall-clock time with more threads), and each value is a
median. The last line is JSON. In the quick run its values are ratios reference / ours, larger is faster: at the final
stage (47 tokens) against the sparse reference in fp32, and, for `schedule_...`, over 4000 iterations with stops at
50, 100, 200 and 300, projected from the stages, against the reference without stops in fp32.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.inversion import cuda, table
from benchmarks.inversion.bench import (
    BASE,
    BOTH,
    FULL,
    QUICK_REPEATS,
    RESULTS,
    STOPS,
    TINY,
    extra_peak_mb,
    measure,
    ratios,
)


def main(
    quick: Annotated[bool, typer.Option("--quick", help="the six ratios alone")] = False,
    threads: Annotated[int, typer.Option(help="threads of PyTorch; 0: all")] = 1,
    repeats: Annotated[int, typer.Option(help="repetitions; a median of them is taken")] = QUICK_REPEATS,
    only: Annotated[str, typer.Option(help="cases with this in their names; others stay in the results")] = "",
    memory: Annotated[str, typer.Option(help="name of a case: measure its memory alone")] = "",
    variant: Annotated[str, typer.Option(help="with --memory: reference, fp32 or bf16")] = "fp32",
    stage: Annotated[int, typer.Option(help="with --memory: how many stops are behind it")] = 0,
    results: Annotated[
        Path, typer.Option(help="folder for inversion.md and inversion.json (not for --quick)")
    ] = RESULTS,
    device: Annotated[str, typer.Option(help="cpu, or cuda: results in inversion-cuda.md and .json")] = "cpu",
) -> None:
    """Measure and print."""
    torch.set_num_threads(threads or os.cpu_count() or 1)
    every, last = range(len(STOPS) + 1), len(STOPS)
    if device != "cpu":
        chosen = [case for case in FULL if only in case.name and case.name != "tiny K=10"]
        print(json.dumps(cuda.quick(repeats) if quick else cuda.full(chosen, repeats, results)))
    elif quick:
        tiny = measure(TINY, every[:-1], (0,), BOTH, max(1, repeats // 2)) | measure(
            TINY, (last,), (last,), BOTH, repeats
        )
        print(json.dumps(ratios(tiny, measure(BASE, (last,), (last,), BOTH, repeats))))
    elif memory:
        print(json.dumps(extra_peak_mb(next(case for case in FULL if case.name == memory), variant, stage)))
    else:
        print(json.dumps(table.full([case for case in FULL if only in case.name], repeats, results)))


if __name__ == "__main__":
    typer.run(main)
