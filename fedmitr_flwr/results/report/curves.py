"""Curves in the report, from a run's events."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from fedmitr_flwr.results.finished_run import FinishedRun
from fedmitr_flwr.results.report import charts

_TERMS = {
    "kl": "KL divergence from the ensemble",
    "ce": "Cross-entropy with the pseudo-label",
    "low": "KL divergence on low-density patches",
}
_OF_TEACHERS = {
    "feature": "Squared distance to the teachers' [CLS] tokens, relative to their variance",
    "teacher": "KL divergence from the teachers' outputs, using their heads",
}


def inversion_curve(events: Sequence[dict[str, Any]]) -> list[tuple[float, float]]:
    """Return the loss at each reported iteration, as the mean over the batches."""
    found: dict[int, list[float]] = defaultdict(list)
    for event in events:
        if event["kind"] == "progress" and event["stage"] == "invert" and event.get("loss") is not None:
            found[int(event["iteration"])].append(float(event["loss"]))
    return [(float(iteration), sum(losses) / len(losses)) for iteration, losses in sorted(found.items())]


def distill_curve(events: Sequence[dict[str, Any]], name: str, smooth: int = 1) -> list[tuple[float, float]]:
    """Return one value of distillation at each reported step, as a running mean over `smooth` reports."""
    points = [
        (float(event["done"]), float(event[name]))
        for event in events
        if event["kind"] == "progress" and event["stage"] == "distill" and event.get(name) is not None
    ]
    out = []
    for place, (step, _) in enumerate(points):
        window = [value for _, value in points[max(0, place - smooth + 1) : place + 1]]
        out.append((step, sum(window) / len(window)))
    return out


def curves_of(run: FinishedRun) -> list[dict[str, object]]:
    """Return the charts of inversion, distillation and agreement; charts without points are left out."""
    curves: list[dict[str, object]] = []
    inversion = inversion_curve(run.events)
    if inversion:
        stops = run.report.get("synthetic", {}).get("stops")
        chart = charts.lines(
            [charts.Series("Cross-entropy of the ensemble for the target class", inversion)], x="iteration", y="loss"
        )
        when = f" Patches are stopped at these iterations: {', '.join(map(str, stops))}." if stops else ""
        note = (
            f"Mean over the images.{when} A loss near 0 means that the ensemble assigns the images to their target "
            "classes. It does not say how well a student learns from them."
        )
        curves.append({"title": "Inversion", "chart": chart, "note": note})
    for title, names in (("Distillation", _TERMS), ("Distillation: each teacher", _OF_TEACHERS)):
        terms = [(name, distill_curve(run.events, key, smooth=5)) for key, name in names.items()]
        series = [charts.Series(name, points) for name, points in terms if any(value > 0 for _, value in points)]
        if series:
            chart = charts.lines(series, x="step", y="loss", log=True)
            note = "Loss terms on a logarithmic scale. Each point is the mean of five consecutive reports."
            curves.append({"title": title, "chart": chart, "note": note})
    agreement = [(step, 100 * value) for step, value in distill_curve(run.events, "agreement")]
    if agreement:
        chart = charts.lines(
            [charts.Series("Images for which student and ensemble predict the same class, %", agreement)],
            x="step",
            y="%",
        )
        note = "Measured on a sample of the pool, that is, of the images on which the student trains."
        curves.append({"title": "Agreement with the ensemble", "chart": chart, "note": note})
    return curves
