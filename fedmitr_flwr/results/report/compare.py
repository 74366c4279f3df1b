"""Compare several runs on one page."""

from __future__ import annotations

import os
from collections.abc import Sequence

from markupsafe import Markup

from fedmitr_flwr.results.finished_run import FinishedRun
from fedmitr_flwr.results.metrics import METRICS, MODELS
from fedmitr_flwr.results.report import charts, words
from fedmitr_flwr.results.report.cost import STAGES
from fedmitr_flwr.results.report.curves import distill_curve, inversion_curve
from fedmitr_flwr.results.report.images import picture
from fedmitr_flwr.results.report.page import COMPARISON
from fedmitr_flwr.results.report.render import accuracy_bars, render
from fedmitr_flwr.settings import Settings

MOST_RUNS = 4  # the page has four colours for series
_IGNORED = ("run.name", "run.output", "run.tensorboard")
# Settings that must be equal for a comparison: they determine the evaluation images and the clients' data.
_SAME_IMAGES = {
    "data.source": "different data",
    "data.split-seed": "different splits",
    "run.evaluate-on": "different image sets",
    "partition.seed": "different partitions",
}


def comparison_page(runs: Sequence[FinishedRun]) -> str:
    """Return the page that compares two to four runs."""
    names = _names(runs)
    found = [run.report.get("evaluation") for run in runs]
    bars = []
    for name, evaluation in zip(names, found, strict=True):
        if evaluation:
            (bar,) = [bar for bar in accuracy_bars(evaluation) if bar.strong]
            bars.append(charts.Bar(name, bar.shown, bar.value, bar.low, bar.high, strong=True))
    classes = runs[0].report.get("class_names", [])
    same = all(run.report.get("class_names", []) == classes for run in runs)
    return render(
        COMPARISON,
        " · ".join(names),
        columns=names,
        verdict=_verdict(names, runs),
        warnings=_warnings(runs),
        chart=charts.intervals(bars) if bars else "No accuracy was measured.",
        rows=_rows(runs),
        classes=_classes(names, runs, classes) if same and all(found) else None,
        curves=_curves(names, runs),
        settings=_differences(runs),
        strips=_strips(names, runs),
    )


