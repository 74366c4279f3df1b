"""Low-rank adapters (LoRA, arXiv 2106.09685) on a timm ViT, by the `peft` library.

The library is optional and imports transformers, so it is imported only where a client trains adapters. The server
computes the adapted weights without it (`trainable.CompletedState`).
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from fedmitr_flwr.models.trainable import ADAPTED, KEY, TrainedPart, adapter_names
from fedmitr_flwr.settings import SettingsError

if TYPE_CHECKING:
    from peft import LoraModel

_NAME = "default"


def check_peft() -> None:
    """Raise a `SettingsError` if `peft` is not installed."""
    if find_spec("peft") is None:
        allowed = 'needs the package peft, which is not installed; run pip install "fedmitr-flwr[lora]"'
        raise SettingsError((KEY, "lora", allowed))


def add_adapters(model: VisionTransformer, part: TrainedPart, seed: int) -> LoraModel:
    """Put an adapter on each matrix that `part` names, in place; the outputs do not change before training.

    A is drawn as peft does (Kaiming uniform), B is zero.

    Parameters
    ----------
    model
        A plain model on the CPU.
    part
        What is trained.
    seed
        Seed of A. Global random state is not changed.

    Raises
    ------
    SettingsError
        If `peft` is not installed.
    """
    check_peft()
    from peft import LoraConfig, LoraModel

    config = LoraConfig(
        r=part.rank, lora_alpha=part.scale * part.rank, target_modules=ADAPTED, lora_dropout=0.0, bias="none"
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return LoraModel(model, config, _NAME)


def merge_adapters(model: VisionTransformer, adapted: LoraModel, part: TrainedPart) -> dict[str, Tensor]:
    """Add the adapters to the weights, in place, and return them.

    Returns
    -------
    dict
        A and B of each adapter, fp32 on the CPU, under the names of `trainable.adapter_names`.
    """
    found = {}
    for weight in part.adapted:
        module: Any = model.get_submodule(weight.removesuffix(".weight"))
        for name, matrices in zip(adapter_names(weight), (module.lora_A, module.lora_B), strict=True):
            found[name] = matrices[_NAME].weight.detach().cpu().clone()
    adapted.merge_and_unload()
    return found
