"""Write the results of a run at its end: evaluation, model, figure, report and metrics."""

from __future__ import annotations

import logging

from fedmitr_flwr.data import ImageSpec
from fedmitr_flwr.federation.code_digest import code_digest
from fedmitr_flwr.federation.prepare import Federation
from fedmitr_flwr.federation.quorum import ClientCounts
from fedmitr_flwr.models.patch_grid import PatchGrid
from fedmitr_flwr.models.timm_checkpoint import save_timm
from fedmitr_flwr.pipeline.inputs import PipelineResult
from fedmitr_flwr.results.evaluate import Evaluation, evaluate
from fedmitr_flwr.results.metrics import MODELS
from fedmitr_flwr.results.model_card import write_model_card
from fedmitr_flwr.results.report import write_run_report
from fedmitr_flwr.results.report.data import write_report_data
from fedmitr_flwr.runs.atomic import Json
from fedmitr_flwr.runs.directory import METRICS, MODEL, SYNTHETIC, RunDirectory
from fedmitr_flwr.runs.observer import Observer
from fedmitr_flwr.runs.process_memory import peak_rss_mb
from fedmitr_flwr.runs.snapshots import Keeper
from fedmitr_flwr.settings import Settings
from fedmitr_flwr.version import __version__

log = logging.getLogger("fedmitr.run")


_STAGES = ("clients", "collect", "invert", "relabel", "distill", "evaluate")


def write_results(
    run: RunDirectory,
    settings: Settings,
    federation: Federation,
    result: PipelineResult,
    clients: ClientCounts,
    observer: Observer,
    keeper: Keeper | None = None,
    *,
    upload_mb: float | None = None,
) -> None:
    """Evaluate the last round and write model, figure, metrics and report into the run's directory.

    Parameters
    ----------
    run
        Directory of the run.
    settings, federation
        Settings and federation of the run.
    result, clients
        Result and client counts of the last round.
    observer
        Holds the durations of all stages in seconds, summed over the rounds.
    keeper
        Snapshots of the stages for the report; None: the report has no density maps and no images at the stops.
    upload_mb
        Mean size of an upload of the last round in MB (10^6 bytes); None: not known.
    """
    # This import loads matplotlib's drawing code, which the server does not need while it collects uploads.
    from fedmitr_flwr.results.figures import save_synthetic

    spec = federation.spec
    evaluation = None
    if federation.held_out is not None:
        with observer.stage("evaluate"):
            evaluation = evaluate(result, federation.held_out, spec, settings.model, federation.device)
            observer.progress("evaluate", 1, 1, evaluation.accuracy)
    metadata = {"fedmitr-flwr": __version__, "digest": code_digest(), "seed": str(settings.run.seed)}
    save_timm(result.state, settings.model, spec, run.path / MODEL, metadata)
    write_model_card(run.path / MODEL, settings, spec, evaluation, clients)
    if result.synthetic is not None:
        save_synthetic(result.synthetic, spec, PatchGrid.of(result.ensemble.teachers[0], spec), run.path / SYNTHETIC)
    found = None if result.diagnostics is None else {**result.diagnostics.as_dict()}
    metrics = make_metrics(evaluation, clients, observer, settings.run.memory_mb, upload_mb)
    run.write_json(METRICS, {**metrics, "diagnostics": found, "warnings": list(result.warnings)})
    write_report(run, settings, spec, result, evaluation, keeper)
    for line in accuracy_table(evaluation, settings.run.evaluate_on):
        log.info("%s", line)


def write_report(
    run: RunDirectory,
    settings: Settings,
    spec: ImageSpec,
    result: PipelineResult,
    evaluation: Evaluation | None,
    keeper: Keeper | None,
) -> None:
    """Write the report and its data; an error is logged as a warning and does not fail the run."""
    try:
        write_report_data(run.path, settings, spec, result, evaluation, keeper)
        log.info("Report: %s", write_run_report(run.path))
    except Exception as error:
        log.warning("The report could not be written: %s: %s", type(error).__name__, error)
        log.debug("Traceback:", exc_info=True)


def make_metrics(
    evaluation: Evaluation | None,
    clients: ClientCounts,
    observer: Observer,
    budget_mb: int = 0,
    upload_mb: float | None = None,
) -> dict[str, Json]:
    """Return the content of ``metrics.json``; accuracies are None without an evaluation, the budget if it is 0."""
    return {
        "accuracy": dict(evaluation.accuracy()) if evaluation else dict.fromkeys(MODELS),
        "metrics": {name: dict(values) for name, values in evaluation.metrics.items()} if evaluation else None,
        "per_class": {"global": evaluation.per_class["global"] if evaluation else None},
        "clients": clients.as_dict(),
        "upload_mb": None if upload_mb is None else round(upload_mb, 6),
        "seconds": {stage: round(observer.seconds.get(stage, 0.0), 3) for stage in _STAGES},
        "peak_rss_mb": round(peak_rss_mb(), 1),
        "memory_budget_mb": budget_mb or None,
    }


def accuracy_table(evaluation: Evaluation | None, split: str) -> list[str]:
    """Return the accuracies as lines for the log."""
    if evaluation is None:
        return ["No accuracy was measured (run.evaluate-on = none)"]
    lines = [f"Accuracy on {evaluation.num_images} {split} images"]
    for key, value in evaluation.accuracy().items():
        lines.append(f"    {MODELS[key]:<20}{value:.4f}")
    return lines
