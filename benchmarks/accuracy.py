"""Measure FedMITR and every baseline on the test images, from the same uploads and with the same settings.

    python -m benchmarks.accuracy                      # main table: skew x methods x seeds; resumes where it stopped
    python -m benchmarks.accuracy --quick              # one partition seed at Dirichlet(0.1)
    python -m benchmarks.accuracy --summary            # the stored main results as one line of JSON
    python -m benchmarks.accuracy --check 7            # compute one partition seed at Dirichlet(0.1) again, same keys

Clients are trained once per partition and cached. Each finished run is one line of
`benchmarks/results/accuracy-DATA.jsonl`; it is not repeated as long as the code that computes it is the same. Digits
use the default settings, emoji10 (`--data npz:PATH`) uses those of conf/emoji10.toml.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import statistics
import time
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, get_args

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.federation import Federation, train_federation
from benchmarks.fingerprint import results_code
from benchmarks.recipes import parse_value, split_changes
from fedmitr_flwr.models.build import build_model
from fedmitr_flwr.models.flops import count_flops
from fedmitr_flwr.models.patch_grid import PatchGrid
from fedmitr_flwr.pipeline.methods import METHODS, method_of
from fedmitr_flwr.pipeline.steps import make_ensemble
from fedmitr_flwr.results.evaluate import batches, evaluate
from fedmitr_flwr.results.flops import stage_flops
from fedmitr_flwr.settings import RunConfigValue, Settings, Weighting
from fedmitr_flwr.settings.choices import MOMENT_METHODS

ROOT = Path(__file__).resolve().parents[1]
SKEWS = ("0.05", "0.1", "0.3", "0.5", "iid")
# Methods of moments need uploads with moments, which the clients of these benchmarks do not share.
WITHOUT_GENERATORS = ",".join(name for name in METHODS if not METHODS[name].generates and name not in MOMENT_METHODS)
NO_INVERSION = ("fedavg", "head-aggregation", "task-arithmetic", "ace-merging", "wudi-merging", "random-images")
Row = dict[str, Any]
SINCE = {
    "run.update-limit": 4.0,
    "run.update-limit-action": "clip",
    "run.recipe": "auto",
    "train.trainable": "all",
    "train.lora-rank": 8,
    "train.lora-alpha": 16.0,
    "train.layer-decay": 1.0,
    "train.head-start": "initial",
    "train.share-moments": False,
    "moments.shrinkage": 0.1,
    "moments.prior": "counts",
    "moments.ridge": 0.1,
    "ensemble.combine": "probabilities",
    "ensemble.merged-weight": 0.0,
    "ensemble.moments-weight": 0.1,
    "distill.task-scale": 0.3,
    "distill.trainable": "auto",
    "distill.cache-memory-mb": 1024,
}
"""Settings that were added after lines were stored, with the values under which those lines stay the same."""


def main(
    data: Annotated[str, typer.Option(help="data source: mnist-5k, digits, or npz:PATH (emoji10)")] = "mnist-5k",
    skews: Annotated[str, typer.Option(help="Dirichlet concentrations, separated by commas, and iid")] = ",".join(
        SKEWS
    ),
    seeds: Annotated[
        str, typer.Option(help="partition seeds; 42 and 43 were used while settings were chosen")
    ] = "44,45,46",
    distill_seeds: Annotated[int, typer.Option(help="number of seeds of the server's stages per partition")] = 2,
    methods: Annotated[
        str, typer.Option(help="values of run.method; by default without the generators, which take hours on a CPU")
    ] = WITHOUT_GENERATORS,
    clients: Annotated[int, typer.Option(help="number of clients K")] = 10,
    change: Annotated[
        list[str] | None,
        typer.Option(help="key=value that changes a setting for all methods, for ablations; repeatable"),
    ] = None,
    quick: Annotated[
        bool, typer.Option(help="run one partition seed and one distillation seed at Dirichlet(0.1)")
    ] = False,
    summary: Annotated[bool, typer.Option(help="print the stored main results as JSON and run nothing")] = False,
    check: Annotated[
        int | None, typer.Option(help="run this partition seed again at Dirichlet(0.1) and store nothing")
    ] = None,
    cache: Annotated[Path, typer.Option(help="folder for trained uploads")] = Path("outputs/uploads-cache"),
    results: Annotated[
        Path | None,
        typer.Option(help="JSON lines file of the results; default: benchmarks/results/accuracy-DATA.jsonl"),
    ] = None,
) -> None:
    """Run all that is not stored yet and print the table."""
    path = results or ROOT / "benchmarks" / "results" / f"accuracy-{name_of(data)}.jsonl"
    if summary:
        print(json.dumps(summarise(main_rows(read(path)))))
        return
    plan: dict[str, Any] = {"skews": skews.split(","), "seeds": [int(seed) for seed in seeds.split(",")]}
    if quick or check is not None:
        plan = {"skews": ["0.1"], "seeds": [plan["seeds"][0] if check is None else check]}
        distill_seeds = 1
    changes = split_changes(change or ())
    known = [] if check is not None else read(path)
    rows = []
    for skew, seed in ((skew, seed) for skew in plan["skews"] for seed in plan["seeds"]):
        for row in run_partition(data, skew, seed, clients, methods.split(","), distill_seeds, changes, cache, known):
            rows.append(row)
            if check is None and row not in known:
                with path.open("a") as file:
                    file.write(json.dumps(row) + "\n")
            progress = f"{skew} seed {seed}.{row['distill_seed']} {row['method']}: {100 * row['global']:.1f}"
            Console(stderr=True).print(progress, highlight=False)
    if check is not None:
        print(json.dumps(summarise(rows)))
    else:
        show(rows)


def run_partition(
    data: str,
    skew: str,
    seed: int,
    clients: int,
    methods: Iterable[str],
    distill_seeds: int,
    changes: dict[str, str],
    cache: Path,
    known: list[Row],
) -> Iterator[Row]:
    """Yield a row for each method and distillation seed; train the clients only if a row is missing."""
    base = settings_for(data, skew, seed, changes)
    federation: Federation | None = None
    ensembles: dict[str, float] = {}
    for method in methods:
        trained = METHODS[method].distils
        for distill_seed in range(distill_seeds if trained else 1):
            settings = base.replace(**{"run.method": method})
            about = {
                "data": name_of(data),
                "skew": skew,
                "clients": clients,
                "seed": seed,
                "distill_seed": distill_seed,
                "method": method,
                "changes": changes,
                "recipe": recipe(base, changes),
                "code": results_code(name_of(data)),
            }
            found = [row for row in known if about.items() <= row.items()]
            if found:
                yield found[0]
                continue
            if federation is None:
                federation = train_federation(settings, clients, cache)
                ensembles = ensemble_accuracies(federation, base)
            yield {**about, **run_method(federation, settings, distill_seed), "ensembles": ensembles}


def run_method(federation: Federation, settings: Settings, distill_seed: int) -> Row:
    """Run one method and evaluate it on the test images.

    Returns
    -------
    dict
        Accuracies in 0..1, wall-clock and CPU seconds, number of synthetic images, 10^12 FLOPs, hardware.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wall, cpu = time.perf_counter(), time.process_time()
    result = METHODS[settings.run.method](
        federation.inputs(settings, seed=settings.run.seed + 1000 * distill_seed, device=device)
    )
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    found = evaluate(result, federation.source.test, federation.spec, settings.model, device)
    return {
        **{name: round(value, 4) for name, value in found.accuracy().items()},
        "seconds": round(wall, 1),
        "cpu_seconds": round(cpu, 1),
        "synthetic_images": 0 if result.synthetic is None else len(result.synthetic.labels),
        "teraflops": teraflops(federation, settings),
        "hardware": hardware(),
    }


