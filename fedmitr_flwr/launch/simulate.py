"""Run the Flower app in a simulation on this machine.

The run is a ``flwr run APP --stream`` on Ray. `fedmitr simulate` adds what Flower lacks: it checks the settings before
the start, combines a settings file with single keys, reads relative paths from the user's directory, leaves no process
running, and exits with 0 only if the run completed.
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
# Lines of Flower and Ray that do not concern this run, or advise what `fedmitr simulate` has already done.
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
# Failures whose message explains them, so that no traceback is shown.
_EXPLAINED = ("The run failed. SettingsError", "The run failed. QuorumError")


@dataclass(frozen=True)
class RunOutcome:
    """The end of a run.

    Attributes
    ----------
    exit_code
        0 if the run completed, 1 if it failed, 128 + the number of the signal that interrupted it (130 for Ctrl-C).
    error
        The reason of a failure, from us or from the ServerApp; empty for a completed run.
    directory
        Absolute path of the run's directory; None if the run failed before it was made.
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
        All settings of the run. Paths must be absolute (see `settings_files.run_settings`).
    federation
        Flower's simulation config, see `settings_files.federation_config`.
    echo
        Called with each line of the run's log.
    verbose
        Show the messages of Flower and Ray that are otherwise left out.
    quiet
        Show no log; if the run fails, show its last lines.
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
    """Run the app; return the reason of its failure, or an empty string."""
    run_config, federation_config = flower.home / "run.toml", flower.home / "federation.toml"
    run_config.write_text(to_toml(settings.run_config()), "utf-8")
    federation_config.write_text(federation_toml(federation), "utf-8")
    command = ["run", str(stage_app(app, flower.home / "app")), "--stream"]
    command += ["--run-config", str(run_config), "--federation-config", str(federation_config)]
    for _ in range(3):
        flower.environment[FEDERATION_VARIABLE] = json.dumps(dict(federation))
        code, run_id = _follow(flower, command, log)
        if run_id is not None or not log.holds(_NO_SUPERLINK):
            break
        # The SuperLink did not start in the 15 seconds that Flower allows, or its port was taken. Try other ports.
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
    """Show the output of ``flwr run`` until it ends; return its exit code and the id of the run, or None."""
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
    """Ask Flower for the status of a run, such as ``finished:completed``, and for details.

    The exit code of ``flwr run`` does not tell: it is 0 even if the run crashed (Flower 1.41 and 1.42).
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
    """Wait for the ServerApp if it is still running after its log has ended.

    In a simulation the SuperLink only passes the log on. Clients and ServerApp continue without it.
    """
    told = False
    while status.read()[0] == "running" and flower.server_apps():
        if not told:
            log.line("The SuperLink is gone; the run continues without it and writes its log to log.txt only")
            told = True
        time.sleep(0.5)


def _why_unfinished(status: str, details: str) -> str:
    """Return the reason of a failure that the ServerApp did not report, from Flower's status and details."""
    if status == "finished:completed":
        # Flower reports a run as completed if its ServerApp ends early, or if all clients fail.
        return "the ServerApp ended before the run was completed"
    told = details.removeprefix("Simulation failed with exception: ")
    return f"Flower reports the status {status}" if told in ("", "N/A") else told


class _StatusFile:
    """The run's ``status.json``. A file that an earlier run of the same name left is ignored."""

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
        """Write how the run ended, if the ServerApp did not."""
        if self.read()[0] == "running":
            with contextlib.suppress(OSError, ValueError):
                write_json(self._path, {**json.loads(self._path.read_text("utf-8")), "state": state, "error": error})

    def read(self) -> tuple[str, str]:
        """Return the state and the error that the ServerApp wrote; empty strings if it wrote none."""
        if not self.is_new():
            return "", ""
        try:
            status = json.loads(self._path.read_text("utf-8"))
            return str(status.get("state", "")), str(status.get("error") or "")
        except (OSError, ValueError, AttributeError):
            return "", ""


class _Log:
    """The run's log: shows its lines without noise, and keeps the last ones."""

    def __init__(self, echo: Echo, *, verbose: bool, quiet: bool) -> None:
        self._echo, self._verbose, self._quiet = echo, verbose, quiet
        self._lines: deque[str] = deque(maxlen=40)
        self._explained = self._over = False

    def line(self, line: str) -> None:
        plain = _COLOURS.sub("", line)
        noise = any(noise in plain for noise in _NOISE) or not plain.strip() or _EMPTY_LOG_LINE.match(plain)
        # After a message that explains the failure, leave out the traceback that Flower adds.
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
        """Join the last lines, without the box that Flower draws around its errors."""
        text = " ".join(_COLOURS.sub("", line).strip("│╭╰╮╯─ ").removesuffix("Error") for line in self._lines)
        return " ".join(text.split())[-400:]

    def repeat(self) -> None:
        for line in self._lines:
            self._echo(line)
