"""Costs in the report: time, floating-point operations and memory of each stage."""

from __future__ import annotations

from markupsafe import Markup

from fedmitr_flwr.results.finished_run import FinishedRun
from fedmitr_flwr.results.report import charts, words

STAGES = {
    "clients": "Client training",
    "collect": "Upload validation",
    "invert": "Inversion",
    "relabel": "Density split, relabeling",
    "distill": "Distillation",
    "evaluate": "Evaluation",
}


def cost_section(run: FinishedRun) -> dict[str, object]:
    """Return the charts of the section; stages and values that the run does not have are left out."""
    seconds = run.metrics.get("seconds", {})
    time = [_bar(stage, words.duration(value), value) for stage, value in seconds.items()]
    flops = run.report.get("flops", {})
    arithmetic = [
        _bar(stage, words.quantity(flops[stage], "FLOP"), flops[stage])
        for stage in ("invert", "relabel", "distill")
        if stage in flops
    ]
    dense, sparse = flops.get("invert_dense", 0.0), flops.get("invert", 0.0)
    note = "Floating-point operations, estimated from the model and the settings."
    if dense > sparse:
        note += f" Without stopping patches, inversion would need {dense / sparse:.1f} times as many."
    peak = run.metrics.get("peak_rss_mb")
    return {
        "time": charts.bars(time, series=3),
        "flops": charts.bars(arithmetic, series=2) if arithmetic else None,
        "flops_note": note,
        "memory": _memory(run, "peak_rss_mb"),
        "gpu": _memory(run, "cuda_peak_mb"),
        "peak": f"{peak:,.0f} MiB" if peak else None,
    }


def _memory(run: FinishedRun, name: str) -> Markup | None:
    """Draw the largest value of each stage over all rounds."""
    most: dict[str, float] = {}
    for event in run.events:
        if event["kind"] == "ended" and event.get(name):
            most[event["stage"]] = max(most.get(event["stage"], 0.0), float(event[name]))
    rows = [_bar(stage, f"{value:,.0f} MiB", value) for stage, value in most.items()]
    return charts.bars(rows, series=4) if rows else None


def _bar(stage: str, shown: str, value: float) -> charts.Bar:
    return charts.Bar(STAGES.get(stage, stage), shown, float(value))