def _names(runs: Sequence[FinishedRun]) -> list[str]:
    """Return the shortest ends of the paths that are different for all runs."""
    paths = [run.path for run in runs]
    for length in range(1, max(len(path.parts) for path in paths) + 1):
        names = [os.sep.join(path.parts[-length:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{number}: {path.name}" for number, path in enumerate(paths, 1)]


def _verdict(names: Sequence[str], runs: Sequence[FinishedRun]) -> str:
    scored = [
        (run.report["evaluation"]["accuracy"]["global"], name, run.report["evaluation"]["num_images"])
        for name, run in zip(names, runs, strict=True)
        if run.report.get("evaluation")
    ]
    if len(scored) < 2:
        return "Fewer than two of these runs have a measured accuracy."
    for key, reason in _SAME_IMAGES.items():
        if len({str(run.config.get("settings", {}).get(key)) for run in runs}) > 1:
            return f"These runs use {reason}, so their accuracies cannot be compared."
    scored.sort(reverse=True)
    (best, name, count), (second, other, _) = scored[:2]
    if words.too_close(best, second, count):
        pair = f"{name} ({words.percent(best)}) and {other} ({words.percent(second)})"
        return f"The accuracies of {pair} do not differ significantly on {count:,} images."
    lead = f"{100 * (best - second):.1f} points more than {other}"
    return f"{name} has the highest accuracy, {words.percent(best)}, which is {lead}."


def _warnings(runs: Sequence[FinishedRun]) -> list[str]:
    warnings = []
    for key, reason in _SAME_IMAGES.items():
        if len({str(run.config.get("settings", {}).get(key)) for run in runs}) > 1:
            warnings.append(f"The runs use {reason} ({key}), so their accuracies cannot be compared.")
    if len({run.config.get("digest") for run in runs}) > 1:
        warnings.append("The runs were made with different versions of the code.")
    return warnings


def _rows(runs: Sequence[FinishedRun]) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for key, name in MODELS.items():
        rates = [run.metrics.get("accuracy", {}).get(key) for run in runs]
        rows.append({"name": words.sentence_case(name), "values": [words.percent(rate) for rate in rates]})
    for metric in METRICS:
        values = [((run.metrics.get("metrics") or {}).get("global") or {}).get(metric.name) for run in runs]
        if any(value is not None for value in values):
            name = f"{words.sentence_case(metric.title)} of the global model"
            rows.append({"name": name, "values": [metric.text(value) for value in values]})
    counts = [run.metrics.get("clients", {}) for run in runs]
    rows.append(
        {"name": "Uploads used", "values": [f"{c.get('accepted', '–')} of {c.get('asked', '–')}" for c in counts]}
    )
    sizes = [run.metrics.get("upload_mb") for run in runs]
    if any(sizes):
        shown = ["–" if size is None else f"{size:.3g} MB" for size in sizes]
        rows.append({"name": "Upload of a client", "values": shown})
    for stage in ("clients", "invert", "distill"):
        seconds = [run.metrics.get("seconds", {}).get(stage, 0.0) for run in runs]
        rows.append({"name": f"Time: {STAGES[stage].lower()}", "values": [words.duration(value) for value in seconds]})
    for stage in ("invert", "distill"):
        flops = [run.report.get("flops", {}).get(stage) for run in runs]
        if any(flops):
            shown = ["–" if value is None else words.quantity(value, "FLOP") for value in flops]
            rows.append({"name": f"FLOPs: {STAGES[stage].lower()}", "values": shown})
    peaks = [run.metrics.get("peak_rss_mb") or 0.0 for run in runs]
    rows.append({"name": "Peak memory of the server process", "values": [f"{peak:,.0f} MiB" for peak in peaks]})
    return rows


def _classes(names: Sequence[str], runs: Sequence[FinishedRun], classes: Sequence[str]) -> Markup:
    tables = [run.report["evaluation"]["per_class"]["global"] for run in runs]
    return charts.class_dots(classes, list(zip(names, tables, strict=True)), values=False)


def _curves(names: Sequence[str], runs: Sequence[FinishedRun]) -> list[dict[str, object]]:
    curves: list[dict[str, object]] = []
    inversion = [charts.Series(name, inversion_curve(run.events)) for name, run in zip(names, runs, strict=True)]
    if any(line.points for line in inversion):
        curves.append({"title": "Inversion loss", "chart": charts.lines(inversion, x="iteration", y="loss")})
    distill = [
        charts.Series(name, distill_curve(r.events, "kl", smooth=5)) for name, r in zip(names, runs, strict=True)
    ]
    if any(line.points for line in distill):
        chart = charts.lines(distill, x="step", y="KL", log=True)
        curves.append({"title": "Distillation: KL divergence from the ensemble", "chart": chart})
    return curves


def _differences(runs: Sequence[FinishedRun]) -> list[dict[str, object]]:
    keys = list(dict.fromkeys([*Settings().flat(), *(key for run in runs for key in run.config.get("settings", {}))]))
    rows: list[dict[str, object]] = []
    for key in keys:
        values = [str(run.config.get("settings", {}).get(key, "–")) for run in runs]
        if key not in _IGNORED and len(set(values)) > 1:
            rows.append({"name": key, "values": values})
    return rows


def _strips(names: Sequence[str], runs: Sequence[FinishedRun]) -> list[dict[str, object]]:
    strips: list[dict[str, object]] = []
    for name, run in zip(names, runs, strict=True):
        if "images" in run.pictures:
            labels = run.pictures["labels"].tolist()
            firsts = [labels.index(label) for label in sorted(set(labels))[:20]]
            strips.append({"name": name, "uris": [picture(run.pictures["images"][number]) for number in firsts]})
    return strips
