"""Read the directory of a finished run, for reports, export and evaluation.

Every defect of a directory that a user names as RUN raises a `SettingsError` with a message of one line.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fedmitr_flwr.runs.atomic import DamagedFileError, read_json_object
from fedmitr_flwr.runs.directory import CONFIG, EVENTS, METRICS, REPORT_DATA, REPORT_PICTURES, STATUS
from fedmitr_flwr.runs.jsonl import read_events
from fedmitr_flwr.runs.tensors import read_tensors
from fedmitr_flwr.settings import Settings, SettingsError
from fedmitr_flwr.settings.home import expand
from fedmitr_flwr.version import __version__


@dataclass(frozen=True)
class FinishedRun:
    """The files of a run.

    Attributes
    ----------
    path
        Absolute path of the run's directory.
    status, config, metrics
        Contents of the JSON files with these names.
    report
        Content of ``report.json``; empty if the file does not exist.
    pictures
        Tensors of ``report.safetensors``; empty if the file does not exist.
    events
        Events of ``metrics.jsonl`` in order.
    """

    path: Path
    status: dict[str, Any]
    config: dict[str, Any]
    metrics: dict[str, Any]
    report: dict[str, Any]
    pictures: dict[str, Tensor]
    events: list[dict[str, Any]]

    def settings(self) -> Settings:
        """Return the settings of the run.

        Raises
        ------
        SettingsError
            If the settings were written by another version and this version does not accept them.
        """
        try:
            return Settings.from_stored(self.config["settings"])
        except (SettingsError, KeyError, TypeError, AttributeError) as error:
            said = str(error).splitlines()[0]
            allowed = f"was written by version {self.version}, this is version {__version__}: {said}"
            raise SettingsError(("RUN", str(self.path), allowed)) from None

    @property
    def version(self) -> str:
        """Return the version of fedmitr-flwr that wrote the run."""
        return str(self.config.get("versions", {}).get("fedmitr-flwr", "unknown"))


def load_run(path: Path, *, finished: bool = True) -> FinishedRun:
    """Read the directory of a run.

    Parameters
    ----------
    path
        Path of the directory.
    finished
        Whether the run must be completed.

    Raises
    ------
    SettingsError
        If the directory is not a run, if the run is not completed, or if this version cannot read its report.
    """
    path = expand(path, "RUN").resolve()
    status = _json(path, STATUS)
    if status is None:
        allowed = f"is not a run: it has no {STATUS}; must be a folder that `fedmitr simulate` printed"
        raise SettingsError(("RUN", str(path), allowed))
    state = status.get("state")
    if finished and state != "completed":
        why = {"running": "has not finished, or was killed", "failed": f"failed: {status.get('error')}"}
        raise SettingsError(
            ("RUN", str(path), f"{why.get(str(state), f'has the state {state}')}; must be a completed run")
        )
    report = _json(path, REPORT_DATA) or {}
    if report and report.get("format") != FORMAT:
        allowed = (
            f"its {REPORT_DATA} has format {report.get('format')}, but this version of fedmitr-flwr reads format "
            f"{FORMAT}; use the version that wrote the run"
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
        return read_json_object(path / name)
    except OSError:
        return None
    except DamagedFileError as error:
        raise SettingsError(("RUN", str(path), f"its {name} {error.problem}")) from None


def _pictures(path: Path) -> dict[str, Tensor]:
    file = path / REPORT_PICTURES
    if not file.is_file():
        return {}
    try:
        return read_tensors(file)[0]
    except (DamagedFileError, OSError) as error:
        raise SettingsError(("RUN", str(path), f"its {REPORT_PICTURES} cannot be read: {error}")) from None


FORMAT = 1
