"""The ServerApp: reads the settings, runs the strategy, evaluates the model and writes the results."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.superlink.grid import InMemoryGrid

from fedmitr_flwr.federation.exchange.windowed_grid import WindowedGrid
from fedmitr_flwr.federation.plan import check_disk, within_memory
from fedmitr_flwr.federation.prepare import Federation, describe_run, prepare
from fedmitr_flwr.federation.quorum import wait_for_nodes
from fedmitr_flwr.federation.stopping import stopped_with_flower
from fedmitr_flwr.federation.strategy import FedMITR
from fedmitr_flwr.federation.uploads.records import encode_state
from fedmitr_flwr.federation.workers import close_pool, end_busy_actors, replace_dead_actors
from fedmitr_flwr.pipeline.methods import method_of
from fedmitr_flwr.results.write import write_results
from fedmitr_flwr.runs.directory import CONFIG, EVENTS, INITIAL, RunDirectory
from fedmitr_flwr.runs.jsonl import JsonLines
from fedmitr_flwr.runs.log import console_log, failures_logged
from fedmitr_flwr.runs.observer import Observer
from fedmitr_flwr.runs.resume import (
    changes_in,
    is_complete,
    resumed_recipe,
    resumed_settings,
    simulation_config,
    with_checksum,
)
from fedmitr_flwr.runs.snapshots import Keeper
from fedmitr_flwr.runs.tensorboard import boards
from fedmitr_flwr.settings import Settings
from fedmitr_flwr.settings.home import expand
from fedmitr_flwr.training.initial import initial_or_stored, initial_state

log = logging.getLogger("fedmitr.run")

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run FedMITR from settings to results. Any error fails the run."""
    with console_log():
        with failures_logged():
            settings = Settings.from_run_config(context.run_config)
            recipe = settings.applied_recipe()
            resumed = expand(settings.run.resume, "run.resume").absolute() if settings.run.resume else None
            if resumed is not None:
                if is_complete(resumed):
                    log.info("Complete already: %s", resumed)
                    return
                settings = resumed_settings(resumed, changes_in(settings, resumed))
                recipe = resumed_recipe(resumed, settings)
            clients = _simulated_clients(grid, settings)
            federation = prepare(settings, clients)
            number = clients or max(settings.run.min_clients, len(list(grid.get_node_ids())))
            resolved = method_of(settings).resolve(settings)
            check_disk(resolved, federation.spec, number)
            planned = within_memory(resolved, federation.spec, number, federation.device)
            run = (
                RunDirectory.resume(resumed) if resumed else RunDirectory.create(settings.run.output, settings.run.name)
            )
        with stopped_with_flower(), run, run.logging(), failures_logged(), _workers(grid):
            # The console has this line already: the source is loaded before the run has a log file.
            log.debug("%s", federation.found)
            log.info("%s%s", recipe, " (as when this run started)" if resumed else "")
            about = describe_run(settings, federation, recipe)
            run.write_json(CONFIG, with_checksum({**about, "federation": simulation_config(clients)}))
            _run(grid, resolved, planned, federation, run)
        log.info("Results: %s", run.path)


@contextmanager
def _workers(grid: Grid) -> Iterator[None]:
    """Replace dead workers of a simulation inside the block, and end all workers after it (see `workers`)."""
    if not isinstance(grid, InMemoryGrid):
        yield
        return
    replace_dead_actors()
    try:
        yield
    finally:
        close_pool()


def _run(grid: Grid, settings: Settings, planned: Settings, federation: Federation, run: RunDirectory) -> None:
    """Run the resolved settings under the memory limits that were planned, and write the results."""
    initial = initial_or_stored(run.path / INITIAL, lambda: initial_state(settings, federation.spec))
    keeper = Keeper()
    observer = Observer(JsonLines(run.path / EVENTS), keeper, *boards(settings.run, run.path))
    strategy = FedMITR(
        planned,
        federation.spec,
        run,
        device=federation.device,
        observer=observer,
        pipeline=method_of(settings),
    )
    simulated = isinstance(grid, InMemoryGrid)
    strategy.start(
        WindowedGrid(grid, settings.run, end_busy_actors if simulated else None),
        encode_state(initial),
        num_rounds=settings.run.rounds,
    )
    assert strategy.outcome is not None  # a round that yields nothing raises
    observer.seconds.update(strategy.seconds)
    outcome = strategy.outcome
    write_results(
        run, settings, federation, outcome.result, outcome.clients, observer, keeper, upload_mb=outcome.upload_mb
    )
    observer.close()
    run.drop_checkpoints()


def _simulated_clients(grid: Grid, settings: Settings) -> int | None:
    """Return the number of simulated clients, or None in a deployment, where each site has its own images."""
    if not isinstance(grid, InMemoryGrid):
        return None
    return len(wait_for_nodes(grid.get_node_ids, settings.run))
