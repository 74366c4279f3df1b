"""A run on the server's side, apart from Flower: checks before it, results after it."""

from __future__ import annotations

import logging
import os
import platform
from dataclasses import dataclass
from importlib.metadata import version

import torch

import fedmitr_flwr
from fedmitr_flwr.atomic import Json
from fedmitr_flwr.data import ImageSet, ImageSpec, load_source, load_spec, partition_indices
from fedmitr_flwr.digest import code_digest
from fedmitr_flwr.evaluate import Evaluation, evaluate
from fedmitr_flwr.export import save_timm
from fedmitr_flwr.grid import PatchGrid
from fedmitr_flwr.listeners import Keeper
from fedmitr_flwr.model_card import write_model_card
from fedmitr_flwr.models import build_model
from fedmitr_flwr.observe import Observer, peak_rss_mb
from fedmitr_flwr.pipeline import PipelineResult
from fedmitr_flwr.quorum import ClientCounts
from fedmitr_flwr.report import write_run_report
from fedmitr_flwr.report.data import write_report_data
from fedmitr_flwr.rundir import METRICS, MODEL, SYNTHETIC, RunDirectory
from fedmitr_flwr.settings import Settings, SettingsError

log = logging.getLogger("fedmitr.run")

_PACKAGES = ("flwr", "torch", "torchvision", "timm", "ray", "numpy", "flwr-datasets", "safetensors")
_STAGES = ("clients", "collect", "invert", "relabel", "distill", "evaluate")


@dataclass(frozen=True)
class Federation:
    """What is known before any client is asked.

    Attributes
    ----------
    spec
        Classes, geometry and normalisation.
    held_out
        Images to evaluate on; None for `run.evaluate-on = none`.
    device
        Where the server's stages run.
    """

    spec: ImageSpec
    held_out: ImageSet | None
    device: torch.device


def prepare(settings: Settings, num_partitions: int | None) -> Federation:
    """Check everything that can be checked before a client starts.

    Parameters
    ----------
    settings
        Valid in themselves; here they meet data, model and machine.
    num_partitions
        Number of simulated clients; None in a deployment, where sites have their own data.

    Raises
    ------
    SettingsError
        If source, model, partition or device cannot work, with key, value and what is allowed.
    """
    device = choose_device(settings.run.device)
    if settings.run.evaluate_on == "none":
        spec, held_out = load_spec(settings.data), None
    else:
        source = load_source(settings.data)
        spec = source.spec
        held_out = source.test if settings.run.evaluate_on == "test" else source.validation
        if num_partitions is not None:
            partition_indices(source.train, settings.partition, num_partitions)
    build_model(settings.model, spec)
    return Federation(spec, held_out, device)


def choose_device(name: str) -> torch.device:
    """Return the device that `run.device` names; ``auto`` is a GPU when there is one.

    Raises
    ------
    SettingsError
        If this machine does not have it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SettingsError(("run.device", name, f'this machine has {torch.cuda.device_count()} GPUs; "cpu" or "auto"'))
    return device


def describe_run(settings: Settings, federation: Federation) -> dict[str, Json]:
    """Return the content of ``config.json``: what it takes to run this again."""
    return {
        "settings": dict(settings.flat()),
        "class_names": list(federation.spec.class_names),
        "seeds": {
            "run": settings.run.seed,
            "partition": settings.partition.seed,
            "split": settings.data.split_seed,
        },
        "digest": code_digest(),
        "versions": {
            "python": platform.python_version(),
            "fedmitr-flwr": fedmitr_flwr.__version__,
            **{package: version(package) for package in _PACKAGES},
        },
        "hardware": {
            "machine": platform.machine(),
            "system": platform.platform(),
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "memory_mb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20,
            "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
            "device": str(federation.device),
        },
    }


def write_results(
    run: RunDirectory,
    settings: Settings,
    federation: Federation,
    result: PipelineResult,
    clients: ClientCounts,
    observer: Observer,
    keeper: Keeper | None = None,
) -> None:
    """Evaluate the last round and write model, figure, report and metrics into the run's directory.

    Parameters
    ----------
    run
        Where to write; ``metrics.json`` comes last.
    settings, federation
        Of the run.
    result, clients
        Of its last round.
    observer
        Holds the seconds of all stages so far, summed over the rounds.
    keeper
        What the stages showed, for the report.
    """
    from fedmitr_flwr.figures import save_synthetic  # matplotlib, of no use during collection

    spec = federation.spec
    evaluation = None
    if federation.held_out is not None:
        with observer.stage("evaluate"):
            evaluation = evaluate(result, federation.held_out, spec, settings.model, federation.device)
            observer.progress("evaluate", 1, 1, evaluation.accuracy)
    metadata = {"fedmitr-flwr": fedmitr_flwr.__version__, "digest": code_digest(), "seed": str(settings.run.seed)}
    save_timm(result.state, settings.model, spec, run.path / MODEL, metadata)
    write_model_card(run.path / MODEL, settings, spec, evaluation, clients)
    if result.synthetic is not None:
        save_synthetic(result.synthetic, spec, PatchGrid.of(result.ensemble.teachers[0], spec), run.path / SYNTHETIC)
    found = None if result.diagnostics is None else {**result.diagnostics.as_dict()}
    metrics = make_metrics(evaluation, clients, observer, settings.run.memory_mb)
    run.write_json(METRICS, {**metrics, "diagnostics": found})
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
    """Write the report's data and the report; if that fails the run has still succeeded, and the log says why."""
    try:
        write_report_data(run.path, settings, spec, result, evaluation, keeper)
        log.info("Report: %s", write_run_report(run.path))
    except Exception as error:
        log.warning("The report could not be written (%s: %s)", type(error).__name__, error)
        log.debug("Traceback:", exc_info=True)


def make_metrics(
    evaluation: Evaluation | None, clients: ClientCounts, observer: Observer, budget_mb: int = 0
) -> dict[str, Json]:
    """Return the content of ``metrics.json``; accuracies are null without an evaluation, the budget without one."""
    names = ("local_mean", "fedavg", "ensemble", "global")
    return {
        "accuracy": dict(evaluation.accuracy()) if evaluation else dict.fromkeys(names),
        "per_class": {"global": evaluation.per_class["global"] if evaluation else None},
        "clients": clients.as_dict(),
        "seconds": {stage: round(observer.seconds.get(stage, 0.0), 3) for stage in _STAGES},
        "peak_rss_mb": round(peak_rss_mb(), 1),
        "memory_budget_mb": budget_mb or None,
    }


def accuracy_table(evaluation: Evaluation | None, split: str) -> list[str]:
    """Return the accuracies as lines of text."""
    if evaluation is None:
        return ["No evaluation (run.evaluate-on = none)"]
    names = ("local models, mean", "one-shot FedAvg", "ensemble", "global model")
    lines = [f"Accuracy on {evaluation.num_images} {split} images"]
    for name, value in zip(names, evaluation.accuracy().values(), strict=True):
        lines.append(f"    {name:<20}{value:.4f}")
    return lines