def hardware() -> str:
    """Return the description of this machine that result lines contain."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {device}"


def teraflops(federation: Federation, settings: Settings) -> float:
    """Return the 10^12 FLOPs of the server's stages; of a generator, only the FLOPs of the teachers are counted."""
    method = method_of(settings)
    if not method.distils:
        return 0.0
    settings = method.resolve(settings)
    model, teachers = build_model(settings.model, federation.spec), len(federation.clients) + bool(settings.expert)
    grid = PatchGrid.of(model, federation.spec)
    cost = stage_flops(settings, model, grid, teachers)
    stages = ["distill", "invert", "relabel"] if method.inverts else ["distill"]
    if method.generates:
        made, pass_cost = settings.generator, count_flops(model, grid, grid.num_patches, pixel_gradient=True)
        cost["invert"] = made.rounds * made.iterations * made.batch_size * teachers * float(pass_cost)
        stages.remove("relabel")
    return round(sum(cost[stage] for stage in stages) / 1e12, 2)


def ensemble_accuracies(federation: Federation, settings: Settings) -> dict[str, float]:
    """Return the test accuracy of the ensemble, in 0..1, under each weighting and the power of the settings.

    This is the only function that reads label histograms.
    """
    grid = PatchGrid.of(build_model(settings.model, federation.spec), federation.spec)
    teachers, _ = make_ensemble(federation.inputs(settings))
    parts = list(batches(federation.source.test, federation.spec, 250, torch.device("cpu")))
    logits = torch.cat([teachers.see(grid.to_patches(x)).logits for x, _ in parts], dim=1)
    y = torch.cat([y for _, y in parts])
    out = {}
    for weighting in get_args(Weighting):
        changed = settings.replace(**{"ensemble.weighting": weighting, "train.share-label-histogram": True})
        ensemble, _ = make_ensemble(federation.inputs(changed))
        out[weighting] = round(float((ensemble.combine(logits).argmax(1) == y).float().mean()), 4)
    return out


