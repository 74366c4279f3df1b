"""Pack frozen ViTs for inversion: lay out their weights for forward and backward passes without autograd.

The weights of teachers are constant, so operations that follow each other are folded into one matrix, once:

- the affine part of a LayerNorm, and the scale of the queries, into the next linear map;
- LayerScale into the linear map before it;
- the bias of the patch embedding into the position embedding.

The result equals that of `vit.forward_patches` up to rounding. Teachers of one architecture are stacked along a leading
axis and run as batched matrix products. The blocks that all teachers share can be packed once, as a `Trunk` of one
teacher, and the rest of each teacher as `Tail`.

Letters: T teachers of a pack, D embedding, F hidden width of the MLP, H heads, E pixels of a patch, P patches of
the full grid, C classes, Q rows that the head reads ([CLS], and the distillation token of a distilled DeiT).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from timm.layers.attention import Attention
from timm.layers.mlp import Mlp
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from fedmitr_flwr.models.vit import in_trunk

ACTIVATIONS = {"none", "tanh"}  # supported values of nn.GELU.approximate
WIDE = 192
"""From this embedding width on, the weights are also stored transposed (see `transposed`)."""


@dataclass(frozen=True)
class Architecture:
    """Properties that all teachers of a pack have in common."""

    shapes: tuple[tuple[int, ...], ...]
    heads: int
    eps: float
    approximate: str
    distilled: bool
    patches: int
    prefix: int
    blocks: int

    @property
    def rows(self) -> int:
        """Q, the number of rows that the head reads."""
        return 2 if self.distilled else 1


@dataclass(frozen=True)
class PackedBlock:
    """Weights of one transformer block of T teachers; axis 1 of a bias has length one, for the tokens.

    ``..._t`` are the same matrices transposed for the forward pass: views or copies (see `transposed`).
    """

    qkv: Tensor  # (T, 3D, D)
    qkv_t: Tensor  # (T, D, 3D)
    qkv_bias: Tensor  # (T, 1, 3D)
    proj: Tensor  # (T, D, D)
    proj_t: Tensor  # (T, D, D)
    proj_bias: Tensor  # (T, 1, D)
    fc1: Tensor  # (T, F, D)
    fc1_t: Tensor  # (T, D, F)
    fc1_bias: Tensor  # (T, 1, F)
    fc2: Tensor  # (T, D, F)
    fc2_t: Tensor  # (T, F, D)
    fc2_bias: Tensor  # (T, 1, D)


def _cut(blocks: tuple[PackedBlock, ...], start: int, stop: int) -> tuple[PackedBlock, ...]:
    """Return the weights of the teachers from `start` up to, excluding, `stop`, as views."""
    return tuple(PackedBlock(*(value[start:stop] for value in vars(block).values())) for block in blocks)


@dataclass(frozen=True)
class Trunk:
    """Patch embedding and first blocks of T teachers, or of all teachers if they share them (T = 1).

    Attributes
    ----------
    dtype
        Number format of the matrices and of their inputs. Biases, positions and the residual stream are fp32.
    """

    architecture: Architecture
    dtype: torch.dtype
    embed: Tensor  # (T, D, E)
    positions: Tensor  # (T, P, D), includes the bias of the patch embedding
    prefix: Tensor  # (T, prefix tokens, D), includes their position embedding
    blocks: tuple[PackedBlock, ...]

    def part(self, start: int, stop: int) -> Trunk:
        """Return the teachers from `start` up to, excluding, `stop`, as views."""
        cut = {name: getattr(self, name)[start:stop] for name in ("embed", "positions", "prefix")}
        return replace(self, blocks=_cut(self.blocks, start, stop), **cut)


@dataclass(frozen=True)
class Tail:
    """The other blocks, the last norm and the head of T teachers; attributes as in `Trunk`."""

    architecture: Architecture
    dtype: torch.dtype
    blocks: tuple[PackedBlock, ...]
    head: Tensor  # (T, C, Q D)
    head_bias: Tensor  # (T, 1, C)

    @property
    def teachers(self) -> int:
        """T, the number of teachers."""
        return self.head.shape[0]

    def part(self, start: int, stop: int) -> Tail:
        """Return the teachers from `start` up to, excluding, `stop`, as views."""
        head, bias = self.head[start:stop], self.head_bias[start:stop]
        return replace(self, blocks=_cut(self.blocks, start, stop), head=head, head_bias=bias)


@dataclass(frozen=True)
class Pack:
    """T teachers of one architecture.

    Attributes
    ----------
    trunk
        The patch embedding of each teacher, without any block. None if a trunk that all teachers share computes the
        input of the tails.
    tail
        The rest of each teacher.
    """

    trunk: Trunk | None
    tail: Tail

    def part(self, start: int, stop: int) -> Pack:
        """Return the teachers from `start` up to, excluding, `stop`, as views."""
        if start == 0 and stop >= self.tail.teachers:
            return self
        trunk = None if self.trunk is None else self.trunk.part(start, stop)
        return Pack(trunk, self.tail.part(start, stop))


def architecture_of(model: VisionTransformer) -> Architecture | None:
    """Return the architecture of a model, or None if it has a part that a pack does not support."""
    plain = (model.norm_pre, model.patch_embed.norm, model.fc_norm)
    if model.pos_embed is None or any(not isinstance(part, nn.Identity) for part in plain):
        return None
    blocks = [cast(Block, block) for block in model.blocks]
    norms: list[nn.Module] = [model.norm]
    activations = set()
    for block in blocks:
        attn, mlp = cast(Attention, block.attn), block.mlp
        if type(mlp) is not Mlp or not isinstance(mlp.act, nn.GELU):
            return None
        inner = (attn.q_norm, attn.k_norm, attn.norm, mlp.norm)
        if getattr(attn, "gate", None) is not None or any(not isinstance(part, nn.Identity) for part in inner):
            return None
        norms += [block.norm1, block.norm2]
        activations.add(mlp.act.approximate)
    if any(not isinstance(norm, nn.LayerNorm) or norm.weight is None for norm in norms):
        return None
    eps = {cast(nn.LayerNorm, norm).eps for norm in norms}
    heads = {cast(Attention, block.attn).num_heads for block in blocks}
    if len(eps) != 1 or len(heads) != 1 or len(activations) != 1 or not activations <= ACTIVATIONS:
        return None
    shapes = tuple(tuple(parameter.shape) for parameter in model.parameters())
    return Architecture(
        shapes,
        heads.pop(),
        eps.pop(),
        activations.pop(),
        distilled=isinstance(model, VisionTransformerDistilled),
        patches=model.patch_embed.num_patches,
        prefix=model.num_prefix_tokens,
        blocks=len(blocks),
    )


@torch.no_grad()
def pack(models: Sequence[VisionTransformer], dtype: torch.dtype = torch.float32, depth: int = 0) -> Pack:
    """Fold and stack the weights of T teachers of one architecture.

    Parameters
    ----------
    models
        T models for which `architecture_of` returns the same value.
    dtype
        Number format of the packed matrices, fp32 or bf16. Folding is done in fp32.
    depth
        Number of blocks of the trunk that the teachers share. It is left out; `pack_trunk` packs it. 0: no trunk.

    Raises
    ------
    ValueError
        If the models differ in architecture, or cannot be packed.
    """
    architecture = architecture_of(models[0])
    if architecture is None or any(architecture_of(model) != architecture for model in models[1:]):
        raise ValueError("models packed together must share one architecture that `architecture_of` supports")
    states = [_state(model, lambda name: depth == 0 or not in_trunk(name, depth)) for model in models]
    head, head_bias = _head(states, architecture.distilled)
    blocks = _blocks(states, range(depth, architecture.blocks), architecture, dtype)
    tail = Tail(architecture, dtype, blocks, head.to(dtype), head_bias)
    return Pack(None if depth else _trunk(models[0], states, architecture, dtype, 0), tail)


@torch.no_grad()
def pack_trunk(model: VisionTransformer, dtype: torch.dtype, depth: int) -> Trunk:
    """Fold the patch embedding and the first `depth` blocks of a model that `architecture_of` supports; T = 1."""
    architecture = architecture_of(model)
    if architecture is None:
        raise ValueError("a model without an architecture that `architecture_of` supports has no packed trunk")
    return _trunk(model, [_state(model, lambda name: in_trunk(name, depth))], architecture, dtype, depth)


def _state(model: VisionTransformer, needed: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
    return {name: value.detach().float() for name, value in model.state_dict().items() if needed(name)}


def _trunk(
    like: VisionTransformer, states: list[dict[str, Tensor]], architecture: Architecture, dtype: torch.dtype, depth: int
) -> Trunk:
    def stacked(each: Callable[[dict[str, Tensor]], Tensor]) -> Tensor:
        return torch.stack([each(state) for state in states])

    count, no_class = like.num_prefix_tokens, like.no_embed_class
    return Trunk(
        architecture,
        dtype,
        embed=stacked(lambda s: s["patch_embed.proj.weight"].flatten(1)).to(dtype),
        positions=stacked(lambda s: _positions(s, count, no_class)),
        prefix=stacked(lambda s: _prefix(s, count, no_class)),
        blocks=_blocks(states, range(depth), architecture, dtype),
    )


def _blocks(
    states: list[dict[str, Tensor]], numbers: range, architecture: Architecture, dtype: torch.dtype
) -> tuple[PackedBlock, ...]:
    return tuple(_block(states, f"blocks.{number}.", architecture.heads, dtype) for number in numbers)


def spread(matrix: Tensor) -> Tensor:
    """Return the same values in rows that do not start a multiple of 4096 bytes apart.

    Rows that do compete for the same cache sets on a CPU; 16 unused values after each row avoid that
    (`benchmarks/results/engine-constants.md`).
    """
    T, rows, columns = matrix.shape
    if columns * matrix.element_size() % 4096 or matrix.device.type != "cpu":
        return matrix.contiguous()
    return matrix.new_empty(T, rows, columns + 16)[..., :columns].copy_(matrix)


def transposed(matrix: Tensor) -> Tensor:
    """Return ``(T, in, out)`` weights for the forward pass: a copy for wide fp32 models on a CPU, else a view.

    MKL multiplies faster by a plain matrix than by a transposed one (`benchmarks/results/engine-constants.md`). A copy
    stores the weights a second time, so models narrower than `WIDE` get a view: there may be hundreds of them.
    """
    wide = min(matrix.shape[1:]) >= WIDE and matrix.dtype == torch.float32 and matrix.device.type == "cpu"
    return spread(matrix.mT) if wide else matrix.mT


def _zeros(state: dict[str, Tensor], name: str, like: Tensor) -> Tensor:
    """Return a bias, or zeros for a layer without one."""
    found = state.get(name)
    return like.new_zeros(len(like)) if found is None else found


def _positions(state: dict[str, Tensor], count: int, no_class: bool) -> Tensor:
    positions = state["pos_embed"][0] if no_class else state["pos_embed"][0, count:]
    return positions + _zeros(state, "patch_embed.proj.bias", state["patch_embed.proj.weight"])


def _prefix(state: dict[str, Tensor], count: int, no_class: bool) -> Tensor:
    tokens = [state[name][0] for name in ("cls_token", "dist_token", "reg_token") if name in state]
    prefix = torch.cat(tokens)
    return prefix if no_class else prefix + state["pos_embed"][0, :count]


def _fold(state: dict[str, Tensor], norm: str, linear: str) -> tuple[Tensor, Tensor]:
    """Return weight and bias of a linear map with the affine part of the LayerNorm before it folded in."""
    weight = state[linear + ".weight"]
    bias = _zeros(state, linear + ".bias", weight) + weight @ _zeros(state, norm + ".bias", weight.T)
    return weight * state[norm + ".weight"], bias


def _scaled(state: dict[str, Tensor], linear: str, scale: str) -> tuple[Tensor, Tensor]:
    """Return weight and bias of a linear map with the LayerScale behind it folded in."""
    weight = state[linear + ".weight"]
    bias, gamma = _zeros(state, linear + ".bias", weight), state.get(scale)
    return (weight, bias) if gamma is None else (weight * gamma[:, None], bias * gamma)


def _block(states: list[dict[str, Tensor]], name: str, heads: int, dtype: torch.dtype) -> PackedBlock:
    def qkv(state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        weight, bias = _fold(state, name + "norm1", name + "attn.qkv")
        width = len(weight) // 3
        scale = torch.ones(3 * width, 1, device=weight.device)
        scale[:width] = (width // heads) ** -0.5
        return weight * scale, bias * scale[:, 0]

    parts: list[Tensor] = []
    for each in (
        qkv,
        lambda state: _scaled(state, name + "attn.proj", name + "ls1.gamma"),
        lambda state: _fold(state, name + "norm2", name + "mlp.fc1"),
        lambda state: _scaled(state, name + "mlp.fc2", name + "ls2.gamma"),
    ):
        matrix, bias = _stacked(states, each, dtype)
        parts += [matrix, transposed(matrix), bias]
    return PackedBlock(*parts)


def _stacked(
    states: list[dict[str, Tensor]], each: Callable[[dict[str, Tensor]], tuple[Tensor, Tensor]], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the weights and biases of one linear map of all teachers, folded one teacher at a time to save memory."""
    weight, bias = each(states[0])
    weights, biases = weight.new_empty(len(states), *weight.shape, dtype=dtype), bias.new_empty(len(states), len(bias))
    for k, state in enumerate(states):
        weights[k], biases[k] = each(state)
    return spread(weights), biases[:, None]


def _head(states: list[dict[str, Tensor]], distilled: bool) -> tuple[Tensor, Tensor]:
    pairs = []
    for state in states:
        weight, bias = _fold(state, "norm", "head")
        if distilled:  # timm averages the two heads at evaluation
            second, more = _fold(state, "norm", "head_dist")
            weight, bias = torch.cat([weight, second], dim=1) / 2, (bias + more) / 2
        pairs.append((weight, bias))
    return torch.stack([w for w, _ in pairs]), torch.stack([b for _, b in pairs])[:, None]
