"""Run the Flower app in a simulation, the way a user expects it to behave.

The run is a real ``flwr run APP --stream`` on Ray. Taken away are Flower's surprises: settings are checked
before anything starts, a file and single keys can be combined, paths count from the user's directory, no
process stays behind, and the exit code is 0 only when the run completed.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fedmitr_flwr.launch.app_copy import stage_app
from fedmitr_flwr.launch.private_flower import PrivateFlower
from fedmitr_flwr.launch.settings_files import FederationValue, federation_toml
from fedmitr_flwr.launch.signals import Interrupted, Signals
from fedmitr_flwr.runs.atomic import write_json
from fedmitr_flwr.runs.directory import STATUS, fresh_name
from fedmitr_flwr.runs.resume import FEDERATION_VARIABLE
from fedmitr_flwr.settings import Settings
from fedmitr_flwr.settings.docs import to_toml

Echo = Callable[[str], None]

_STARTED = re.compile(r"Successfully started run (\d+)")
_NO_SUPERLINK = "Failed to start local SuperLink"
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_EMPTY_LOG_LINE = re.compile(r"^\s*(INFO|WARNING)\s*:\s*$")
# Lines of Flower and Ray that say nothing about this run, or advise what `fedmitr simulate` has done already.
_NOISE = (
    "Flower configuration not found. Created default",
    "Since flwr 1.32, default simulated SuperNodes",
    "To change federation size, use the following",
    "flwr federation simulation-config",
    "Starting logstream for run_id",
    "Manually terminating ClientAppActor",
    "FutureWarning: Tip: In future versions of Ray",
    "  warnings.warn(",
)
# Failures that are no defects: their message says all.
_EXPLAINED = ("The run failed. SettingsError", "The run failed. QuorumError")


@dataclass(frozen=True)
class RunOutcome:
    """How a run ended.

    Attributes
    ----------
    exit_code
        0 completed, 1 failed, 128 + number of the signal that interrupted it (130 for Ctrl-C).
    error
        Why it isn't 0, in a sentence or the ServerApp's own words; empty for a completed run.
    directory
        The run's results, absolute; None when the run never got as far as making it.
    """

    exit_code: int
    error: str
    directory: Path | None


def simulate(
    app: Path,
    settings: Settings,
    federation: Mapping[str, FederationValue],
    *,
    echo: Echo,
    verbose: bool = False,
    quiet: bool = False,
) -> RunOutcome:
    """Run a Flower app in a simulation and wait for its end.

    Parameters
    ----------
    app
        Folder with the app's ``pyproject.toml``.
    settings
        All settings of the run. Relative paths must be absolute already (see `settings_files.run_settings`).
    federation
        Kebab-case keys of Flower's simulation config, see `settings_files.federation_config`.
    echo
        Gets each line of the run's log.
    verbose
        Pass on Flower's and Ray's own messages that are left out otherwise.
    quiet
        Pass on nothing, unless the run fails: then the last lines.
    """
    settings = settings if settings.run.name else settings.replace(**{"run.name": fresh_name()})
    directory = Path(settings.run.output) / settings.run.name
    status = _StatusFile(directory / STATUS)
    log = _Log(echo, verbose=verbose, quiet=quiet)
    with Signals() as signals, PrivateFlower() as flower:
        try:
            with signals.raised():
                error = _run(flower, app, settings, federation, log, status)
            code = 1 if error else 0
        except Interrupted as interruption:
            flower.kill_server_app()
            error, code = f"the run was interrupted by {interruption}", 128 + interruption.number
        except OSError as problem:
            error, code = str(problem), 1
    if error:
        status.close("interrupted" if code > 128 else "failed", error)
    if error and quiet:
        log.repeat()
    return RunOutcome(code, error, directory if status.is_new() else None)


def _run(
    flower: PrivateFlower,
    app: Path,
    settings: Settings,
    federation: Mapping[str, FederationValue],
    log: _Log,
    status: _StatusFile,
) -> str:
    """Run the app; return why it failed, or an empty string."""
    run_config, federation_config = flower.home / "run.toml", flower.home / "federation.toml"
    run_config.write_text(to_toml(settings.flat()), "utf-8")
    federation_config.write_text(federation_toml(federation), "utf-8")
    command = ["run", str(stage_app(app, flower.home / "app")), "--stream"]
    command += ["--run-config", str(run_config), "--federation-config", str(federation_config)]
    for _ in range(3):
        flower.environment[FEDERATION_VARIABLE] = json.dumps(dict(federation))
        code, run_id = _follow(flower, command, log)
        if run_id is not None or not log.holds(_NO_SUPERLINK):
            break
        # Flower gives its SuperLink 15 seconds to start, too little on a busy machine; or the port was taken.
        flower.end_processes()
        flower.renew()
    if run_id is None:
        return f"Flower did not start the run (flwr run ended with code {code}): {log.last()}"
    _outlive_superlink(flower, status, log)
    state, error = status.read()
    if state in ("failed", "interrupted"):
        return error or "the ServerApp failed"
    return "" if state == "completed" else _why_unfinished(*_flower_status(flower, run_id))


def _follow(flower: PrivateFlower, command: list[str], log: _Log) -> tuple[int, str | None]:
    """Pass a ``flwr run``'s output on until it ends; return its exit code and the id of the run it started."""
    run_id = None
    process = flower.start(*command)
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            if run_id is None and (found := _STARTED.search(line)):
                run_id = found.group(1)
            log.line(line.rstrip("\n"))
    return process.wait(), run_id


