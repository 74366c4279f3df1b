"""Write the stored results of `benchmarks.accuracy` as tables to benchmarks/results/accuracy.md.

    python -m benchmarks.accuracy_tables

There are tables for each data set: methods x Dirichlet concentrations, numbers of clients, a natural partition, and
changed settings. A run with changed settings is compared with the runs that have some of its changes; among these, the
one with most changes counts. Differences are taken between runs on the same partition.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence

from benchmarks.accuracy import ROOT, SKEWS, Row, best_ensemble, main_rows, read, seed_means

RESULTS = ROOT / "benchmarks" / "results"
DATA = {"mnist-5k": "MNIST-5k", "digits": "Digits (8 x 8)", "emoji10": "emoji10"}
HEAD = """\
# Accuracy of FedMITR and of the baselines

    python -m benchmarks.accuracy
    python -m benchmarks.accuracy --data digits
    python -m benchmarks.accuracy --data npz:PATH/emoji10.npz
    python -m benchmarks.accuracy --clients 20 --skews 0.1,0.3 --methods fedmitr,fedavg
    python -m benchmarks.accuracy --skews 0.1 --methods fedmitr --distill-seeds 1 --change KEY=VALUE --change KEY=VALUE
    python -m benchmarks.accuracy_tables    # writes this page

The tables give the accuracy of the global model in percent on test images: mean ± standard deviation over the
partition seeds 44, 45 and 46. A number in brackets is the number of partitions where it is not three.

- Test images: 1,000 of MNIST-5k, 359 of digits, 550 of emoji10.
- All methods have the same uploads. All methods that distil have the same ensemble weights, start, random images,
  steps and augmentation.
- Settings are the defaults, for emoji10 those of conf/emoji10.toml. They were chosen on validation images of other
  partitions.
- `fedmitr`, `random-images` and `dense-inversion` have two seeds of the server's stages at 0.1 and 0.3; all other runs
  have one.
- A difference is taken between runs with the same seeds. The spread over partitions is large, so compare within a
  column. Differences below a point are noise.
- TFLOP: 10^12 operations of the server's stages.
- Raw lines, each with its hardware, are in `accuracy-mnist-5k.jsonl`, `accuracy-digits.jsonl` and
  `accuracy-emoji10.jsonl`.

