"""One-shot federated learning for Vision Transformers (FedMITR) as a Flower app.

The names in ``__all__`` are the library's public interface. They are imported when they are first used: PyTorch and
Flower take seconds, and most commands do without them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedmitr_flwr.data import ImageSet, ImageSpec, load_source
    from fedmitr_flwr.evaluate import Evaluation, evaluate
    from fedmitr_flwr.export import save_timm
    from fedmitr_flwr.models import build_model, initial_state
    from fedmitr_flwr.observe import Event, Listener, Observer
    from fedmitr_flwr.pipeline import ClientModel, PipelineInputs, PipelineResult, run_pipeline
    from fedmitr_flwr.report.load import FinishedRun, load_run
    from fedmitr_flwr.run_model import RunModel, load_run_model
    from fedmitr_flwr.settings import InversionSettings, Settings, SettingsError
    from fedmitr_flwr.single import invert_model
    from fedmitr_flwr.strategy import FedMITR
    from fedmitr_flwr.synthetic import SyntheticImages
    from fedmitr_flwr.training import train_local

__version__ = "0.1.0"

_HOMES = {
    "ImageSet": "data",
    "ImageSpec": "data",
    "load_source": "data",
    "Evaluation": "evaluate",
    "evaluate": "evaluate",
    "save_timm": "export",
    "SyntheticImages": "synthetic",
    "build_model": "models",
    "initial_state": "models",
    "Event": "observe",
    "Listener": "observe",
    "Observer": "observe",
    "ClientModel": "pipeline",
    "PipelineInputs": "pipeline",
    "PipelineResult": "pipeline",
    "run_pipeline": "pipeline",
    "FinishedRun": "report.load",
    "load_run": "report.load",
    "RunModel": "run_model",
    "load_run_model": "run_model",
    "InversionSettings": "settings",
    "Settings": "settings",
    "SettingsError": "settings",
    "invert_model": "single",
    "FedMITR": "strategy",
    "train_local": "training",
}

__all__ = [
    "ClientModel",
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
    "RunModel",
    "Settings",
    "SettingsError",
    "SyntheticImages",
    "__version__",
    "build_model",
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