def _flower_status(flower: PrivateFlower, run_id: str, patience: float = 20.0) -> tuple[str, str]:
    """Ask Flower how a run ended: its status, as ``finished:completed``, and details.

    ``flwr run`` itself returns 0 even for a run that crashed (Flower 1.41).
    """
    deadline = time.monotonic() + patience
    status, details = "unknown", "the SuperLink does not answer"
    while True:
        answer = flower.ask("ls", "--run-id", run_id, "--format", "json")
        with contextlib.suppress(ValueError, KeyError, IndexError, TypeError):
            run = json.loads(answer)["runs"][0]
            status, details = str(run["status"]), str(run["status-details"])
        if status.startswith("finished") or time.monotonic() > deadline:
            return status, details
        time.sleep(0.5)


def _outlive_superlink(flower: PrivateFlower, status: _StatusFile, log: _Log) -> None:
    """Wait for a ServerApp that is still at work although its log has ended.

    The SuperLink of a simulation passes the log on and no more: clients and ServerApp do without it.
    """
    told = False
    while status.read()[0] == "running" and flower.server_apps():
        if not told:
            log.line("The SuperLink is gone; the run goes on without it, and its log is in log.txt alone")
            told = True
        time.sleep(0.5)


def _why_unfinished(status: str, details: str) -> str:
    """Say why a run failed whose ServerApp left no word of it, from what Flower says."""
    if status == "finished:completed":
        # Flower counts a ServerApp that leaves early, or that all clients failed, as completed.
        return "the ServerApp ended before the run was completed"
    told = details.removeprefix("Simulation failed with exception: ")
    return f"Flower says {status}" if told in ("", "N/A") else told


class _StatusFile:
    """The run's ``status.json``; what an earlier run of the same name left there doesn't count."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._before = self._stamp()

    def _stamp(self) -> tuple[int, int] | None:
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns

    def is_new(self) -> bool:
        return self._stamp() not in (None, self._before)

    def close(self, state: str, error: str) -> None:
        """Say how the run ended where the ServerApp had no time to."""
        if self.read()[0] == "running":
            with contextlib.suppress(OSError, ValueError):
                write_json(self._path, {**json.loads(self._path.read_text("utf-8")), "state": state, "error": error})

    def read(self) -> tuple[str, str]:
        """State and error that the ServerApp wrote; empty strings when it wrote none."""
        if not self.is_new():
            return "", ""
        try:
            status = json.loads(self._path.read_text("utf-8"))
            return str(status.get("state", "")), str(status.get("error") or "")
        except (OSError, ValueError, AttributeError):
            return "", ""


class _Log:
    """The run's log: passed on without noise, its last lines remembered."""

    def __init__(self, echo: Echo, *, verbose: bool, quiet: bool) -> None:
        self._echo, self._verbose, self._quiet = echo, verbose, quiet
        self._lines: deque[str] = deque(maxlen=40)
        self._explained = self._over = False

    def line(self, line: str) -> None:
        plain = _COLOURS.sub("", line)
        noise = any(noise in plain for noise in _NOISE) or not plain.strip() or _EMPTY_LOG_LINE.match(plain)
        # The ServerApp has said in a sentence what the traceback that Flower adds only repeats.
        self._explained = self._explained or any(error in plain for error in _EXPLAINED)
        self._over = self._over or (self._explained and "raised an exception" in plain)
        if (noise or self._over) and not self._verbose:
            return
        self._lines.append(line)
        if not self._quiet:
            self._echo(line)

    def holds(self, text: str) -> bool:
        return any(text in line for line in self._lines)

    def last(self) -> str:
        """Join the last lines, without the frames that Flower draws around its errors."""
        text = " ".join(_COLOURS.sub("", line).strip("│╭╰╮╯─ ").removesuffix("Error") for line in self._lines)
        return " ".join(text.split())[-400:]

    def repeat(self) -> None:
        for line in self._lines:
            self._echo(line)
