"""Settings of the classifier heads that are computed from feature moments."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fedmitr_flwr.settings.run_config import Stage


class MomentsSettings(Stage):
    """Classifier heads from the moments of `train.share-moments`.

    They are those of `run.method = lda` and `ridge`; `ensemble.moments-weight` and `distill.start = moments` use the
    head of `lda`.
    """

    shrinkage: float = Field(
        0.1,
        ge=1e-6,
        le=1.0,
        description="For `lda`: fraction of the covariance within the classes that is replaced by a multiple of the "
        "identity with the same trace. Fewer images need a larger value. 1: each image gets the class with the nearest "
        "mean.",
    )
    prior: Literal["counts", "equal"] = Field(
        "counts",
        description="For `lda`: assumed share of each class among new images. `counts`: its share of all clients' "
        "images. `equal`: the same for all classes that some client has.",
    )
    ridge: float = Field(
        0.1,
        ge=1e-6,
        le=1e6,
        description="For `ridge`: strength of the regularisation, as a multiple of the mean variance of the features. "
        "Fewer images need a larger value.",
    )
