"""Resume an interrupted run: read its settings, and check which of them may still change."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedmitr_flwr.runs.atomic import CHECKSUM, DamagedFileError, Json, json_checksum, read_json_object
from fedmitr_flwr.runs.directory import CHECKPOINTS, CONFIG, METRICS, MODEL, STATUS, UPLOADED
from fedmitr_flwr.settings import RunConfigValue, Settings, SettingsError
from fedmitr_flwr.settings.recipes import KEYS, Recipe, is_unnamed

# The first stage whose result depends on a group of settings. For groups that are not listed it is inversion.
_DECIDES = {
    **dict.fromkeys(("data", "partition", "model", "train"), "uploads"),
    **dict.fromkeys(("density", "relabel", "distill", "generator"), "distillation"),
}
_FINISHED_FILES = {
    "uploads": UPLOADED,
    "inversion": f"{CHECKPOINTS}/round-*/inversion-*.safetensors",
    "distillation": f"{CHECKPOINTS}/round-*/[dm]*",
}
# `fedmitr simulate` passes the simulation config in this variable, because Flower does not pass it to the ServerApp.
FEDERATION_VARIABLE = "FEDMITR_FEDERATION"
_RESUMED = ("settings", "federation")  # the entries of config.json on which the result of a resume depends
_FREE = {"train.time-limit-seconds"}


log = logging.getLogger("fedmitr.run")


def is_complete(run: Path) -> bool:
    """Return whether a run is complete and its model is intact. A damaged model is named in a warning."""
    try:
        state = json.loads((run / STATUS).read_text("utf-8"))["state"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False
    if state != "completed" or not (run / METRICS).is_file():
        return False
    from fedmitr_flwr.runs.tensors import read_tensors  # loads torch, which the other commands do not need

    try:
        read_tensors(run / MODEL / "model.safetensors")
    except OSError:
        return True  # deleting or moving the model of a complete run does not start it again
    except DamagedFileError as error:
        log.warning("The run is complete, but its model has to be made again: %s", error)
        return False
    return True


def with_checksum(config: Mapping[str, Json]) -> dict[str, Json]:
    """Return the content of ``config.json`` with a checksum of what a resume takes from it."""
    return {**config, CHECKSUM: json_checksum([config.get(key) for key in _RESUMED])}


def simulation_config(clients: int | None) -> dict[str, bool | int | float | str] | None:
    """Return the known part of Flower's simulation config of this run; None in a deployment.

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
        If the file is missing, because the run ended before it asked a client or `run` is not a run, or is damaged.
    """
    try:
        config = read_json_object(run / CONFIG)
        config["settings"].items()
        if config.get(CHECKSUM) not in (None, json_checksum([config.get(key) for key in _RESUMED])):
            raise DamagedFileError(run / CONFIG, f"is damaged: its {' or '.join(_RESUMED)} differ from its checksum")
    except DamagedFileError as error:
        raise SettingsError(("run.resume", str(run), f"cannot be resumed: its {CONFIG} {error.problem}")) from None
    except (OSError, KeyError, AttributeError):
        raise SettingsError(
            ("run.resume", str(run), f"is not a run that can be resumed: it has no readable {CONFIG}")
        ) from None
    return config


def resumed_settings(run: Path, changes: Mapping[str, RunConfigValue]) -> Settings:
    """Return the settings of a run with some of them changed. No recipe is applied again.

    Parameters
    ----------
    run
        Directory of the run.
    changes
        Keys to change, with their new values.

    Raises
    ------
    SettingsError
        If finished work depends on the old value of a changed key, or `run.recipe` is changed; the message names each
        such key.
    """
    stored = Settings.from_stored(stored_config(run)["settings"])
    changes = {key: value for key, value in changes.items() if not is_unnamed(key, value)}
    if changes.get("run.recipe", stored.run.recipe) != stored.run.recipe:
        allowed = "cannot change, because a recipe applies only when a run starts; name single keys instead"
        raise SettingsError(("run.recipe", changes["run.recipe"], allowed))
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
            allowed = f"cannot change, because the run has finished {stage} with {old}; start a new run instead"
            problems.append((key, after[key], allowed))
    if problems:
        raise SettingsError(*problems)
    return settings


def resumed_recipe(run: Path, settings: Settings) -> Recipe:
    """Return the recipe that was applied when a run started, as far as `settings` still have its values."""
    config = stored_config(run)
    stored, values = config["settings"], settings.flat()
    try:
        about = config["recipe"]
        keys = [str(key) for key in about["keys"]]
        kept = tuple(key for key in keys if key in values and values[key] == stored.get(key))
        named = (*map(str, about["named"]), *(key for key in keys if key not in kept))
        return Recipe(str(about["name"]), str(about["reason"]), kept, named)
    except (KeyError, TypeError):
        return Recipe("scratch", "the run was started by a version without recipes", ())


def changes_in(given: Settings, run: Path) -> dict[str, RunConfigValue]:
    """Return the keys that a run-config with `run.resume` changes in the resumed run.

    Flower adds the app's defaults to a run-config. A key with its default value therefore does not change the run,
    unless it is a key of a recipe: for these the run-config says whether they are named. The run-config of ``fedmitr
    resume`` is complete and names the run; all its keys apply.
    """
    values, defaults, unnamed = given.flat(), Settings().flat(), given.unnamed()
    complete = given.run.name == run.name
    return {
        key: value
        for key, value in values.items()
        if key not in unnamed and (complete or key in KEYS or value != defaults[key])
    }


def _decided_stage(key: str) -> str | None:
    group = key.split(".", 1)[0]
    if key in _FREE:
        return None
    if group == "run":
        return "uploads" if key == "run.seed" else None
    return _DECIDES.get(group, "inversion")
