"""Measure every method with a pretrained ViT on photographs, on the same uploads and with the same recipe.

    python -m benchmarks.pretrained --checkpoint FILE --set cifar10=folder:PATH --set food12=npz:PATH
    python -m benchmarks.pretrained --summary

Paths are the user's: CIFAR-10 as ``train/CLASS/*`` and ``test/CLASS/*``, food12 and emojihome as NumPy archives. The
clients of a partition are trained once, with feature moments, and cached. Methods that use weights alone do not get the
moments. Each finished run is one line of `benchmarks/results/pretrained.jsonl`. It is not repeated as long as code and
settings are the same, so an interrupted benchmark continues. Settings were chosen on validation images of the
partition seeds 1 to 3; the table has the test images of others.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.accuracy import ROOT, hardware, read, recipe
from benchmarks.federation import Federation, train_federation
from benchmarks.fingerprint import fingerprint
from benchmarks.recipes import parse_value, split_changes
from fedmitr_flwr.federation.plan import upload_bytes
from fedmitr_flwr.pipeline.methods import METHODS
from fedmitr_flwr.results.evaluate import evaluate
from fedmitr_flwr.settings import RunConfigValue, Settings

Row = dict[str, Any]
RESULTS = ROOT / "benchmarks" / "results" / "pretrained.jsonl"
MODEL: Mapping[str, RunConfigValue] = {
    "model.name": "vit_small_patch14_dinov2",
    "model.options": "",
    "data.mean": "0.485,0.456,0.406",
    "data.std": "0.229,0.224,0.225",
}
SIZES = {"cifar10": 56, "emojihome": 56, "food12": 84}
IMAGES = {"cifar10": 10_000}
"""Largest number of training images of a set; sets that are not named are used whole."""

WEIGHTS_ALONE: Mapping[str, Mapping[str, RunConfigValue]] = {
    "fedavg": {"run.method": "fedavg", "ensemble.merged-weight": 0.0},
    "head-aggregation": {"run.method": "head-aggregation"},
    "task-arithmetic": {"run.method": "task-arithmetic"},
    "ace-merging": {"run.method": "ace-merging"},
    "random-images": {"run.method": "random-images"},
    "dense-inversion": {
        "run.method": "fedmitr",
        "inversion.stops": "",
        "inversion.fractions": "",
        "density.rule": "quantile",
    },
    "fedmitr": {"run.method": "fedmitr"},
}
WITH_MOMENTS: Mapping[str, Mapping[str, RunConfigValue]] = {
    "lda": {"run.method": "lda"},
    "ridge": {"run.method": "ridge"},
    "fedmitr-moments": {"run.method": "fedmitr", "distill.start": "moments"},
}
MERGES = ("fedavg", "head-aggregation", "task-arithmetic", "ace-merging")
CENTRALISED = "centralised"
METHOD_NAMES = (*WEIGHTS_ALONE, *WITH_MOMENTS, CENTRALISED)


def main(
    sets: Annotated[
        list[str] | None, typer.Option("--set", help="a set and its source as NAME=SOURCE; repeatable")
    ] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="checkpoint of timm's vit_small_patch14_dinov2")] = None,
    skews: Annotated[str, typer.Option(help="Dirichlet concentrations, and natural (one client a domain)")] = "0.1",
    seeds: Annotated[str, typer.Option(help="partition seeds; 1 to 3 were used to choose settings")] = "44,45,46",
    clients: Annotated[int, typer.Option(help="number of clients K")] = 5,
    methods: Annotated[str, typer.Option(help="methods, separated by commas")] = ",".join(METHOD_NAMES),
    change: Annotated[list[str] | None, typer.Option(help="key=value for all methods; repeatable")] = None,
    on: Annotated[str, typer.Option(help="split on which accuracies are measured: test or validation")] = "test",
    summary: Annotated[bool, typer.Option(help="print the stored results as one line of JSON and run nothing")] = False,
    cache: Annotated[Path, typer.Option(help="folder for trained uploads")] = Path("outputs/uploads-cache"),
    results: Annotated[Path, typer.Option(help="JSON lines file of the results")] = RESULTS,
) -> None:
    """Run all that is not stored yet and print the table."""
    if summary:
        print(json.dumps(summarise(newest(read(results)))))
        return
    if checkpoint is None or not sets:
        raise typer.BadParameter("--checkpoint and at least one --set are required without --summary")
    changes = split_changes(change or ())
    rows, known = [], read(results)
    for text in sets:
        name, _, source = text.partition("=")
        for skew in skews.split(","):
            for seed in (int(seed) for seed in seeds.split(",")):
                base = settings_for(name, source, checkpoint, skew, seed, changes)
                for row in run_partition(
                    base, name, skew, seed, clients, methods.split(","), changes, on, cache, known
                ):
                    rows.append(row)
                    if row not in known:
                        with results.open("a") as file:
                            file.write(json.dumps(row) + "\n")
                    Console(stderr=True).print(
                        f"{name} {skew} seed {seed} {row['method']}: {100 * row['global']:.1f}", highlight=False
                    )
    show(rows)


def settings_for(
    name: str, source: str, checkpoint: Path, skew: str, seed: int, changes: Mapping[str, str]
) -> Settings:
    """Return the settings of a set: what its conf/ file names, and the recipe for pretrained models for the rest."""
    split: dict[str, RunConfigValue] = {"partition.alpha": float(skew)} if skew != "natural" else {}
    return Settings.from_run_config(
        {
            **MODEL,
            "model.init": f"file:{checkpoint}",
            "data.source": source,
            "data.image-size": SIZES.get(name, 56),
            "partition.kind": "natural" if skew == "natural" else "dirichlet",
            "partition.seed": seed,
            "train.share-moments": True,
            **split,
            **{key: parse_value(text) for key, text in changes.items()},
        }
    )


def run_partition(
    base: Settings,
    name: str,
    skew: str,
    seed: int,
    clients: int,
    methods: list[str],
    changes: Mapping[str, str],
    on: str,
    cache: Path,
    known: list[Row],
) -> Iterator[Row]:
    """Yield a row for each method; train the clients only if a row is missing."""
    federation: Federation | None = None
    for method in methods:
        about = {
            "data": name,
            "skew": skew,
            "clients": clients,
            "seed": seed,
            "method": method,
            "changes": dict(changes),
            "on": on,
            "recipe": recipe(base.replace(**{"model.init": "file:checkpoint"}), dict(changes)),
            "code": fingerprint(),
        }
        found = [row for row in known if about.items() <= row.items()]
        if found:
            yield found[0]
            continue
        if method == CENTRALISED:
            yield {**about, **centralised(base, name, on, cache)}
            continue
        if federation is None:
            federation = train_federation(base, clients, cache, IMAGES.get(name, 0))
        yield {**about, **run_method(federation, base, method, on)}


def run_method(federation: Federation, base: Settings, method: str, on: str) -> Row:
    """Run one method; return accuracies in 0..1, wall-clock seconds of the server, MB (10^6 bytes) of an upload."""
    if method in WITH_MOMENTS:
        settings = base.replace(**WITH_MOMENTS[method])
    else:
        settings = base.replace(**{"train.share-moments": False, **WEIGHTS_ALONE[method]})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    start = time.perf_counter()
    result = METHODS[settings.run.method](federation.inputs(settings, device=device))
    seconds = time.perf_counter() - start
    found = evaluate(result, getattr(federation.source, on), federation.spec, settings.model, device)
    return {
        **{name: round(value, 4) for name, value in found.accuracy().items()},
        "seconds": round(seconds, 1),
        "upload_mb": round(upload_bytes(settings, federation.spec) / 1e6, 1),
        "hardware": hardware(),
    }


def centralised(base: Settings, name: str, on: str, cache: Path) -> Row:
    """Train one client on all images, without balanced softmax: the bound that no federation is expected to pass."""
    changes: dict[str, RunConfigValue] = {
        "partition.kind": "iid",
        "partition.seed": 0,
        "train.share-moments": False,
        "train.balanced-softmax": False,
        "ensemble.merged-weight": 0.0,
        "run.method": "fedavg",
    }
    settings = base.replace(**changes)
    federation = train_federation(settings, 1, cache, IMAGES.get(name, 0))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result = METHODS["fedavg"](federation.inputs(settings, device=device))
    found = evaluate(result, getattr(federation.source, on), federation.spec, settings.model, device)
    return {"global": round(found.global_model, 4), "seconds": 0.0, "upload_mb": 0.0, "hardware": hardware()}


def newest(rows: list[Row]) -> list[Row]:
    """Return the rows of test images without changes that have the newest row's code and settings, for each set."""
    rows = [row for row in rows if row["on"] == "test" and not row["changes"]]
    last = {(row["data"], row["skew"]): row["code"] for row in rows}
    return [row for row in rows if row["code"] == last[row["data"], row["skew"]]]


