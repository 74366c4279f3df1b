"""The ways from uploads to one global model, chosen by `run.method`: FedMITR and its baselines.

Each is one file that ends in a `common.Method` and one line in `METHODS`. All methods read the same settings: whatever
a baseline shares with FedMITR (weighting, start, augmentation, random images, steps) has the same keys, so that a
comparison can be made with the same extras.
"""

from __future__ import annotations

from fedmitr_flwr.pipeline.methods.co_boosting import CO_BOOSTING
from fedmitr_flwr.pipeline.methods.common import Method
from fedmitr_flwr.pipeline.methods.dense import DENSE
from fedmitr_flwr.pipeline.methods.dense_inversion import DENSE_INVERSION, DENSE_INVERSION_KL
from fedmitr_flwr.pipeline.methods.fedavg import FEDAVG
from fedmitr_flwr.pipeline.methods.fedmitr import FEDMITR
from fedmitr_flwr.pipeline.methods.hard_labels import HARD_LABELS
from fedmitr_flwr.pipeline.methods.head_aggregation import HEAD_AGGREGATION
from fedmitr_flwr.pipeline.methods.random_images import RANDOM_IMAGES
from fedmitr_flwr.settings import Settings

METHODS: dict[str, Method] = {
    "fedmitr": FEDMITR,
    "fedavg": FEDAVG,
    "head-aggregation": HEAD_AGGREGATION,
    "dense-inversion": DENSE_INVERSION,
    "dense-inversion-kl": DENSE_INVERSION_KL,
    "hard-labels": HARD_LABELS,
    "random-images": RANDOM_IMAGES,
    "dense": DENSE,
    "co-boosting": CO_BOOSTING,
}
"""By `run.method`, in the order of `settings.choices.MethodName`."""


def method_of(settings: Settings) -> Method:
    """Return the method that `run.method` names."""
    return METHODS[settings.run.method]
