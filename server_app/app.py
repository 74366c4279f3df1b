"""The ServerApp: settings, strategy, evaluation, results."""

from __future__ import annotations

import logging

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.superlink.grid import InMemoryGrid

from fedmitr_flwr.listeners import JsonLines, Keeper, boards
from fedmitr_flwr.models import initial_state
from fedmitr_flwr.observe import Observer
from fedmitr_flwr.quorum import wait_for_nodes
from fedmitr_flwr.rundir import CONFIG, EVENTS, RunDirectory, console_log, failures_logged
from fedmitr_flwr.server import Federation, describe_run, prepare, write_results
from fedmitr_flwr.settings import Settings
from fedmitr_flwr.strategy import FedMITR
from fedmitr_flwr.wire import encode_state

log = logging.getLogger("fedmitr.run")

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run FedMITR from settings to results; any error fails the run."""
    with console_log():
        with failures_logged():
            settings = Settings.from_run_config(context.run_config)
            federation = prepare(settings, _simulated_clients(grid, settings))
            run = RunDirectory.create(settings.run.output, settings.run.name)
        with run, run.logging(), failures_logged():
            _run(grid, settings, federation, run)
        log.info("Results: %s", run.path)


def _run(grid: Grid, settings: Settings, federation: Federation, run: RunDirectory) -> None:
    run.write_json(CONFIG, describe_run(settings, federation))
    keeper = Keeper()
    observer = Observer(JsonLines(run.path / EVENTS), keeper, *boards(settings.run, run.path))
    strategy = FedMITR(settings, federation.spec, run, device=federation.device, observer=observer)
    strategy.start(
        grid,
        encode_state(initial_state(settings, federation.spec)),
        num_rounds=settings.run.rounds,
        timeout=settings.run.deadline_seconds,
    )
    assert strategy.outcome is not None  # a round that yields nothing raises
    observer.seconds.update(strategy.seconds)
    write_results(run, settings, federation, strategy.outcome.result, strategy.outcome.clients, observer, keeper)
    observer.close()


def _simulated_clients(grid: Grid, settings: Settings) -> int | None:
    """Count the clients that will share out the source's images; None when sites bring their own."""
    if not isinstance(grid, InMemoryGrid):
        return None
    return len(wait_for_nodes(grid.get_node_ids, settings.run))
