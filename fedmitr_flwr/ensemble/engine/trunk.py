"""Find the blocks that no client trained: the leading blocks that are equal in all teachers.

The patch embedding and these blocks are the trunk of the teachers. The trunk is found by comparing weights, not from
settings. Teachers are compared as mappings from names of tensors to tensors: state dicts, uploads on disk, or the
parameters of models. A tensor that is the same object in both is equal without a comparison of its values.

Letters: K teachers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import cast

import torch
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from fedmitr_flwr.ensemble.engine.packing import architecture_of
from fedmitr_flwr.models.vit import in_trunk

State = Mapping[str, Tensor]


def with_shared_trunk(model: VisionTransformer, depth: int) -> VisionTransformer:
    """Return a copy of a model that has the same tensors, not copies of them, in a trunk of `depth` blocks."""
    shared = [value for name, value in tensors_of(model).items() if depth and in_trunk(name, depth)]
    return copy.deepcopy(model, {id(value): value for value in shared})


def move_trunk(model: VisionTransformer, depth: int, device: torch.device) -> None:
    """Move the tensors of a trunk of `depth` blocks to a device; the others stay where they are."""
    for name in tensors_of(model):
        if in_trunk(name, depth):
            owner, _, last = name.rpartition(".")
            module = model.get_submodule(owner)
            value = getattr(module, last).to(device)
            kept = nn.Parameter(value, requires_grad=False) if last in module._parameters else value
            setattr(module, last, kept)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of a model by name, the objects themselves."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def shared_depth(states: Sequence[State], blocks: int) -> int:
    """Return the number of leading blocks that are equal in all states, together with the patch embedding.

    Parameters
    ----------
    states
        K states of one architecture. No tensor after the first one that differs is read.
    blocks
        Number of blocks of the architecture.

    Returns
    -------
    int
        0 if not even the first block or the embedding of patches is shared, or if K = 1.
    """
    if len(states) < 2:
        return 0
    first, depth = _Kept(states[0]), blocks
    for other in states[1:]:
        depth = _common_depth(first, other, depth)
        if depth == 0:
            return 0
    return depth


def shared_depth_of_models(models: Sequence[VisionTransformer]) -> int:
    """Return `shared_depth` of models; 0 if they differ in architecture."""
    if len(models) < 2:
        return 0
    kind = _kind(models[0])
    if any(_kind(model) != kind for model in models[1:]):
        return 0
    return shared_depth([tensors_of(model) for model in models], len(models[0].blocks))


def _common_depth(first: State, other: State, most: int) -> int:
    """Return how many leading blocks two states have in common, at most `most`."""
    stages: dict[int, list[str]] = {}
    for name in first:
        if in_trunk(name, most):
            stages.setdefault(int(name.split(".", 2)[1]) if name.startswith("blocks.") else -1, []).append(name)
    for number in range(-1, most):
        if not _equal(first, other, stages.get(number, ())):
            return max(0, number)
    return most


def _equal(first: State, other: State, names: Iterable[str]) -> bool:
    for name in names:
        one, two = first[name], other[name]
        if one is not two and not (one.dtype == two.dtype and torch.equal(one, two)):
            return False
    return True


class _Kept(Mapping[str, Tensor]):
    """A state whose tensors are read once."""

    def __init__(self, state: State) -> None:
        self._state, self._read = state, dict[str, Tensor]()

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._read:
            self._read[name] = self._state[name]
        return self._read[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)


def _kind(model: VisionTransformer) -> object:
    """Return a value that is equal for models that differ in their weights alone."""
    architecture = architecture_of(model)
    if architecture is not None:
        return architecture
    heads = tuple(cast(Attention, cast(Block, block).attn).num_heads for block in model.blocks)
    return type(model), str(model), heads, model.no_embed_class
