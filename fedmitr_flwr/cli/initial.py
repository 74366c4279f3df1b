"""The command ``fedmitr initial``: make the common initialisation of a run in advance."""

from __future__ import annotations

import typer

from fedmitr_flwr.cli.common import AppOption, ConfArgument, SetOption, bad_input
from fedmitr_flwr.launch import settings_files


def initial(conf: ConfArgument = None, overrides: SetOption = None, app_dir: AppOption = None) -> None:
    """Make the common initialisation of a run in advance.

    With `model.init = glyphs` the command renders letters, trains on them once for each model and image size, and
    prints the path of the cached weights. Pretrained weights are downloaded. A run makes its initialisation itself if
    it is missing.
    Exit code: 0 made, 2 invalid input.
    """
    with bad_input():
        run = settings_files.run_settings(settings_files.app_directory(app_dir), conf, overrides or [])
        # Import PyTorch here, because it takes seconds and most commands do not need it.
        from fedmitr_flwr.data import load_spec
        from fedmitr_flwr.runs.log import console_log
        from fedmitr_flwr.training.glyphs import cache_path
        from fedmitr_flwr.training.initial import initial_state

        with console_log():
            spec = load_spec(run.data)
            state = initial_state(run, spec)
    count = sum(value.numel() for value in state.values())
    typer.echo(f"{run.model.init}: {len(state)} tensors, {count:,} numbers", err=True)
    if run.model.init == "glyphs":
        typer.echo(cache_path(run, spec))
