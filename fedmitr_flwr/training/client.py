"""Train a client and prepare its upload, given the server's task and Flower's node config."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace

import torch
from timm.models.vision_transformer import VisionTransformer

from fedmitr_flwr.data import ImageSet, ImageSpec, client_images
from fedmitr_flwr.models.build import build_model
from fedmitr_flwr.models.feature_prior import FeaturePrior
from fedmitr_flwr.models.moments import Moments, feature_moments
from fedmitr_flwr.models.trainable import trained_part
from fedmitr_flwr.settings import RunConfigValue, TrainSettings
from fedmitr_flwr.settings.seeds import client_seed
from fedmitr_flwr.training.head_start import start_head
from fedmitr_flwr.training.local import LocalResult, train_local
from fedmitr_flwr.training.reported import REPORTED
from fedmitr_flwr.training.upload import ClientTask, ClientUpload
from fedmitr_flwr.training.upload_steps import prepare_upload


def client_name(node_config: Mapping[str, RunConfigValue], node_id: int) -> str:
    """Return the name under which a client's upload is stored: its site, its partition, or its node id."""
    for key in ("site", "partition-id"):
        if key in node_config:
            return str(node_config[key]) if key == "site" else f"partition-{node_config[key]}"
    return f"node-{node_id}"


def training_seed(node_config: Mapping[str, RunConfigValue], name: str, run_seed: int, round_number: int) -> int:
    """Return the seed of a client's training, derived from its partition or, without one, from its name.

    Global random state is not used, because Flower reuses its simulation workers for several clients.

    Parameters
    ----------
    node_config
        Flower's node config; ``partition-id`` is the number of the partition.
    name
        Name of the client, from `client_name`.
    run_seed
        Seed of the run.
    round_number
        Number of the round, counted from 1.
    """
    partition = node_config.get("partition-id")
    if not isinstance(partition, int):
        partition = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    return client_seed(run_seed, partition, round_number)


def train_client(task: ClientTask, node_config: Mapping[str, RunConfigValue], name: str) -> ClientUpload | None:
    """Train the common model on this client's images and prepare the upload.

    Parameters
    ----------
    task
        The server's task.
    node_config
        Flower's node config, with the number of a partition or the ``data-path`` of a site.
    name
        Name of the client, from `client_name`.

    Returns
    -------
    ClientUpload | None
        None if the client has no images.

    Raises
    ------
    SettingsError
        If the data or the model cannot be loaded, `train.trainable` does not fit the model, or the model has two heads
        and feature moments are needed.
    RuntimeError
        If `task.initial` does not fit the model.
    """
    images, spec = client_images(task.settings, node_config, task.spec.class_names, spec=task.spec)
    if len(images) == 0:
        return None
    model = build_model(task.settings.model, spec)
    model.load_state_dict(task.initial)
    seed = training_seed(node_config, name, task.settings.run.seed, task.round_number)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result, moments = train_model(model, images, spec, task.settings.train, prior=task.prior, seed=seed, device=device)
    state = {key: value.detach().cpu() for key, value in model.state_dict().items()}
    state = trained_part(task.settings.train, task.initial).cut(state, result.adapters)
    trained = ClientUpload(state, result.num_examples, result.histogram, result.loss, result.accuracy, moments=moments)
    upload = prepare_upload(trained, task, seed)
    return replace(upload, numbers={number.name: number.compute(upload, task) for number in REPORTED})


def train_model(
    model: VisionTransformer,
    images: ImageSet,
    spec: ImageSpec,
    settings: TrainSettings,
    *,
    prior: FeaturePrior | None,
    seed: int,
    device: torch.device,
) -> tuple[LocalResult, Moments | None]:
    """Compute the feature moments if they are needed, start the head from them if there is a prior, and train.

    Parameters
    ----------
    model
        The model with the common weights; it is trained in place.
    images, spec, settings, seed, device
        As for `local.train_local`.
    prior
        Prior of the head's start; None: the head starts from the common weights.

    Returns
    -------
    result
        Numbers of the training.
    moments
        Moments of the features under the common weights; None unless `train.share-moments` is set.

    Raises
    ------
    SettingsError
        If the moments are needed and the model has two heads.
    """
    moments = None
    if settings.share_moments or prior is not None:  # before training, while the model holds the common weights
        moments = feature_moments(model, images, spec, batch_size=settings.batch_size, device=device)
        if prior is not None:
            start_head(model, moments, prior)
    result = train_local(model, images, spec, settings, seed=seed, device=device)
    return result, moments if settings.share_moments else None
