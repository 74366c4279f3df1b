"""Settings of the ensemble of teachers, and of the classifier heads that are computed from feature moments."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fedmitr_flwr.settings.choices import COMBINATIONS, WEIGHTINGS, Combination, Weighting, described
from fedmitr_flwr.settings.run_config import Stage


class EnsembleSettings(Stage):
    """The ensemble A(x), by default sum_k w_k(c) p_k(c|x) for teacher k and class c."""

    weighting: Weighting = Field(
        "competence",
        description=described("What a teacher's weight for a class is computed from.", WEIGHTINGS),
    )
    power: float = Field(
        0.5,
        ge=0.0,
        le=4.0,
        description="Exponent on the evidence before it is normalised to weights. 0: equal weights for all teachers "
        "that know the class; 1: weights proportional to the evidence.",
    )
    combine: Combination = Field(
        "probabilities",
        description=described("How the teachers' outputs become one distribution.", COMBINATIONS),
    )
    moments_weight: float = Field(
        0.1,
        ge=0.0,
        le=10.0,
        description="With `train.share-moments`: exponent s on the distribution of a further model, by which A(x) is "
        "multiplied. The model is the common initialisation with the linear discriminant of all clients' feature "
        "moments as its head; s is a factor on its logits. It counts in inversion, in all labels and in the "
        "evaluation of the ensemble. 0: off. No effect without `train.share-moments`.",
    )
    merged_weight: float = Field(
        0.0,
        ge=0.0,
        le=10.0,
        description="Exponent s on the distribution of the merged model (`run.method = head-aggregation`), by which "
        "A(x) is multiplied: a class needs the support of the teachers and of the merged model. It counts in "
        "inversion, in all labels and in the evaluation of the ensemble. 0: off. No effect if "
        "`ensemble.moments-weight` applies.",
    )
    outlier_guard: float = Field(
        0.0,
        ge=0.0,
        le=1.0,
        description="Fraction of the median agreement below which a teacher is down-weighted. Agreement is measured "
        "on inverted and random images, over the classes that a teacher and at least one other teacher know. The same "
        "fraction applies to the cosine between a teacher's weight update and those of the others; an update of more "
        "than 3 times the median length is down-weighted too. 0: off; 0.5: recommended; 1: every teacher below the "
        "median is down-weighted.",
    )


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
