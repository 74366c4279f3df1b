"""Read a finished run's directory, for reports, export and evaluation.

Everything that can be wrong with a RUN that a person names is a `SettingsError` in one line here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fedmitr_flwr.runs.directory import CONFIG, EVENTS, METRICS, REPORT_DATA, REPORT_PICTURES, STATUS
from fedmitr_flwr.runs.jsonl import read_events
from fedmitr_flwr.settings import Settings, SettingsError
from fedmitr_flwr.settings.home import expand
from fedmitr_flwr.version import __version__


@dataclass(frozen=True)
class FinishedRun:
    """What a completed run wrote.

    Attributes
    ----------
    path
        Its directory, absolute.
    status, config, metrics
        The JSON files of these names.
    report
        ``report.json``; empty if the run wrote none.
    pictures
        Tensors of ``report.safetensors``; empty if there is none.
    events
        Lines of ``metrics.jsonl``.
    """

    path: Path
    status: dict[str, Any]
    config: dict[str, Any]
    metrics: dict[str, Any]
    report: dict[str, Any]
    pictures: dict[str, Tensor]
    events: list[dict[str, Any]]

    def settings(self) -> Settings:
        """The run's settings.

        Raises
        ------
        SettingsError
            If another version wrote them and this one does not understand a key.
        """
        try:
            return Settings.from_run_config(self.config["settings"])
        except (SettingsError, KeyError, TypeError, AttributeError) as error:
            said = str(error).splitlines()[0]
            allowed = f"written by version {self.version}, this is {__version__}: {said}"
            raise SettingsError(("RUN", str(self.path), allowed)) from None

    @property
    def version(self) -> str:
        """Version of fedmitr-flwr that wrote it."""
        return str(self.config.get("versions", {}).get("fedmitr-flwr", "unknown"))


def load_run(path: Path, *, finished: bool = True) -> FinishedRun:
    """Read a run's directory.

    Parameters
    ----------
    path
        What a person gave for RUN.
    finished
        Whether only a completed run will do.

    Raises
    ------
    SettingsError
        If it is no run, has not completed, or is from a version whose report this one cannot read.
    """
    path = expand(path, "RUN").resolve()
    status = _json(path, STATUS)
    if status is None:
        allowed = f"is no run: there is no {STATUS} in it; name a folder that `fedmitr simulate` printed"
        raise SettingsError(("RUN", str(path), allowed))
    state = status.get("state")
    if finished and state != "completed":
        why = {"running": "has not finished (or was killed)", "failed": f"failed: {status.get('error')}"}
        raise SettingsError(
            ("RUN", str(path), f"{why.get(str(state), f'has the state {state}')}; needs a completed run")
        )
    report = _json(path, REPORT_DATA) or {}
    if report and report.get("format") != FORMAT:
        allowed = (
            f"its {REPORT_DATA} has format {report.get('format')}, this version reads {FORMAT}; render it with its own"
        )
        raise SettingsError(("RUN", str(path), allowed))
    config, metrics = _json(path, CONFIG), _json(path, METRICS)
    for name, content in ((CONFIG, config), (METRICS, metrics)):
        if content is None and finished:
            raise SettingsError(("RUN", str(path), f"its {name} is missing"))
    events = list(read_events(path / EVENTS))
    return FinishedRun(path, status, config or {}, metrics or {}, report, _pictures(path), events)


def _json(path: Path, name: str) -> dict[str, Any] | None:
    try:
        content = json.loads((path / name).read_text("utf-8"))
    except OSError:
        return None
    except ValueError as error:
        raise SettingsError(("RUN", str(path), f"its {name} is not JSON: {error}")) from None
    if not isinstance(content, dict):
        raise SettingsError(("RUN", str(path), f"its {name} holds no object"))
    return content


def _pictures(path: Path) -> dict[str, Tensor]:
    file = path / REPORT_PICTURES
    if not file.is_file():
        return {}
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise SettingsError(("RUN", str(path), f"its {REPORT_PICTURES} can't be read: {error}")) from None


FORMAT = 1
