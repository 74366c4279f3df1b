"""Your own ServerApp with the FedMITR strategy and the clients of fedmitr-flwr.

    flwr run examples/own-flower-app --stream --run-config "output='/tmp/own'"

In your own ServerApp you set the settings in code, add steps before and after the exchange, and choose where the model
is saved.
"""

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

import fedmitr_flwr as fm

app = ServerApp()

SETTINGS = {
    "data.source": "digits",
    "model.options": "patch_size=2,embed_dim=32,depth=2,num_heads=2",
    "model.init": "seeded",
    "train.min-steps": 30,
    "inversion.images": 20,
    "inversion.iterations": 8,
    "inversion.stops": "2,4",
    "inversion.fractions": "0.3,0.3",
    "distill.steps": 10,
}


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run one exchange and save the model."""
    settings = fm.Settings.from_run_config(SETTINGS)
    source = fm.load_source(settings.data)
    device = fm.choose_device(settings.run.device)
    with fm.console_log(), fm.RunDirectory.create(str(context.run_config["output"]), "own") as run:
        strategy = fm.FedMITR(settings, source.spec, run, device=device, observer=fm.Observer())
        strategy.start(grid, fm.encode_state(fm.initial_state(settings, source.spec)), num_rounds=1)
        assert strategy.outcome is not None
        state = strategy.outcome.result.state
        fm.save_timm(state, settings.model, source.spec, run.path / "model", {"made-by": "own-flower-app"})
        print(Path(run.path))
