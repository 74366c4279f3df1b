"""Which weights of a ViT a client trains, and which tensors it therefore uploads (`train.trainable`).

A client that trains a part of the weights uploads that part alone. The server adds the tensors that nobody trained from
the common initialisation, which it has itself. For `lora` the client uploads the two small matrices A and B of each
adapter, and the server computes the weight W0 + s B A.

Letters: D embedding, r rank of the adapters.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from fedmitr_flwr.models.vit import in_trunk
from fedmitr_flwr.settings import SettingsError, TrainSettings

KEY = "train.trainable"
ADAPTED = r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(fc1|fc1_g|fc1_x|fc2))"
"""Regular expression of the modules that `lora` adapts; a SwiGLU has two maps in the place of fc1."""

_HEAD = ("head.", "head_dist.")
_AFTER_BLOCKS = ("norm.", "fc_norm.", *_HEAD)
_BLOCK = re.compile(r"blocks\.(\d+)\.")


@dataclass(frozen=True)
class TrainedPart:
    """The part of a model's weights that a client trains.

    Attributes
    ----------
    trained
        Names of the state-dict tensors that are trained and uploaded as they are.
    adapted
        Names of the matrices that an adapter changes; only the adapter is uploaded.
    frozen_blocks
        Number of leading blocks that are frozen together with the embedding; None: the embedding is trained too.
    rank, scale
        Rank r of the adapters and factor s of their product.
    """

    trained: tuple[str, ...]
    adapted: tuple[str, ...] = ()
    frozen_blocks: int | None = None
    rank: int = 0
    scale: float = 0.0

    @property
    def whole(self) -> bool:
        """Whether all weights are trained, so that an upload is complete without the common initialisation."""
        return self.frozen_blocks is None

    @property
    def changed(self) -> tuple[str, ...]:
        """Names of the state-dict tensors that differ from the common initialisation after training."""
        return self.trained + self.adapted

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters' matrices in an upload."""
        return tuple(name for weight in self.adapted for name in adapter_names(weight))

    def uploaded(self, reference: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors with the names, shapes and dtypes of an upload; those of adapters have no memory.

        Parameters
        ----------
        reference
            State dict of the common initialisation.
        """
        found = {name: reference[name] for name in self.trained}
        with torch.device("meta"):
            for weight in self.adapted:
                outputs, inputs = reference[weight].shape
                down, up = adapter_names(weight)
                found[down], found[up] = torch.empty(self.rank, inputs), torch.empty(outputs, self.rank)
        return found

    def cut(self, state: Mapping[str, Tensor], adapters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors that a client uploads: the trained ones of its state dict, and its adapters."""
        return {**{name: state[name] for name in self.trained}, **adapters}


class CompletedState(Mapping[str, Tensor]):
    """The full weights of an upload that holds a part of them.

    A tensor that was not trained is the tensor object of the common initialisation, so that all clients share it in
    memory. A weight with an adapter is computed at each access, in fp32.

    Parameters
    ----------
    part
        What was trained.
    upload
        The uploaded tensors, on the CPU.
    reference
        State dict of the common initialisation from which the client trained.
    """

    def __init__(self, part: TrainedPart, upload: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> None:
        self._upload, self._reference, self._scale = upload, reference, part.scale
        self._trained, self._adapted = frozenset(part.trained), frozenset(part.adapted)

    def __getitem__(self, name: str) -> Tensor:
        if name in self._trained:
            return self._upload[name]
        if name not in self._adapted:
            return self._reference[name]
        down, up = (self._upload[adapter].float() for adapter in adapter_names(name))
        return torch.addmm(self._reference[name], up, down, alpha=self._scale)

    def __iter__(self) -> Iterator[str]:
        return iter(self._reference)

    def __len__(self) -> int:
        return len(self._reference)


def trained_part(settings: TrainSettings, state: Mapping[str, Tensor]) -> TrainedPart:
    """Return the part of a model that `train.trainable` trains.

    Parameters
    ----------
    settings
        `train.trainable`, `train.lora-rank` and `train.lora-alpha`.
    state
        State dict of the model, from which names and shapes are used.

    Raises
    ------
    SettingsError
        If the model has fewer blocks than `last-N` names, or its matrices are smaller than `train.lora-rank`.
    """
    value = settings.trainable
    if value == "all":
        return TrainedPart(tuple(state))
    depth = _depth(state)
    if value == "head":
        return TrainedPart(_starting(state, _HEAD), frozen_blocks=depth)
    after = _starting(state, _AFTER_BLOCKS)
    if value == "lora":
        adapted = tuple(
            name for name in state if name.endswith(".weight") and re.fullmatch(ADAPTED, name.removesuffix(".weight"))
        )
        least = min((min(state[name].shape) for name in adapted), default=0)
        if settings.lora_rank > least:
            allowed = f"must be at most {least}, the smallest side of a matrix that train.trainable = lora adapts"
            raise SettingsError(("train.lora-rank", settings.lora_rank, allowed))
        return TrainedPart(after, adapted, 0, settings.lora_rank, settings.lora_alpha / settings.lora_rank)
    before = blocks_before(value, depth, KEY)
    blocks = tuple(f"blocks.{number}." for number in range(before, depth))
    return TrainedPart(_starting(state, (*blocks, *_AFTER_BLOCKS)), frozen_blocks=before)


def blocks_before(value: str, depth: int, key: str) -> int:
    """Return how many leading blocks a value ``last-N`` of a setting leaves out.

    Parameters
    ----------
    value
        The value.
    depth
        Number of blocks of the model.
    key
        Name of the setting, for the message.

    Raises
    ------
    SettingsError
        If the model has fewer than N blocks.
    """
    last = int(value.removeprefix("last-"))
    if last > depth:
        raise SettingsError((key, value, f'the model has {depth} blocks; must be "last-N" with N from 1 to {depth}'))
    return depth - last


def freeze(model: VisionTransformer, part: TrainedPart) -> None:
    """Let only a part of a model train, and put the model into `train_mode`."""
    trained = set(part.trained)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained or ".lora_" in name)
    train_mode(model)


def train_mode(model: VisionTransformer) -> None:
    """Put a model into train mode, except for its embedding and leading blocks if they have no trained parameter.

    Dropout and drop path do not act in that part, so its output for an image is the same in every step.
    """
    model.train()
    if any(value.requires_grad for name, value in model.named_parameters() if in_trunk(name, 0)):
        return
    for module in (model.patch_embed, model.pos_drop, model.patch_drop, model.norm_pre):
        module.eval()
    for block in model.blocks:
        if any(parameter.requires_grad for parameter in block.parameters()):
            break
        block.eval()


def adapter_names(weight: str) -> tuple[str, str]:
    """Return the names of the matrices A, (r, inputs), and B, (outputs, r), that adapt a weight."""
    module = weight.removesuffix(".weight")
    return f"{module}.lora_A", f"{module}.lora_B"


def rate_factor(name: str, depth: int, decay: float) -> float:
    """Return the factor on the learning rate of a parameter for a layer-wise decay.

    As in BEiT (arXiv 2106.08254) and MAE (arXiv 2111.06377), the norm after the blocks belongs to the head. timm's
    ``param_groups_layer_decay`` counts it to the last block.

    Parameters
    ----------
    name
        Name of the parameter.
    depth
        Number of blocks.
    decay
        `train.layer-decay`: the factor from one block to the block before it.

    Returns
    -------
    float
        1 for the head and the norm before it, ``decay ** (depth - i)`` for block i, counted from 0, and
        ``decay ** (depth + 1)`` for the embedding.
    """
    if name.startswith(_AFTER_BLOCKS):
        return 1.0
    block = _BLOCK.match(name)
    return decay ** (depth + 1) if block is None else decay ** (depth - int(block.group(1)))


def _depth(state: Mapping[str, Tensor]) -> int:
    return 1 + max((int(match.group(1)) for name in state if (match := _BLOCK.match(name))), default=-1)


def _starting(state: Mapping[str, Tensor], starts: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in state if name.startswith(starts))