def summarise(rows: list[Row]) -> dict[str, Row]:
    """Return means in percent: each set at Dirichlet(0.1), and emojihome with one designer a client as ``natural``."""
    out = {}
    for name in dict.fromkeys(row["data"] for row in rows):
        here = [row for row in rows if row["data"] == name and row["skew"] == "0.1"]
        if here:
            merges = {method: mean for method in MERGES if (mean := _mean(here, method, "global")) is not None}
            out[name] = {
                "fedavg": merges.get("fedavg"),
                "best_merge": max(merges.values(), default=None),
                "ensemble": _mean(here, "fedavg", "ensemble"),
                "random_images": _mean(here, "random-images", "global"),
                "dense_inversion": _mean(here, "dense-inversion", "global"),
                "global": _mean(here, "fedmitr", "global"),
                "global_moments": _mean(here, "fedmitr-moments", "global"),
                "lda": _mean(here, "lda", "global"),
                "centralised": _mean(here, CENTRALISED, "global"),
                "seeds": len({row["seed"] for row in here if row["method"] == "fedmitr"}),
            }
    natural = [row for row in rows if row["skew"] == "natural"]
    if natural:
        out["natural"] = {
            "fedavg": _mean(natural, "fedavg", "global"),
            "lda": _mean(natural, "lda", "global"),
            "global": _mean(natural, "fedmitr", "global"),
        }
    return out


def _mean(rows: list[Row], method: str, column: str) -> float | None:
    values = [100 * row[column] for row in rows if row["method"] == method]
    return round(statistics.mean(values), 2) if values else None


def show(rows: list[Row]) -> None:
    """Print mean and standard deviation of the global model over partition seeds, one line per method."""
    cells = list(dict.fromkeys((row["data"], row["skew"]) for row in rows))
    table = Table("method", *(f"{name} {skew}" for name, skew in cells))
    for method in dict.fromkeys(row["method"] for row in rows):
        texts = []
        for name, skew in cells:
            here = [row for row in rows if (row["data"], row["skew"], row["method"]) == (name, skew, method)]
            values = [100 * row["global"] for row in here]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            texts.append(f"{statistics.mean(values):.1f}{spread}" if values else "")
        table.add_row(method, *texts)
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
