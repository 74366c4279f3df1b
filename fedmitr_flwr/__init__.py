"""One-shot federated learning for Vision Transformers (FedMITR) as a Flower app.

The names in ``__all__`` are the library's public interface. They are imported when they are first used: PyTorch and
Flower take seconds, and most commands do without them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from fedmitr_flwr.version import __version__

if TYPE_CHECKING:
    from fedmitr_flwr.data import ImageSet, ImageSpec, load_source
    from fedmitr_flwr.evaluate import Evaluation, evaluate
    from fedmitr_flwr.export import save_timm
    from fedmitr_flwr.fedmitr import run_pipeline
    from fedmitr_flwr.initial import initial_state
    from fedmitr_flwr.inputs import ClientModel, PipelineInputs, PipelineResult
    from fedmitr_flwr.log import console_log
    from fedmitr_flwr.models import build_model
    from fedmitr_flwr.observe import Event, Listener, Observer
    from fedmitr_flwr.report.load import FinishedRun, load_run
    from fedmitr_flwr.run_model import RunModel, load_run_model
    from fedmitr_flwr.rundir import RunDirectory
    from fedmitr_flwr.server import choose_device
    from fedmitr_flwr.settings import InversionSettings, Settings, SettingsError
    from fedmitr_flwr.single import invert_model
    from fedmitr_flwr.strategy import FedMITR
    from fedmitr_flwr.synthetic import SyntheticImages
    from fedmitr_flwr.training import train_local
    from fedmitr_flwr.wire import encode_state

_HOMES = {
    "ImageSet": "data",
    "ImageSpec": "data",
    "load_source": "data",
    "Evaluation": "evaluate",
    "evaluate": "evaluate",
    "save_timm": "export",
    "SyntheticImages": "synthetic",
    "build_model": "models",
    "initial_state": "initial",
    "Event": "observe",
    "Listener": "observe",
    "Observer": "observe",
    "ClientModel": "inputs",
    "PipelineInputs": "inputs",
    "PipelineResult": "inputs",
    "run_pipeline": "fedmitr",
    "FinishedRun": "report.load",
    "load_run": "report.load",
    "RunModel": "run_model",
    "load_run_model": "run_model",
    "InversionSettings": "settings",
    "Settings": "settings",
    "SettingsError": "settings",
    "invert_model": "single",
    "FedMITR": "strategy",
    "RunDirectory": "rundir",
    "console_log": "log",
    "choose_device": "server",
    "encode_state": "wire",
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
    "RunDirectory",
    "RunModel",
    "Settings",
    "SettingsError",
    "SyntheticImages",
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
