"""Measure the speed of sparse inversion: our engine against a plain reference with the same mathematics.

    python -m benchmarks.inversion --quick    # final stage of DeiT-Tiny and DeiT-Base, projected schedules; 2 minutes
    python -m benchmarks.inversion            # every stage, more models and teachers; writes benchmarks/results/
    python -m benchmarks.inversion --only demo --threads 0    # only cases with "demo" in their names, on all cores
    python -m benchmarks.inversion --memory "demo K=200"      # extra peak memory of one step in this process
    python -m benchmarks.inversion --device cuda [--quick]    # on a GPU, with and without CUDA graphs: cuda.py

Weights and images are random, because the time of an iteration does not depend on them. The variants alternate in one
process, on one thread unless `--threads` says otherwise. Times are CPU time on one thread and wall-clock time on more;
each value is a median. The last line of the output is JSON.

The values of `--quick` are ratios reference / ours; larger means that our engine is faster. They compare the final
stage (47 tokens) with the sparse reference in fp32. Values named `schedule_...` compare 4000 iterations with stops at
50, 100, 200 and 300, projected from the stages, with the reference without stops in fp32.
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
    quick: Annotated[bool, typer.Option("--quick", help="measure only the six ratios")] = False,
    threads: Annotated[int, typer.Option(help="threads of PyTorch; 0: one for each CPU core")] = 1,
    repeats: Annotated[int, typer.Option(help="repetitions; each value is their median")] = QUICK_REPEATS,
    only: Annotated[
        str, typer.Option(help="measure only cases with this text in their names; results of other cases stay")
    ] = "",
    memory: Annotated[str, typer.Option(help="name of a case; measure only its memory")] = "",
    variant: Annotated[str, typer.Option(help="variant for --memory: reference, fp32 or bf16")] = "fp32",
    stage: Annotated[int, typer.Option(help="stage for --memory: the number of stops before it, 0 to 4")] = 0,
    results: Annotated[
        Path, typer.Option(help="folder for inversion.md and inversion.json (not for --quick)")
    ] = RESULTS,
    device: Annotated[
        str, typer.Option(help="cpu or cuda; results for cuda are in inversion-cuda.md and .json")
    ] = "cpu",
) -> None:
    """Measure and print the results as JSON."""
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
