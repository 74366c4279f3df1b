"""Run the whole pipeline on existing state dicts, without Flower.

    python examples/pipeline_on_state_dicts.py

Here, two clients are trained first, each on half of the ten digits. Your own state dicts can come from anywhere, for
example from files.
"""

import logging

import numpy as np
import torch

import fedmitr_flwr as fm

CPU = torch.device("cpu")


def main() -> None:
    """Train two clients, combine their models and print the accuracies."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    settings = fm.Settings.from_run_config(
        {
            "data.source": "digits",
            "model.options": "patch_size=2,embed_dim=32,depth=2,num_heads=2",
            "model.init": "seeded",
            "train.min-steps": 200,
            "inversion.images": 40,
            "inversion.iterations": 30,
            "distill.steps": 200,
            "distill.noise": 10.0,
        }
    )
    source = fm.load_source(settings.data)
    initial = fm.initial_state(settings, source.spec)

    uploads = []
    for digits in (range(5), range(5, 10)):
        own = source.train.subset(np.flatnonzero(np.isin(source.train.labels, list(digits))))
        model = fm.build_model(settings.model, source.spec)
        model.load_state_dict(initial)
        result = fm.train_local(model, own, source.spec, settings.train, seed=0, device=CPU)
        uploads.append(fm.Upload(model.state_dict(), result.num_examples, histogram=None))

    result = fm.run_pipeline(fm.PipelineInputs(settings, source.spec, uploads, initial, seed=1))
    for name, rate in fm.evaluate(result, source.test, source.spec, settings.model, CPU).accuracy().items():
        print(f"{name:<12}{rate:.3f}")


if __name__ == "__main__":
    main()
