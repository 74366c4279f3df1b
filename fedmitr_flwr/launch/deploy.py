"""``fedmitr run``: start a run in a deployed federation and follow it to its end.

The run is a plain ``flwr run APP SUPERLINK``, of a copy of the app without unneeded files. `fedmitr run` adds what
Flower lacks: it checks the settings before it sends them, combines a settings file with single keys, shows the log
again after a restart of the SuperLink, and exits with the result of the run.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fedmitr_flwr.launch.app_copy import stage_app
from fedmitr_flwr.launch.private_flower import bin_dir
from fedmitr_flwr.settings import Settings, SettingsError
from fedmitr_flwr.settings.docs import to_toml

_STARTED = re.compile(r"Successfully started run (\d+)")
_NOISE = ("Starting logstream for run_id", "Listing all runs")
_NO_CONNECTION = "not found in the Flower configuration"
_FRAME = re.compile(r"[\u2500-\u257f]+( Error )?")  # Flower draws a box around its errors
# A command imports Flower, packs the app and waits for the SuperLink. On a busy machine this is slow.
_ANSWER_SECONDS = 300.0
_PAUSE_SECONDS = 2.0


@dataclass
class Deployment:
    """A SuperLink that Flower's command line can reach.

    Attributes
    ----------
    superlink
        Name of the connection in Flower's ``config.toml``.
    echo
        Called with each line of a run's log.
    patience
        Seconds to wait for a SuperLink that stops answering after the run has started.
    """

    superlink: str
    echo: Callable[[str], object]
    patience: float = 600.0

    def run(self, app: Path, settings: Settings) -> str:
        """Start a run and wait for its end; return the reason of its failure, or an empty string.

        Raises
        ------
        SettingsError
            If Flower's configuration has no connection of this name.
        """
        with tempfile.TemporaryDirectory(prefix="fedmitr-") as folder:
            file = Path(folder) / "run.toml"
            file.write_text(to_toml(settings.run_config()), "utf-8")
            lean = stage_app(app, Path(folder) / "app")
            output = self._ask("run", str(lean), self.superlink, "--run-config", str(file))
        found = _STARTED.search(output)
        if found is None:
            said = _in_a_line(output)
            if _NO_CONNECTION in said:
                allowed = f"is no SuperLink connection: {said}; docs/deployment.md says how to write one"
                raise SettingsError(("SUPERLINK", self.superlink, allowed))
            return f"the run was not started: {said or 'no answer'}"
        run_id = found.group(1)
        self.echo(f"Run {run_id}; to end it: flwr stop {run_id} {self.superlink}")
        status, details = self.follow(run_id)
        if status == "finished:completed":
            return ""
        return f"run {run_id} is {status}: {details}" if details not in ("", "N/A") else f"run {run_id} is {status}"

    def follow(self, run_id: str) -> tuple[str, str]:
        """Show a run's log until the run has ended; return its status and Flower's details."""
        shown, silent_since = 0, None
        while True:
            shown = self._log(run_id, shown)
            answer = self._status(run_id)
            if answer is None:
                silent_since = silent_since or time.monotonic()
                if time.monotonic() - silent_since > self.patience:
                    return "unknown", f"the SuperLink has not answered for {self.patience:g} seconds"
            elif answer[0].startswith("finished"):
                self._log(run_id, shown)  # the lines since the last look
                return answer
            else:
                silent_since = None
            time.sleep(_PAUSE_SECONDS)

    def _log(self, run_id: str, skip: int) -> int:
        """Show the log after its first `skip` lines, because Flower sends it from its start; return its length."""
        count = 0
        with self._start("log", run_id, self.superlink, "--stream") as process:
            assert process.stdout is not None
            for line in process.stdout:
                if any(noise in line for noise in _NOISE) or line.startswith(("Error", "╭", "│", "╰")):
                    continue
                count += 1
                if count > skip:
                    self.echo(line.rstrip("\n"))
        return max(count, skip)

    def _status(self, run_id: str) -> tuple[str, str] | None:
        """Ask for a run's status, such as ``finished:completed``, and details; return None without an answer."""
        answer = self._ask("ls", self.superlink, "--run-id", run_id, "--format", "json")
        try:
            entry = json.loads(answer)["runs"][0]
            return str(entry["status"]), str(entry["status-details"])
        except (ValueError, LookupError, TypeError):
            return None

    def _ask(self, *arguments: str) -> str:
        """Run a short ``flwr`` command and return its output; empty if it does not end in time."""
        with self._start(*arguments) as process:
            try:
                return process.communicate(timeout=_ANSWER_SECONDS)[0]
            except subprocess.TimeoutExpired:
                process.kill()
                return ""

    def _start(self, *arguments: str) -> subprocess.Popen[str]:
        quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "PYTHONUNBUFFERED": "1"}
        return subprocess.Popen(
            [str(bin_dir() / "flwr"), *arguments],
            env={**quiet, **os.environ},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
        )


def _in_a_line(output: str) -> str:
    """Return the output of ``flwr`` in one line, without its box and its notice of a new configuration file."""
    lines = [line for line in output.splitlines() if not line.startswith("Flower configuration not found")]
    return " ".join(_FRAME.sub(" ", " ".join(lines)).split())
