"""The methods that `run.method` can name: FedMITR and its baselines. Each makes one global model from the uploads.

A method is one module that defines a `common.Method`, and one line in `METHODS`. All methods read the same settings:
what a baseline shares with FedMITR (weighting, start, augmentation, random images, steps) has the same keys, so all
methods can be compared with the same extras.
"""

from __future__ import annotations

from fedmitr_flwr.pipeline.methods.closed_form import LDA, RIDGE
from fedmitr_flwr.pipeline.methods.co_boosting import CO_BOOSTING
from fedmitr_flwr.pipeline.methods.common import Method
from fedmitr_flwr.pipeline.methods.dense import DENSE
from fedmitr_flwr.pipeline.methods.dense_inversion import DENSE_INVERSION, DENSE_INVERSION_KL
from fedmitr_flwr.pipeline.methods.fedavg import FEDAVG
from fedmitr_flwr.pipeline.methods.fedmitr import FEDMITR
from fedmitr_flwr.pipeline.methods.hard_labels import HARD_LABELS
from fedmitr_flwr.pipeline.methods.merging import ACE_MERGING, HEAD_AGGREGATION, TASK_ARITHMETIC, WUDI_MERGING
from fedmitr_flwr.pipeline.methods.random_images import RANDOM_IMAGES
from fedmitr_flwr.settings import Settings

METHODS: dict[str, Method] = {
    "fedmitr": FEDMITR,
    "fedavg": FEDAVG,
    "head-aggregation": HEAD_AGGREGATION,
    "task-arithmetic": TASK_ARITHMETIC,
    "ace-merging": ACE_MERGING,
    "wudi-merging": WUDI_MERGING,
    "lda": LDA,
    "ridge": RIDGE,
    "dense-inversion": DENSE_INVERSION,
    "dense-inversion-kl": DENSE_INVERSION_KL,
    "hard-labels": HARD_LABELS,
    "random-images": RANDOM_IMAGES,
    "dense": DENSE,
    "co-boosting": CO_BOOSTING,
}
"""Methods by their name in `run.method`, in the order of `settings.choices.MethodName`."""


def method_of(settings: Settings) -> Method:
    """Return the method that `run.method` names."""
    return METHODS[settings.run.method]
