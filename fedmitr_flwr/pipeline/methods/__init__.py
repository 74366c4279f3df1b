"""Other ways from the same uploads to one global model, chosen by `run.method`.

Each is one file with a function of `PipelineInputs`, as `run_pipeline` is, and takes the same settings: whatever a
baseline shares with FedMITR (weighting, start, augmentation, random images, steps) is set by the same keys, so that a
comparison can be made with the same extras.
"""

from __future__ import annotations

from typing import get_args

from fedmitr_flwr.pipeline.inputs import Pipeline
from fedmitr_flwr.pipeline.methods.co_boosting import co_boosting
from fedmitr_flwr.pipeline.methods.common import FedMITRWith
from fedmitr_flwr.pipeline.methods.dense import dense
from fedmitr_flwr.pipeline.methods.dense_inversion import dense_inversion, dense_inversion_kl
from fedmitr_flwr.pipeline.methods.fedavg import one_shot_fedavg
from fedmitr_flwr.pipeline.methods.fedmitr import run_pipeline
from fedmitr_flwr.pipeline.methods.hard_labels import hard_labels
from fedmitr_flwr.pipeline.methods.head_aggregation import head_aggregation
from fedmitr_flwr.pipeline.methods.random_images import ensemble_on_random_images
from fedmitr_flwr.settings import Method, Settings

METHODS: dict[Method, Pipeline] = {
    "fedmitr": run_pipeline,
    "fedavg": one_shot_fedavg,
    "head-aggregation": head_aggregation,
    "dense-inversion": dense_inversion,
    "dense-inversion-kl": dense_inversion_kl,
    "hard-labels": hard_labels,
    "random-images": ensemble_on_random_images,
    "dense": dense,
    "co-boosting": co_boosting,
}
assert tuple(METHODS) == get_args(Method)

UNTRAINED: frozenset[Method] = frozenset({"fedavg", "head-aggregation"})
"""Methods that only average, and distil nothing."""

GENERATED: frozenset[Method] = frozenset({"dense", "co-boosting"})
"""Methods that train a generator and the student in turn."""


def effective_settings(settings: Settings) -> Settings:
    """Return the settings as `run.method` reads them: a baseline that is FedMITR under other settings fixes some."""
    method = METHODS[settings.run.method]
    return settings.replace(**method.changes) if isinstance(method, FedMITRWith) else settings
