"""Check data, model and device before a run, and describe the run for ``config.json``."""

from __future__ import annotations

import logging
import os
import platform
from dataclasses import dataclass
from importlib.metadata import version

import torch
from timm.models.vision_transformer import VisionTransformer

from fedmitr_flwr.data import ImageSet, ImageSpec, load_source, load_spec, partition_indices
from fedmitr_flwr.federation.code_digest import code_digest
from fedmitr_flwr.models.build import build_model
from fedmitr_flwr.models.lora import check_peft
from fedmitr_flwr.models.moments import check_one_head
from fedmitr_flwr.models.trainable import KEY, trained_part
from fedmitr_flwr.runs.atomic import Json
from fedmitr_flwr.settings import Settings, SettingsError
from fedmitr_flwr.settings.recipes import Recipe
from fedmitr_flwr.stages.distillation.frozen import frozen_part
from fedmitr_flwr.version import __version__

log = logging.getLogger("fedmitr.run")

_PACKAGES = ("flwr", "torch", "torchvision", "timm", "ray", "numpy", "flwr-datasets", "safetensors")


@dataclass(frozen=True)
class Federation:
    """What `prepare` finds before any client is asked.

    Attributes
    ----------
    spec
        Classes, geometry and normalisation of the images.
    held_out
        Images on which the server evaluates; None for `run.evaluate-on = none`.
    device
        Device on which the server's stages run.
    found
        What the server's data source has and what is not used, for the log; empty if the source is not loaded.
    """

    spec: ImageSpec
    held_out: ImageSet | None
    device: torch.device
    found: str = ""


def prepare(settings: Settings, num_partitions: int | None) -> Federation:
    """Check the settings against data, model and machine, before any client is asked.

    Parameters
    ----------
    settings
        Settings that are valid by themselves.
    num_partitions
        Number of simulated clients; None in a deployment, where the sites have their own data.

    Raises
    ------
    SettingsError
        If source, model, partition or device cannot be used. The message names the key, the value and what is allowed.
    """
    device = choose_device(settings.run.device)
    if settings.run.evaluate_on == "none":
        spec, held_out, found = load_spec(settings.data), None, ""
    else:
        source = load_source(settings.data)
        spec, found = source.spec, source.found
        held_out = source.test if settings.run.evaluate_on == "test" else source.validation
        if num_partitions is not None:
            partition_indices(source.train, settings.partition, num_partitions)
    model = build_model(settings.model, spec)
    if settings.train.share_moments or settings.train.head_start == "discriminant":
        check_one_head(model, settings.model.name)
    _check_trained_part(settings, model, simulated=num_partitions is not None)
    frozen_part(settings.distill.trainable, len(model.blocks))  # raises an error if there are fewer blocks
    return Federation(spec, held_out, device, found)


def _check_trained_part(settings: Settings, model: VisionTransformer, *, simulated: bool) -> None:
    """Check `train.trainable` against the model; in a simulation, also that the clients can train adapters."""
    part = trained_part(settings.train, model.state_dict())
    if part.adapted and simulated:
        check_peft()
    if not part.whole and settings.model.init == "seeded":
        log.warning(
            "%s = %s leaves random weights untrained, because model.init = seeded", KEY, settings.train.trainable
        )


def choose_device(name: str) -> torch.device:
    """Return the device that `run.device` names; ``auto`` is a GPU if there is one, otherwise the CPU.

    Raises
    ------
    SettingsError
        If this machine does not have the device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        allowed = f'this machine has {torch.cuda.device_count()} GPUs; "auto" and "cpu" are possible on every machine'
        raise SettingsError(("run.device", name, allowed))
    return device


def describe_run(settings: Settings, federation: Federation, recipe: Recipe | None = None) -> dict[str, Json]:
    """Return the content of ``config.json``: all that is needed to repeat the run.

    Parameters
    ----------
    settings, federation
        Settings of the run, and what `prepare` returned for them.
    recipe
        The recipe that was applied when the run started. None: that of the settings.
    """
    recipe = recipe or settings.applied_recipe()
    return {
        "settings": dict(settings.flat()),
        "recipe": {
            "name": recipe.name,
            "reason": recipe.reason,
            "keys": list(recipe.keys),
            "named": list(recipe.named),
        },
        "class_names": list(federation.spec.class_names),
        "seeds": {
            "run": settings.run.seed,
            "partition": settings.partition.seed,
            "split": settings.data.split_seed,
        },
        "digest": code_digest(),
        "versions": {
            "python": platform.python_version(),
            "fedmitr-flwr": __version__,
            **{package: version(package) for package in _PACKAGES},
        },
        "hardware": {
            "machine": platform.machine(),
            "system": platform.platform(),
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "memory_mb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20,
            "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
            "device": str(federation.device),
        },
    }
