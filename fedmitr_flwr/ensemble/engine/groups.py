"""Group the teachers that run together: packed teachers by the hand-written passes, others by autograd.

If all teachers share their first blocks, the trunk runs first, once. Each group then runs the tails of its teachers.

Letters: B images, K teachers, T teachers of a step, L patches, N tokens, C classes, D embedding, E pixels of a patch, Q
rows that the head reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from fedmitr_flwr.ensemble.engine.kernels import Arena
from fedmitr_flwr.ensemble.engine.packing import Architecture, Pack, Trunk, architecture_of, pack, pack_trunk
from fedmitr_flwr.ensemble.engine.passes import (
    Pass,
    Tokens,
    activation_bytes,
    tail_backward,
    tail_forward,
    trunk_backward,
    trunk_forward,
)
from fedmitr_flwr.ensemble.engine.teachers import STEP_BYTES, PagedTeachers, numbers_of
from fedmitr_flwr.models.vit import TokenOutput, TrunkOutput, forward_patches, forward_tokens, forward_trunk

STEP_ROWS = 1600
"""Largest number of tokens, summed over the teachers of a step, that run as one batched product.

Above it, batching is slower because the activations no longer fit in the cache
(`benchmarks/results/engine-constants.md`).
"""


@dataclass(frozen=True)
class StepOutput:
    """Outputs of the teachers of one step for a batch.

    Attributes
    ----------
    logits
        ``(T, B, C)`` fp32.
    attention
        ``(T, B, L)`` as in `passes.Pass`.
    features
        ``(T, B, D)`` fp32, as in `passes.Pass`.
    """

    logits: Tensor
    attention: Tensor
    features: Tensor


class Start(Protocol):
    """The input of all steps of a batch: the pixels, or the tokens of a trunk that all teachers share."""

    patches: Tensor
    """``(B, L, E)``."""
    index: Tensor | None
    """``(B, L)`` int64 positions in the grid; None: all patches, in order."""

    def forward(self, scratch: Arena, keep: Arena | None) -> None:
        """Run the trunk; with `keep`, store the activations there for `backward`."""
        ...

    def backward(self, scratch: Arena, gradient: Tensor) -> Tensor:
        """Return the ``(B, L, E)`` gradient with respect to the pixels.

        Parameters
        ----------
        gradient
            Sum of what `Step.backward` returns, over all steps. It may be overwritten.
        """
        ...

    def bytes(self) -> int:
        """Return the size in bytes of the activations that `backward` reads."""
        ...

    @property
    def tokens(self) -> Tensor | None:
        """What the trunk returns, ``(B, N, D)`` fp32, or ``(B, Q, D)`` with the last block; None without a trunk."""
        ...


class Step(Protocol):
    """The work of some teachers on one batch."""

    members: slice | Tensor
    """Positions of the step's teachers among all K: a slice, or an index on the device of the batch.

    An index on the host would make a GPU wait.
    """

    def forward(self, scratch: Arena, keep: Arena | None) -> StepOutput:
        """Run the forward pass after that of the start; with `keep`, store the activations there for `backward`."""
        ...

    def backward(self, scratch: Arena, of_logits: Tensor, of_features: Tensor | None) -> Tensor:
        """Return the gradient with respect to the start's output, summed over the teachers.

        Without a trunk these are the ``(B, L, E)`` pixels. If `forward` stored no activations, the forward pass runs
        again.

        Parameters
        ----------
        of_logits
            ``(T, B, C)`` gradient with respect to the logits.
        of_features
            ``(T, B, D)`` gradient with respect to the features; None: 0.
        """
        ...

    def bytes(self) -> int:
        """Return the size in bytes of the activations that `backward` reads."""
        ...


@dataclass(frozen=True)
class Groups:
    """All teachers of an ensemble for one number format: the trunk that they share, if any, and their groups."""

    trunk: _PackedTrunk | _ModuleTrunk | None
    groups: Sequence[_PackedGroup | _ModuleGroup]

    def steps(self, patches: Tensor, index: Tensor | None) -> tuple[Start, list[Step]]:
        """Divide the work on ``(B, L, E)`` patches at ``(B, L)`` grid positions into steps with a common start."""
        start: Start = _Pixels(patches, index) if self.trunk is None else self.trunk.start(patches, index)
        return start, [step for group in self.groups for step in group.steps(start)]


def group_teachers(
    teachers: Sequence[VisionTransformer], dtype: torch.dtype, hold: bool = True, depth: int = 0
) -> Groups:
    """Group teachers of the same architecture; a teacher that cannot be packed forms a group of its own.

    Parameters
    ----------
    dtype
        Number format of the packed weights, fp32 or bf16.
    hold
        Whether to keep the packed weights in memory. If False, they are packed again for every pass and then discarded.
        `PagedTeachers` are never held.
    depth
        Number of leading blocks that all teachers share (`trunk.shared_depth`); above 0, all have one architecture.
    """
    if isinstance(teachers, PagedTeachers):
        hold, like = False, teachers.blank
        architectures = [architecture_of(like)] * len(teachers)
    else:
        like = teachers[0]
        architectures = [architecture_of(teacher) for teacher in teachers]
    alike: dict[Architecture, list[int]] = {}
    groups: list[_PackedGroup | _ModuleGroup] = []
    for k, architecture in enumerate(architectures):
        if architecture is None:
            groups.append(_ModuleGroup(k, teachers, depth))
        else:
            alike.setdefault(architecture, []).append(k)
    for kind, members in alike.items():
        paged = isinstance(teachers, PagedTeachers)
        models = teachers if paged else [teachers[k] for k in members]
        groups.append(_PackedGroup(members, models, like if paged else models[0], kind, dtype, hold, depth))
    if depth == 0:
        return Groups(None, groups)
    trunk = _PackedTrunk(like, dtype, hold, depth) if architectures[0] else _ModuleTrunk(like, depth)
    return Groups(trunk, groups)


@dataclass
class _Pixels:
    """A start without a trunk: every step runs its teachers from the pixels."""

    patches: Tensor
    index: Tensor | None

    def forward(self, scratch: Arena, keep: Arena | None) -> None:
        pass

    def backward(self, scratch: Arena, gradient: Tensor) -> Tensor:
        return gradient

    def bytes(self) -> int:
        return 0

    @property
    def tokens(self) -> Tensor | None:
        return None


class _PackedTrunk:
    def __init__(self, like: VisionTransformer, dtype: torch.dtype, hold: bool, depth: int) -> None:
        self.like, self.dtype, self.depth = like, dtype, depth
        self._held = pack_trunk(like, dtype, depth) if hold else None

    def start(self, patches: Tensor, index: Tensor | None) -> _PackedStart:
        return _PackedStart(self, patches, index)

    def pack(self) -> Trunk:
        return self._held or pack_trunk(self.like, self.dtype, self.depth)


class _PackedStart:
    def __init__(self, trunk: _PackedTrunk, patches: Tensor, index: Tensor | None) -> None:
        self.patches, self.index, self._trunk = patches, index, trunk
        self.done: Tokens | None = None

    def forward(self, scratch: Arena, keep: Arena | None) -> None:
        done = trunk_forward(self._trunk.pack(), self.patches, self.index, scratch, keep)
        if keep is None:  # the steps write to `scratch`
            done.x = scratch.take("trunk", tuple(done.x.shape), done.x).copy_(done.x)
        self.done = done

    def backward(self, scratch: Arena, gradient: Tensor) -> Tensor:
        assert self.done is not None
        return trunk_backward(self._trunk.pack(), self.done, gradient, scratch)

    def bytes(self) -> int:
        like, (B, L, _) = self._trunk.like, self.patches.shape
        blocks = min(self._trunk.depth, len(like.blocks) - 1)
        return activation_bytes(like, 1, B, L, self._trunk.dtype, blocks)

    @property
    def tokens(self) -> Tensor | None:
        assert self.done is not None
        return self.done.x.view(self.done.images, -1, self.done.x.shape[-1])


class _PackedGroup:
    def __init__(
        self,
        members: list[int],
        models: Sequence[VisionTransformer],
        like: VisionTransformer,
        architecture: Architecture,
        dtype: torch.dtype,
        hold: bool,
        depth: int,
    ) -> None:
        self._members, self._models, self._like = members, models, like
        self._architecture, self._dtype, self._depth = architecture, dtype, depth
        self._places = torch.tensor(members)
        self._weight_bytes = 4 * numbers_of(like, depth)[1]
        self._held = pack(models, dtype, depth) if hold else None

    def steps(self, start: Start) -> list[Step]:
        B, N = start.patches.shape[0], start.patches.shape[1] + self._like.num_prefix_tokens
        if self._depth == self._architecture.blocks:  # only the last norm and the head are left
            N = self._architecture.rows
        size = max(1, min(STEP_ROWS // (B * N), STEP_BYTES // self._weight_bytes))
        return [_PackedStep(self, slice(first, first + size), start) for first in range(0, len(self._members), size)]

    def members(self, part: slice, device: torch.device) -> slice | Tensor:
        chosen = self._members[part]
        if chosen[-1] - chosen[0] == len(chosen) - 1:
            return slice(chosen[0], chosen[-1] + 1)
        self._places = self._places.to(device)
        return self._places[part]

    def pack(self, part: slice) -> Pack:
        if self._held is not None:
            return self._held.part(part.start, part.stop)
        return pack(self._models[part], self._dtype, self._depth)

    def bytes(self, part: slice, B: int, L: int) -> int:
        blocks = max(0, len(self._like.blocks) - 1 - self._depth)
        return activation_bytes(self._like, len(self._members[part]), B, L, self._dtype, blocks)


class _PackedStep:
    def __init__(self, group: _PackedGroup, part: slice, start: Start) -> None:
        self.members = group.members(part, start.patches.device)
        self._group, self._part, self._start = group, part, start
        self._done: tuple[Tokens, Pass] | None = None

    def forward(self, scratch: Arena, keep: Arena | None) -> StepOutput:
        tokens, done = self._forward(self._group.pack(self._part), scratch, keep)
        self._done = None if keep is None else (tokens, done)
        return StepOutput(done.logits, done.attention, done.features)

    def _forward(self, pack: Pack, scratch: Arena, keep: Arena | None) -> tuple[Tokens, Pass]:
        start = self._start
        if isinstance(start, _PackedStart):
            assert start.done is not None
            tokens = start.done
        else:
            assert pack.trunk is not None
            tokens = trunk_forward(pack.trunk, start.patches, start.index, scratch, keep)
        return tokens, tail_forward(pack.tail, tokens, scratch, keep)

    def backward(self, scratch: Arena, of_logits: Tensor, of_features: Tensor | None) -> Tensor:
        found, self._done = self._done, None
        pack = self._group.pack(self._part)
        tokens, done = self._forward(pack, scratch, scratch) if found is None else found
        g = tail_backward(pack.tail, done, of_logits, scratch, of_features)
        if pack.trunk is None:
            return g.sum(0, keepdim=True)
        return trunk_backward(pack.trunk, tokens, g, scratch)

    def bytes(self) -> int:
        return self._group.bytes(self._part, *self._start.patches.shape[:2])


@dataclass(frozen=True)
class _ModuleTrunk:
    like: VisionTransformer
    depth: int

    def start(self, patches: Tensor, index: Tensor | None) -> _ModuleStart:
        return _ModuleStart(self, patches, index)


class _ModuleStart:
    def __init__(self, trunk: _ModuleTrunk, patches: Tensor, index: Tensor | None) -> None:
        self.patches, self.index, self._trunk = patches, index, trunk
        self.done: TrunkOutput | None = None

    def forward(self, scratch: Arena, keep: Arena | None) -> None:
        trunk = self._trunk
        self.done = forward_trunk(trunk.like, self.patches, self.index, trunk.depth, attention=True)

    def backward(self, scratch: Arena, gradient: Tensor) -> Tensor:
        with torch.enable_grad():
            patches = self.patches.detach().requires_grad_(True)
            tokens = forward_trunk(self._trunk.like, patches, self.index, self._trunk.depth).tokens
            return torch.autograd.grad(tokens, patches, gradient)[0]

    def bytes(self) -> int:
        return 0

    @property
    def tokens(self) -> Tensor | None:
        assert self.done is not None
        return self.done.tokens.float()


@dataclass(frozen=True)
class _ModuleGroup:
    member: int
    teachers: Sequence[VisionTransformer]
    depth: int

    def steps(self, start: Start) -> list[Step]:
        return [_ModuleStep(self, start)]


class _ModuleStep:
    def __init__(self, group: _ModuleGroup, start: Start) -> None:
        self.members: slice | Tensor = slice(group.member, group.member + 1)
        self._group, self._start = group, start

    def _run(self, inputs: Tensor, *, attention: bool = False) -> TokenOutput:
        """Run the teacher on the pixels, or its tail on the tokens of the trunk."""
        teacher, start = self._group.teachers[self._group.member], self._start
        if isinstance(start, _ModuleStart):
            assert start.done is not None
            out = forward_tokens(teacher, inputs, self._group.depth, attention=attention)
            return out if start.done.attention is None else replace(out, attention=start.done.attention)
        return forward_patches(teacher, inputs, start.index, attention=attention)

    def _input(self) -> Tensor:
        start = self._start
        if isinstance(start, _ModuleStart):
            assert start.done is not None
            return start.done.tokens
        return start.patches

    def forward(self, scratch: Arena, keep: Arena | None) -> StepOutput:
        out = self._run(self._input(), attention=True)
        assert out.attention is not None
        return StepOutput(out.logits.float()[None], out.attention[None], out.features.float()[None])

    def backward(self, scratch: Arena, of_logits: Tensor, of_features: Tensor | None) -> Tensor:
        with torch.enable_grad():
            inputs = self._input().detach().requires_grad_(True)
            out = self._run(inputs.view_as(inputs))  # torch's FLOP counter accepts no leaf as input of a module
            outputs, upstream = [out.logits.float()], [of_logits[0]]
            if of_features is not None:
                outputs, upstream = [*outputs, out.features.float()], [*upstream, of_features[0]]
            return torch.autograd.grad(outputs, inputs, upstream)[0]

    def bytes(self) -> int:
        return 0