def settings_for(data: str, skew: str, seed: int, changes: dict[str, str]) -> Settings:
    """Return the settings of a data source at a skew and a partition seed.

    An npz: source has the settings of conf/emoji10.toml, the others have the defaults.
    """
    config: dict[str, RunConfigValue] = {}
    if data.startswith("npz:"):
        nested = tomllib.loads((ROOT / "conf" / "emoji10.toml").read_text())
        config = {f"{stage}.{key}": value for stage, part in nested.items() for key, value in part.items()}
    config |= {"data.source": data, "partition.seed": seed}
    config |= {"partition.kind": "iid"} if skew == "iid" else {"partition.alpha": float(skew)}
    return Settings.from_run_config({**config, **{key: parse_value(text) for key, text in changes.items()}})


def recipe(settings: Settings, changes: dict[str, str]) -> str:
    """Return an eight-digit hash of the settings, except those that a row stores by itself."""
    named = ("partition.", "data.source", "run.method")
    flat = settings.flat().items()
    kept = {
        key: value
        for key, value in flat
        if key not in changes and not key.startswith(named) and SINCE.get(key) != value
    }
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:8]


def main_rows(rows: list[Row]) -> list[Row]:
    """Return the rows of the main table: ten clients, no changes, code and settings of the newest line."""
    main = [row for row in rows if row["clients"] == 10 and not row["changes"]]
    return [row for row in main if all(row[key] == main[-1][key] for key in ("code", "recipe"))]


def summarise(rows: list[Row]) -> dict[str, Row]:
    """Return means in percent for each skew: FedMITR, its spread over partition seeds, and the baselines."""
    out = {}
    for skew in SKEWS:
        here = [row for row in rows if row["skew"] == skew]
        means = {method: mean_of(here, method) for method in {row["method"] for row in here}}
        if "fedmitr" not in means:
            continue
        others = {method: mean for method, mean in means.items() if method != "fedmitr"}
        by_seed = seed_means([row for row in here if row["method"] == "fedmitr"])
        best = max(others, key=others.__getitem__, default="")
        cheap = [others[method] for method in NO_INVERSION if method in others]
        out[skew] = {
            "global": means["fedmitr"],
            "global_std": round(statistics.stdev(by_seed), 2) if len(by_seed) > 1 else None,
            "fedavg": means.get("fedavg"),
            "ensemble": round(statistics.mean(best_ensemble(here)[1]), 2),
            "best_baseline": others.get(best),
            "best_baseline_name": best or None,
            "best_baseline_no_inversion": max(cheap, default=None),
            "dense_same_extras": means.get("dense-inversion"),
            # The default weighting, competence, needs no histogram, so this is the main result.
            "no_histogram": means["fedmitr"],
            "seeds": len(by_seed),
        }
    return out


def mean_of(rows: list[Row], method: str) -> float:
    """Return the mean accuracy of a method in percent, over partition and distillation seeds."""
    return round(100 * statistics.mean(float(row["global"]) for row in rows if row["method"] == method), 2)


def seed_means(rows: Iterable[Row]) -> list[float]:
    """Return the mean accuracy of each partition seed in percent."""
    by_seed: dict[int, list[float]] = {}
    for row in rows:
        by_seed.setdefault(row["seed"], []).append(100 * row["global"])
    return [statistics.mean(values) for values in by_seed.values()]


def best_ensemble(rows: Iterable[Row]) -> tuple[str, list[float]]:
    """Return the weighting with the best mean over partition seeds, and its accuracy per seed in percent."""
    by_seed = list({row["seed"]: row["ensembles"] for row in rows}.values())
    means = {name: [100 * found[name] for found in by_seed] for name in by_seed[0]}
    return max(means.items(), key=lambda item: statistics.mean(item[1]))


def show(rows: list[Row]) -> None:
    """Print mean and standard deviation over partition seeds, one line per method."""
    skews = [skew for skew in SKEWS if any(row["skew"] == skew for row in rows)]
    table = Table("method", *skews, "CPU s")
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method]
        cells = []
        for skew in skews:
            here = [row for row in mine if row["skew"] == skew]
            seeds = seed_means(here)
            spread = f" ± {statistics.stdev(seeds):.1f}" if len(seeds) > 1 else ""
            cells.append(f"{statistics.mean(seeds):.1f}{spread}" if seeds else "")
        table.add_row(method, *cells, f"{statistics.mean(row['cpu_seconds'] for row in mine):.0f}")
    Console(width=120).print(table)


def name_of(data: str) -> str:
    """Return the short name of a source: ``npz:data/emoji10.npz`` is ``emoji10``."""
    return Path(data.partition(":")[2]).stem if ":" in data else data


def read(path: Path) -> list[Row]:
    """Read the stored lines; return an empty list if the file does not exist."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


if __name__ == "__main__":
    typer.run(main)
