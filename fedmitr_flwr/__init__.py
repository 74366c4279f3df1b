"""One-shot federated learning for Vision Transformers (FedMITR) as a Flower app.

The names in ``__all__`` are the public interface of the library. Each is imported at its first use, because importing
PyTorch and Flower takes seconds and most commands do not need them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from fedmitr_flwr.settings.home import ensure_home
from fedmitr_flwr.version import __version__

if TYPE_CHECKING:
    from fedmitr_flwr.data import ImageSet, ImageSpec, load_source
    from fedmitr_flwr.federation.prepare import choose_device
    from fedmitr_flwr.federation.strategy import FedMITR
    from fedmitr_flwr.federation.uploads.records import encode_state
    from fedmitr_flwr.models.build import build_model
    from fedmitr_flwr.models.timm_checkpoint import save_timm
    from fedmitr_flwr.pipeline.inputs import PipelineInputs, PipelineResult, Upload
    from fedmitr_flwr.pipeline.methods.fedmitr import run_pipeline
    from fedmitr_flwr.results.evaluate import Evaluation, evaluate
    from fedmitr_flwr.results.finished_model import RunModel, load_run_model
    from fedmitr_flwr.results.finished_run import FinishedRun, load_run
    from fedmitr_flwr.runs.directory import RunDirectory
    from fedmitr_flwr.runs.log import console_log
    from fedmitr_flwr.runs.observer import Event, Listener, Observer
    from fedmitr_flwr.settings import InversionSettings, Settings, SettingsError
    from fedmitr_flwr.stages.inversion.single import invert_model
    from fedmitr_flwr.stages.synthetic import SyntheticImages
    from fedmitr_flwr.training.initial import initial_state
    from fedmitr_flwr.training.local import train_local

# Libraries read HOME when they are imported, so it must be set before them.
ensure_home()

_HOMES = {
    "ImageSet": "data",
    "ImageSpec": "data",
    "load_source": "data",
    "Evaluation": "results.evaluate",
    "evaluate": "results.evaluate",
    "save_timm": "models.timm_checkpoint",
    "SyntheticImages": "stages.synthetic",
    "build_model": "models.build",
    "initial_state": "training.initial",
    "Event": "runs.observer",
    "Listener": "runs.observer",
    "Observer": "runs.observer",
    "Upload": "pipeline.inputs",
    "PipelineInputs": "pipeline.inputs",
    "PipelineResult": "pipeline.inputs",
    "run_pipeline": "pipeline.methods.fedmitr",
    "FinishedRun": "results.finished_run",
    "load_run": "results.finished_run",
    "RunModel": "results.finished_model",
    "load_run_model": "results.finished_model",
    "InversionSettings": "settings",
    "Settings": "settings",
    "SettingsError": "settings",
    "invert_model": "stages.inversion.single",
    "FedMITR": "federation.strategy",
    "RunDirectory": "runs.directory",
    "console_log": "runs.log",
    "choose_device": "federation.prepare",
    "encode_state": "federation.uploads.records",
    "train_local": "training.local",
}

__all__ = [
    "Evaluation",
    "Event",
    "FedMITR",
    "FinishedRun",
    "ImageSet",
    "ImageSpec",
    "InversionSettings",
    "Listener",
    "Observer",
    "PipelineInputs",
    "PipelineResult",
    "RunDirectory",
    "RunModel",
    "Settings",
    "SettingsError",
    "SyntheticImages",
    "Upload",
    "__version__",
    "build_model",
    "choose_device",
    "console_log",
    "encode_state",
    "evaluate",
    "initial_state",
    "invert_model",
    "load_run",
    "load_run_model",
    "load_source",
    "run_pipeline",
    "save_timm",
    "train_local",
]


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(f"fedmitr_flwr.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
