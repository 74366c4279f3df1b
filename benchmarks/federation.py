"""Train the clients of a partition once, without Flower, and keep their uploads on disk.

Benchmarks compare methods and settings on exactly the same uploads. The cache key is computed from the settings of the
client's stages, the common initialisation, the number of clients, the training code, the version of PyTorch and the
number of threads.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from fedmitr_flwr.data import ImageSpec, Source, load_source, partition_indices
from fedmitr_flwr.models import build, moments, vit, weights
from fedmitr_flwr.models.build import build_model
from fedmitr_flwr.models.feature_prior import FeaturePrior
from fedmitr_flwr.models.moments import Moments
from fedmitr_flwr.pipeline.inputs import PipelineInputs, Upload
from fedmitr_flwr.runs.observer import Observer
from fedmitr_flwr.runs.tensors import checksum, write_tensors
from fedmitr_flwr.settings import Settings
from fedmitr_flwr.stages import feature_prior as feature_prior_code
from fedmitr_flwr.stages.feature_prior import feature_prior
from fedmitr_flwr.training import augment, head_start, local, optimizer
from fedmitr_flwr.training.client import train_model
from fedmitr_flwr.training.initial import initial_state

CLIENT_STAGES = ("data", "partition", "model", "train")


@dataclass(frozen=True)
class Federation:
    """The uploads of all clients that have data, the data source and the common initialisation."""

    source: Source
    initial: dict[str, torch.Tensor]
    clients: list[Upload]

    @property
    def spec(self) -> ImageSpec:
        return self.source.spec

    def inputs(
        self,
        settings: Settings,
        *,
        seed: int | None = None,
        device: torch.device | None = None,
        observer: Observer | None = None,
    ) -> PipelineInputs:
        """Return the inputs of a pipeline; defaults are the seed `run.seed`, the CPU and no listeners."""
        seed = settings.run.seed if seed is None else seed
        device = device or torch.device("cpu")
        return PipelineInputs(settings, self.spec, self.clients, self.initial, seed, device, observer or Observer())


def train_federation(settings: Settings, num_clients: int, cache: Path, limit: int = 0) -> Federation:
    """Train every client as the ClientApp does, or read its upload from the cache.

    With `train.share-moments`, the moments of a client are in the file ``NUMBER.moments.safetensors``. With `limit`
    above 0, only so many training images are used, drawn at random by a fixed seed.
    """
    source = load_source(settings.data)
    if 0 < limit < len(source.train):
        chosen = np.random.default_rng(0).permutation(len(source.train))[:limit]
        source = replace(source, train=source.train.subset(np.sort(chosen)))
    initial = initial_state(settings, source.spec)
    folder = cache / _digest(settings, initial, num_clients, limit)
    folder.mkdir(parents=True, exist_ok=True)
    clients = []
    prior: FeaturePrior | None = None
    for number, rows in enumerate(partition_indices(source.train, settings.partition, num_clients)):
        if len(rows) == 0:
            continue
        path, beside = folder / f"{number}.safetensors", folder / f"{number}.moments.safetensors"
        if not path.is_file():
            model = build_model(settings.model, source.spec)
            model.load_state_dict(initial)
            images = source.train.subset(rows)
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            seed = settings.run.seed + number
            if settings.train.head_start == "discriminant" and prior is None:
                prior = feature_prior(settings, source.spec, initial, device)
            result, found = train_model(
                model, images, source.spec, settings.train, prior=prior, seed=seed, device=device
            )
            if found is not None:
                write_tensors(beside, found.tensors())
            about = {"num_examples": str(result.num_examples), "histogram": json.dumps(result.histogram)}
            write_tensors(path, model.state_dict(), about)
        with safe_open(path, "pt") as file:
            about = file.metadata()
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        shared = Moments(**load_file(beside)) if settings.train.share_moments else None
        histogram = tuple(json.loads(about["histogram"]))
        clients.append(Upload(state, int(about["num_examples"]), histogram, moments=shared))
    return Federation(source, initial, clients)


def _digest(settings: Settings, initial: Mapping[str, torch.Tensor], num_clients: int, limit: int) -> str:
    starts = (feature_prior_code, head_start, moments) if settings.train.head_start == "discriminant" else ()
    shares = (moments,) if settings.train.share_moments and not starts else ()
    modules = (augment, build, local, optimizer, vit, weights, *starts, *shares)
    code = [Path(str(module.__file__)).read_text() for module in modules]
    seen = {key: value for key, value in settings.flat().items() if key.split(".")[0] in CLIENT_STAGES}
    machine = [torch.__version__, torch.get_num_threads()]
    machine += [limit] if limit else []
    recipe = json.dumps([seen, settings.run.seed, checksum(initial), num_clients, code, machine], sort_keys=True)
    return hashlib.sha256(recipe.encode()).hexdigest()[:16]
