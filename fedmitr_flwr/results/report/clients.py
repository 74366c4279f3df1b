"""Clients in the report: the outcome, accuracy and ensemble weights of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from fedmitr_flwr.federation.uploads.validation import natural_key
from fedmitr_flwr.results.finished_run import FinishedRun
from fedmitr_flwr.results.report import charts, words
from fedmitr_flwr.training.reported import REPORTED

_MOST_ROWS = 60
_OUTCOMES = {"accepted": "accepted", "refused": "refused", "failed": "failed", "empty": "no data"}


def clients_section(run: FinishedRun, class_names: Sequence[str]) -> dict[str, object]:
    """Return the table and the heat maps of the section; data that the run does not have is left out."""
    events = [event for event in _last_round(run.events) if event.get("outcome") in _OUTCOMES]
    accepted = sorted((e for e in events if e["outcome"] == "accepted"), key=lambda e: natural_key(str(e["client"])))
    others = [event for event in events if event["outcome"] != "accepted"]
    ensemble = run.report.get("ensemble", {})
    weights: list[list[float]] = ensemble.get("weights", [])
    if len(accepted) != len(weights):  # events of a resumed run may be incomplete; the weights are not
        accepted = [{"outcome": "accepted", "client": f"upload {n}"} for n in range(1, len(weights) + 1)]
    evaluation = run.report.get("evaluation") or {}
    local = evaluation.get("local", [])
    rows = [
        _row(event, weights[n] if n < len(weights) else [], local[n] if n < len(local) else None, class_names)
        for n, event in enumerate(accepted)
    ] + [_row(event, [], None, class_names) for event in others]
    silent = sum(int(event.get("count", 0)) for event in run.events if event.get("outcome") == "silent")
    hidden = len(rows) - _MOST_ROWS
    more = [f"The table leaves out {hidden} clients; metrics.jsonl lists them."] if hidden > 0 else []
    more += [f"Clients that did not answer in time: {silent}."] if silent else []
    names = [str(event["client"]) for event in accepted][:_MOST_ROWS]
    section: dict[str, object] = {
        "rows": rows[:_MOST_ROWS],
        "more": " ".join(more),
        "reported": [words.sentence_case(number.title) for number in REPORTED],
        "weighting": run.config.get("settings", {}).get("ensemble.weighting", "not recorded"),
    }
    if weights and len(class_names) <= 100:
        shown = [[f"{100 * value:.0f}" if value >= 0.005 else "" for value in row] for row in weights]
        section["weights"] = charts.heat(names, class_names, weights[:_MOST_ROWS], shown=shown)
        section["maps"] = _knowledge(accepted[:_MOST_ROWS], names, ensemble, section["weighting"], class_names)
    return section


def _knowledge(
    accepted: Sequence[dict[str, Any]],
    names: Sequence[str],
    ensemble: dict[str, Any],
    weighting: object,
    class_names: Sequence[str],
) -> list[dict[str, object]]:
    """Return heat maps of the images of each client and class: the shared counts and the estimates, if present."""
    maps: list[dict[str, object]] = []
    histograms = [event.get("histogram") or [] for event in accepted]
    shared = bool(accepted) and all(len(histogram) == len(class_names) for histogram in histograms)
    if shared:
        chart = _counts(names, histograms, class_names)
        title = "Label histograms that the clients shared"
        maps.append({"title": title, "chart": chart, "note": "Number of images of each class."})
    if ensemble.get("evidence") and weighting == "competence":
        note = "Number of images of each class, estimated from the changes of the rows of the classifier head."
        if not shared:
            note += " No client shared its label histogram. The estimate shows what an upload reveals about the labels."
        chart = _counts(names, ensemble["evidence"][: len(names)], class_names)
        title = "Label histograms estimated from the uploads"
        maps.append({"title": title, "chart": chart, "note": note})
    return maps


def _counts(names: Sequence[str], counts: Sequence[Sequence[float]], class_names: Sequence[str]) -> Markup:
    most = max((value for row in counts for value in row), default=0) or 1
    values = [[(value / most) ** 0.5 for value in row] for row in counts]
    shown = [[f"{value:.0f}" if value >= 0.5 else "" for value in row] for row in counts]
    return charts.heat(names, class_names, values, shown=shown)


def _row(
    event: dict[str, Any], weights: Sequence[float], held_out: float | None, class_names: Sequence[str]
) -> dict[str, object]:
    order = sorted(range(len(weights)), key=lambda c: -weights[c])[:3]
    strongest = [f"{class_names[c]} ({100 * weights[c]:.0f} %)" for c in order if weights[c] > 1e-3]
    images, size = event.get("num_examples"), event.get("upload_mb")
    return {
        "name": str(event["client"]),
        "outcome": _OUTCOMES[event["outcome"]],
        "reason": str(event.get("reason", "")),
        "images": f"{images:,}" if isinstance(images, int) else "–",
        "upload_mb": "–" if size is None else f"{size:.3g}",
        "reported": [number.text(event.get(number.name)) for number in REPORTED],
        "held_out": words.percent(held_out),
        "strongest": ", ".join(strongest),
    }


def _last_round(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the client events of the last round."""
    found: list[dict[str, Any]] = []
    for event in events:
        if event["kind"] == "client":
            found = [] if event.get("outcome") == "asked" else [*found, event]
    return found
