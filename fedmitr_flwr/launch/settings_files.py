"""Read a user's input for a run: a settings file, single keys and a federation file.

The result is a validated `Settings` and a simulation config. Every mistake is a `SettingsError` that names the key or
file, the value and the allowed values.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedmitr_flwr.runs.resume import resumed_settings, stored_config
from fedmitr_flwr.settings import RunConfigValue, Settings, SettingsError, flat_fields
from fedmitr_flwr.settings.docs import CONFIG_TABLE, flatten, takes_text, toml_value
from fedmitr_flwr.settings.home import expand

FederationValue = bool | int | float | str

# Keys of Flower's simulation config (flwr.proto.federation_config_pb2.SimulationConfig), as written in its files.
_FEDERATION: dict[str, tuple[type | tuple[type, ...], str]] = {
    "num-supernodes": (int, "an integer >= 1"),
    "client-resources-num-cpus": (int, "an integer >= 1"),
    "client-resources-num-gpus": ((int, float), "a number >= 0, a share of a GPU for each client"),
    "init-args-num-cpus": (int, "an integer >= 1"),
    "init-args-num-gpus": (int, "an integer >= 0"),
    "init-args-logging-level": (str, "a name such as WARNING"),
    "init-args-log-to-driver": (bool, "true or false"),
    "backend": (str, '"ray"'),
    "verbose": (bool, "true or false"),
}
_AT_LEAST_ONE = {"num-supernodes", "client-resources-num-cpus", "init-args-num-cpus"}


def app_directory(given: Path | None = None) -> Path:
    """Return the folder of the Flower app: the given one, or the checkout from which this code was imported.

    Raises
    ------
    SettingsError
        If the folder has no ``pyproject.toml`` with a ``[tool.flwr.app]`` table.
    """
    app = expand(given or Path(__file__).parents[2], "--app").resolve()
    table = _read_toml(app / "pyproject.toml", "--app")
    if "app" not in table.get("tool", {}).get("flwr", {}):
        allowed = "its pyproject.toml has no [tool.flwr.app] table; give the folder of a Flower app"
        raise SettingsError(("--app", str(app), allowed))
    return app


def run_settings(
    app: Path,
    conf: Path | None = None,
    overrides: Sequence[str] = (),
    output: Path | None = None,
    *,
    absolute: bool = True,
) -> Settings:
    """Return the settings of a run from a user's input; see `given_settings`."""
    return given_settings(app, conf, overrides, output, absolute=absolute)[0]


def given_settings(
    app: Path,
    conf: Path | None = None,
    overrides: Sequence[str] = (),
    output: Path | None = None,
    *,
    absolute: bool = True,
) -> tuple[Settings, dict[str, str]]:
    """Merge an app's defaults, a settings file and single keys, and validate the result. Later values win.

    Keys of a recipe that none of these names get the recipe's value (see `settings.recipes`).

    Parameters
    ----------
    app
        Folder with the ``pyproject.toml`` whose ``[tool.flwr.app.config]`` holds the defaults.
    conf
        TOML file with run-config keys, dotted or in tables.
    overrides
        ``key=value`` strings. Quotes around a value are optional.
    output
        Value for ``run.output``; wins over all others.
    absolute
        If true, relative paths are made absolute from the current directory. If false, they are paths of another
        machine and are not changed.

    Returns
    -------
    settings
        The validated settings.
    origins
        Where the value of each key comes from: ``default``, ``recipe NAME``, ``--set``, ``--output`` or a file.

    Raises
    ------
    SettingsError
        If a file cannot be read, or keys are wrong. One error names all wrong keys.
    """
    table = _read_toml(app / "pyproject.toml", "--app")
    config: dict[str, Any] = dict(flatten(table.get("tool", {}).get("flwr", {}).get("app", {}).get("config", {})))
    missing = [key for key in flat_fields() if key not in config]
    if missing:
        allowed = f"{CONFIG_TABLE} must declare {', '.join(missing)}, or Flower refuses the keys; run `make settings`"
        raise SettingsError(("--app", str(app), allowed))
    defaults = Settings().flat()
    origins = {key: "default" if defaults.get(key) == value else "pyproject.toml" for key, value in config.items()}
    given: list[tuple[str, dict[str, Any]]] = [
        (str(conf), dict(flatten(_read_toml(conf, "settings file"))) if conf is not None else {}),
        ("--set", dict(_override(text) for text in overrides)),
        ("--output", {"run.output": str(output)} if output is not None else {}),
    ]
    for origin, values in given:
        config |= values
        origins |= dict.fromkeys(values, origin)
    lists = [(key, value) for key, value in config.items() if not isinstance(value, bool | int | float | str)]
    if lists:
        example = 'a list is written as a string with commas, for example "50,100"'
        raise SettingsError(*((key, str(value), example) for key, value in lists))
    settings = Settings.from_run_config(config)
    recipe = settings.applied_recipe()
    origins |= dict.fromkeys(settings.unnamed(), "default") | dict.fromkeys(recipe.keys, f"recipe {recipe.name}")
    return settings.replace(**_absolute_paths(settings)) if absolute else settings, origins