[accuracy-notes.md](accuracy-notes.md) says what the tables show, what was tried and how settings were chosen."""
METHODS = (
    "fedmitr",
    "random-images",
    "dense-inversion",
    "dense-inversion-kl",
    "hard-labels",
    "dense",
    "co-boosting",
    "head-aggregation",
    "task-arithmetic",
    "ace-merging",
    "wudi-merging",
    "fedavg",
)
NATURAL = {"partition.kind": "natural"}
Changes = frozenset[tuple[str, str]]


def main() -> None:
    """Write the tables and print the path of the page."""
    path = RESULTS / "accuracy.md"
    path.write_text(render(), "utf-8")
    print(path)


def render() -> str:
    """Return the page as Markdown, from all stored lines."""
    stored = {name: read(RESULTS / f"accuracy-{name}.jsonl") for name in DATA}
    parts = [f"## {title}\n\n{tables(stored[name])}" for name, title in DATA.items() if stored[name]]
    return "\n\n".join([HEAD, *parts]) + "\n"


def tables(rows: Sequence[Row]) -> str:
    """Return all tables that have rows, each below its title; only runs of the newest code count."""
    rows = [row for row in rows if row["code"] == main_rows(list(rows))[-1]["code"]]
    plain = [row for row in rows if not row["changes"]]
    natural = [row for row in rows if row["changes"] == NATURAL]
    ten = {skew: [row for row in plain if row["clients"] == 10 and row["skew"] == skew] for skew in SKEWS}
    parts = ["### Ten clients", by_method({skew: column for skew, column in ten.items() if column})]
    if any(row["clients"] != 10 for row in plain):
        parts += ["### Other numbers of clients K", by_clients([row for row in plain if row["skew"] in ("0.1", "0.3")])]
    if natural:
        clients = natural[0]["clients"]
        parts += [
            f"### A natural partition: {clients} clients, each with a part of its own",
            by_method({"accuracy": natural}),
        ]
    for base, table in changed([row for row in rows if row["clients"] == 10 and row["skew"] == "0.1"]):
        parts += [f"### Changes at Dirichlet(0.1): to {named(base) or 'the main settings'}", table]
    return "\n\n".join(parts)


def by_method(columns: Mapping[str, Sequence[Row]]) -> str:
    """Return a table of methods x columns, with the ensemble at its best weighting in each column."""
    lines = [["method", *columns, "TFLOP"]]
    for method in METHODS:
        mine = [[row for row in column if row["method"] == method] for column in columns.values()]
        if any(mine):
            cost = statistics.mean(row["teraflops"] for column in mine for row in column)
            lines.append([f"`{method}`", *map(spread, mine), f"{cost:.1f}"])
    return markdown([*lines, ["ensemble, its best weights", *map(ensemble, columns.values()), ""]])


def by_clients(rows: Sequence[Row]) -> str:
    """Numbers of clients x methods, for each Dirichlet concentration."""
    methods = [method for method in METHODS if any(row["method"] == method for row in rows if row["clients"] != 10)]
    lines = [["Dirichlet", "K", *(f"`{method}`" for method in methods), "ensemble, its best weights"]]
    for skew, clients in sorted({(row["skew"], row["clients"]) for row in rows}):
        here = [row for row in rows if (row["skew"], row["clients"]) == (skew, clients)]
        cells = [spread([row for row in here if row["method"] == method]) for method in methods]
        lines.append([skew, str(clients), *cells, ensemble(here)])
    return markdown(lines)


def changed(rows: Sequence[Row]) -> Iterator[tuple[Changes, str]]:
    """Yield each set of changes that others are compared with, and the table of this comparison."""
    groups: dict[Changes, list[Row]] = {}
    for row in rows:
        own = {**row["changes"], **({} if row["method"] == "fedmitr" else {"run.method": row["method"]})}
        groups.setdefault(frozenset(own.items()), []).append(row)
    nested: dict[Changes, list[Changes]] = {}
    for changes in groups:
        # Other methods with no further change are in the main table.
        if dict(changes).keys() - {"run.method"}:
            smaller = [base for base in groups if base < changes and "run.method" not in dict(base)]
            nested.setdefault(max(smaller, key=len), []).append(changes)
    for base, others in sorted(nested.items(), key=lambda item: len(item[0])):
        lines = [["change", "accuracy", "difference"], ["none", spread(groups[base]), ""]]
        for changes in sorted(others, key=named):
            differences = paired(groups[changes], groups[base])
            cells = spread(groups[changes]), plus_minus(differences, "+") if differences else ""
            lines.append([named(changes - base), *cells])
        yield base, markdown(lines)


def paired(rows: Sequence[Row], base: Sequence[Row]) -> list[float]:
    """Return the difference in points for each partition seed, over the distillation seeds that both have."""

    def by_run(some: Sequence[Row]) -> dict[tuple[int, int], float]:
        return {(row["seed"], row["distill_seed"]): 100 * row["global"] for row in some}

    ours, theirs = by_run(rows), by_run(base)
    both = sorted(ours.keys() & theirs.keys())
    return [
        statistics.mean(ours[run] - theirs[run] for run in both if run[0] == seed) for seed in {run[0] for run in both}
    ]


def spread(rows: Sequence[Row]) -> str:
    """Return mean and spread over partition seeds as text; the number of seeds if it is not three."""
    return plus_minus(seed_means(rows)) if rows else ""


def ensemble(rows: Sequence[Row]) -> str:
    """Return mean and spread of the ensemble as text, at the weighting with the best mean."""
    best, accuracies = best_ensemble(rows)
    return f"{plus_minus(accuracies)} ({best})"


def plus_minus(values: Sequence[float], sign: str = "") -> str:
    """Return ``85.6 ± 2.0``, followed by the number of values if it is not three."""
    mean = f"{statistics.mean(values):{sign}.1f}"
    number = "" if len(values) == 3 else f" ({len(values)})"
    return f"{mean} ± {statistics.stdev(values):.1f}{number}" if len(values) > 1 else mean + number


def named(changes: Changes) -> str:
    """Return the changes in code quotes."""
    return ", ".join(f"`{key}={value}`" for key, value in sorted(changes))


def markdown(lines: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; the first line is its head."""
    head, *body = (f"| {' | '.join(cells)} |" for cells in lines)
    return "\n".join([head, "|" + "---|" * (head.count("|") - 1), *body])


if __name__ == "__main__":
    main()
