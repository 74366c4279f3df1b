"""The task that the server sends to a client, and the upload that the client returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from fedmitr_flwr.data import ImageSpec
from fedmitr_flwr.models.feature_prior import FeaturePrior
from fedmitr_flwr.models.moments import Moments
from fedmitr_flwr.settings import Settings


@dataclass(frozen=True)
class ClientTask:
    """A request to train.

    Attributes
    ----------
    settings
        The server's settings, which replace the client's own run-config.
    spec
        The server's specification of classes, image size and normalisation.
    round_number
        Number of the round, counted from 1.
    initial
        State dict from which training starts, fp32.
    prior
        Features of `initial` on random images, for `train.head-start = discriminant`; None: the head starts from
        `initial`.
    """

    settings: Settings
    spec: ImageSpec
    round_number: int
    initial: Mapping[str, Tensor]
    prior: FeaturePrior | None = None


@dataclass(frozen=True)
class ClientUpload:
    """A client's upload, before it is encoded as Flower records.

    Attributes
    ----------
    state
        The tensors that are uploaded, fp32 on the CPU: the state dict of the trained model, or the part of it that
        `train.trainable` names, with adapters in place of adapted weights (`models.trainable.TrainedPart.uploaded`).
    num_examples
        Number of local training images.
    histogram
        Number of these images in each of the C classes; None if the client does not share it.
    loss, accuracy
        Training loss in nats and accuracy in 0..1: means over the last epoch.
    numbers
        The numbers of `reported.REPORTED`, by name; empty until they are computed.
    moments
        Moments of the features of these images under the weights from which training started; None unless
        `train.share-moments` is set.
    """

    state: Mapping[str, Tensor]
    num_examples: int
    histogram: tuple[int, ...] | None
    loss: float
    accuracy: float
    numbers: Mapping[str, float] = field(default_factory=dict)
    moments: Moments | None = None
