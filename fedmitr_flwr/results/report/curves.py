"""Loss curves out of a run's events."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from fedmitr_flwr.results.finished_run import FinishedRun
from fedmitr_flwr.results.report import charts

_TERMS = {
    "kl": "KL to the ensemble",
    "ce": "CE with the pseudo-label",
    "low": "KL on low-density patches",
}
_OF_TEACHERS = {
    "feature": "squared distance from a teacher's [CLS] token, in its variances",
    "teacher": "KL to what a teacher's head reads in it",
}


def inversion_curve(events: Sequence[dict[str, Any]]) -> list[tuple[float, float]]:
    """Mean loss over the batches at each iteration that was reported."""
    found: dict[int, list[float]] = defaultdict(list)
    for event in events:
        if event["kind"] == "progress" and event["stage"] == "invert" and event.get("loss") is not None:
            found[int(event["iteration"])].append(float(event["loss"]))
    return [(float(iteration), sum(losses) / len(losses)) for iteration, losses in sorted(found.items())]


def distill_curve(events: Sequence[dict[str, Any]], name: str, smooth: int = 1) -> list[tuple[float, float]]:
    """One value of distillation over its steps, as a running mean over `smooth` reports."""
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
    """Charts of inversion, distillation and agreement; those without points are left out."""
    curves: list[dict[str, object]] = []
    inversion = inversion_curve(run.events)
    if inversion:
        stops = run.report.get("synthetic", {}).get("stops")
        chart = charts.lines([charts.Series("CE(A(x), y), mean over images", inversion)], x="iteration", y="loss")
        when = f"Patches stop at: {', '.join(map(str, stops))}. " if stops else ""
        note = f"{when}A loss near 0 satisfies the teachers; it does not say that images are good."
        curves.append({"title": "Inversion", "chart": chart, "note": note})
    for title, names in (("Distillation", _TERMS), ("Distillation: each teacher", _OF_TEACHERS)):
        terms = [(name, distill_curve(run.events, key, smooth=5)) for key, name in names.items()]
        series = [charts.Series(name, points) for name, points in terms if any(value > 0 for _, value in points)]
        if series:
            chart = charts.lines(series, x="step", y="loss", log=True)
            note = "Running means over five reports, logarithmic."
            curves.append({"title": title, "chart": chart, "note": note})
    agreement = [(step, 100 * value) for step, value in distill_curve(run.events, "agreement")]
    if agreement:
        chart = charts.lines([charts.Series("Student and ensemble name the same class, %", agreement)], x="step", y="%")
        note = "On a sample of the pool that it learns from."
        curves.append({"title": "Agreement with the ensemble", "chart": chart, "note": note})
    return curves