def resumed_run(run: Path, overrides: Sequence[str] = ()) -> tuple[Settings, Mapping[str, Any]]:
    """Read the settings and the simulation config with which a simulation is resumed.

    Parameters
    ----------
    run
        Directory of the run.
    overrides
        ``key=value`` strings that change its settings.

    Returns
    -------
    settings
        The settings of the run, with the changes.
    federation
        The simulation config of the run.

    Raises
    ------
    SettingsError
        If there is no such run, it was not a simulation, or a change affects a stage that is finished.
    """
    federation = stored_config(run).get("federation")
    if not federation:
        allowed = "was not simulated on this machine; resume it with `fedmitr run` and the setting run.resume"
        raise SettingsError(("run.resume", str(run), allowed))
    return resumed_settings(run, dict(_override(text) for text in overrides)), federation


def federation_config(
    file: Path | None = None,
    clients: int | None = None,
    cpus: int | None = None,
    base: Mapping[str, Any] | None = None,
) -> dict[str, FederationValue]:
    """Return the simulation config: defaults for this machine, then a federation file, then single values.

    Parameters
    ----------
    file
        TOML file with keys of Flower's simulation config, as in ``conf/federation/``.
    clients
        Number of simulated clients; wins over the file. The default is 10.
    cpus
        Number of CPU cores for the clients; wins over the file. The default is the number of cores that this process
        may use, but at most as many as the clients need.
    base
        Simulation config of an earlier run, used in place of a file.

    Raises
    ------
    SettingsError
        If a key is unknown, or a value has the wrong type or is out of range.
    """
    config: dict[str, Any] = {"num-supernodes": 10, "client-resources-num-cpus": 1, "client-resources-num-gpus": 0.0}
    given = dict(flatten(_read_toml(file, "federation file"))) if file is not None else dict(base or {})
    given |= {"num-supernodes": clients} if clients is not None else {}
    given |= {"init-args-num-cpus": cpus} if cpus is not None else {}
    problems = [problem for key, value in given.items() if (problem := _federation_problem(key, value))]
    if problems:
        raise SettingsError(*problems)
    config |= given
    each, number = config["client-resources-num-cpus"], config["num-supernodes"]
    available = _cpu_count()
    if each > config.get("init-args-num-cpus", available):
        most = config.get("init-args-num-cpus", available)
        raise SettingsError(("client-resources-num-cpus", each, f"must not exceed the {most} CPU cores available"))
    config.setdefault("init-args-num-cpus", max(each, min(available, each * number)))
    return config


def federation_toml(config: Mapping[str, FederationValue]) -> str:
    """Render a simulation config as a file for ``flwr run --federation-config``."""
    return "".join(f"{key} = {toml_value(value)}\n" for key, value in config.items())


def _federation_problem(key: str, value: object) -> tuple[str, object, str] | None:
    if key not in _FEDERATION:
        return key, value, "unknown key; known keys are " + ", ".join(_FEDERATION)
    kind, allowed = _FEDERATION[key]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        return key, value, f"must be {allowed}"
    smallest = 1 if key in _AT_LEAST_ONE else 0
    if isinstance(value, int | float) and not isinstance(value, bool) and value < smallest:
        return key, value, f"must be {allowed}"
    return None


def _cpu_count() -> int:
    """Return the number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _read_toml(path: Path, what: str) -> dict[str, Any]:
    try:
        with expand(path, what).open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise SettingsError((what, str(path), f"cannot be read: {error.strerror or error}")) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError((what, str(path), f"is not TOML: {error}")) from None


def _override(text: str) -> tuple[str, RunConfigValue]:
    """Parse ``key=value``. A value that is a string in the run-config needs no quotes."""
    key, sign, raw = text.partition("=")
    key, raw = key.strip(), raw.strip()
    if not sign or not key:
        raise SettingsError(("--set", text, "must be key=value, for example run.seed=7"))
    try:
        value = tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        value = raw
    if isinstance(value, str):
        return key, value
    if isinstance(value, list):
        return key, ",".join(str(item) for item in value)
    if key in flat_fields() and takes_text(key):
        return key, raw
    return key, value if isinstance(value, bool | int | float) else raw


def _absolute_paths(settings: Settings) -> dict[str, RunConfigValue]:
    """Return the settings that name files, with relative paths made absolute from the current directory."""
    changes: dict[str, RunConfigValue] = {"run.output": str(expand(settings.run.output, "run.output").resolve())}
    for key, value in (("data.source", settings.data.source), ("model.init", settings.model.init)):
        kind, _, path = value.partition(":")
        if kind in ("npz", "folder", "file") or (kind == "hub" and expand(path, key).is_dir()):
            changes[key] = f"{kind}:{expand(path, key).resolve()}"
    return changes
