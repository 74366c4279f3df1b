"""Going on with a run that was cut off: which settings it has, and which of them may still change."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedmitr_flwr.runs.directory import CHECKPOINTS, CONFIG, METRICS, STATUS, UPLOADS
from fedmitr_flwr.settings import RunConfigValue, Settings, SettingsError

# The stage whose result a group of settings decides; a group that is not here decides what is inverted.
_DECIDES = {
    **dict.fromkeys(("data", "partition", "model", "train"), "uploads"),
    **dict.fromkeys(("density", "relabel", "distill", "generator"), "distillation"),
}
_FINISHED_FILES = {
    "uploads": f"{UPLOADS}/round-*/*.safetensors",
    "inversion": f"{CHECKPOINTS}/round-*/inversion-*.safetensors",
    "distillation": f"{CHECKPOINTS}/round-*/[dm]*",
}
# Where `fedmitr simulate` tells the ServerApp, which Flower tells nothing, how the run is simulated.
FEDERATION_VARIABLE = "FEDMITR_FEDERATION"
_FREE = {"train.time-limit-seconds"}


def is_complete(run: Path) -> bool:
    """Whether a run has nothing left to do."""
    try:
        state = json.loads((run / STATUS).read_text("utf-8"))["state"]
    except (OSError, ValueError, KeyError):
        return False
    return state == "completed" and (run / METRICS).is_file()


def simulation_config(clients: int | None) -> dict[str, bool | int | float | str] | None:
    """Return Flower's simulation config of this run as far as it is known; None in a deployment.

    Parameters
    ----------
    clients
        Number of simulated clients; None in a deployment.
    """
    if clients is None:
        return None
    told: dict[str, bool | int | float | str] = json.loads(os.environ.get(FEDERATION_VARIABLE, "{}"))
    return {**told, "num-supernodes": clients}


def stored_config(run: Path) -> dict[str, Any]:
    """Read a run's ``config.json``.

    Raises
    ------
    SettingsError
        If there is none: the run ended before any client was asked, or this is no run.
    """
    try:
        config: dict[str, Any] = json.loads((run / CONFIG).read_text("utf-8"))
        config["settings"].items()
    except (OSError, ValueError, KeyError, AttributeError):
        raise SettingsError(("run.resume", str(run), f"holds no run to go on with: no readable {CONFIG}")) from None
    return config


def resumed_settings(run: Path, changes: Mapping[str, RunConfigValue]) -> Settings:
    """Return the settings of a run with some of them changed.

    Parameters
    ----------
    run
        Its directory.
    changes
        Keys to change.

    Raises
    ------
    SettingsError
        Names each key whose change would contradict what is finished already.
    """
    stored = Settings.from_run_config(stored_config(run)["settings"])
    place: dict[str, RunConfigValue] = {
        "run.output": str(run.parent),
        "run.name": run.name,
        "run.resume": str(run),
    }
    settings = stored.replace(**{**changes, **place})
    before, after = stored.flat(), settings.flat()
    problems = []
    for key in after:
        stage = _decided_stage(key)
        if after[key] != before[key] and stage is not None and any(run.glob(_FINISHED_FILES[stage])):
            old = f'"{before[key]}"' if isinstance(before[key], str) else before[key]
            allowed = f"cannot change any more: the run has finished {stage} with {old}; start a new run for it"
            problems.append((key, after[key], allowed))
    if problems:
        raise SettingsError(*problems)
    return settings


def changes_in(given: Settings, run: Path) -> dict[str, RunConfigValue]:
    """Return what a run-config that names a run to resume asks to change in it.

    Flower fills a run-config up with the app's defaults, so a key at its default is taken from the run, unless the
    run-config is a complete one made for this run, as that of ``fedmitr resume``.
    """
    values, defaults = given.flat(), Settings().flat()
    complete = given.run.name == run.name
    return {key: value for key, value in values.items() if complete or value != defaults[key]}


def _decided_stage(key: str) -> str | None:
    group = key.split(".", 1)[0]
    if key in _FREE:
        return None
    if group == "run":
        return "uploads" if key == "run.seed" else None
    return _DECIDES.get(group, "inversion")
