"""Group the teachers that run together: packed teachers by the hand-written passes, others by autograd.

Letters: B images, K teachers, T teachers of a step, L patches, N tokens, C classes, D embedding, E pixels of a patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from fedmitr_flwr.ensemble.engine.kernels import Arena
from fedmitr_flwr.ensemble.engine.packing import Architecture, Pack, architecture_of, pack
from fedmitr_flwr.ensemble.engine.passes import Pass, activation_bytes, backward, forward
from fedmitr_flwr.ensemble.engine.teachers import STEP_BYTES, PagedTeachers
from fedmitr_flwr.models.vit import forward_patches

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


class Step(Protocol):
    """The work of some teachers on one batch."""

    members: slice | Tensor
    """Positions of the step's teachers among all K: a slice, or an index on the device of the batch.

    An index on the host would make a GPU wait.
    """

    def forward(self, scratch: Arena, keep: Arena | None) -> StepOutput:
        """Run the forward pass; with `keep`, store the activations there for `backward`."""
        ...

    def backward(self, scratch: Arena, of_logits: Tensor, of_features: Tensor | None) -> Tensor:
        """Return the ``(B, L, E)`` gradient with respect to the pixels.

        If `forward` stored no activations, the forward pass runs again.

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


class Group(Protocol):
    """Several teachers of one architecture, or one teacher that cannot be packed."""

    def steps(self, patches: Tensor, index: Tensor | None) -> list[Step]:
        """Divide the work on ``(B, L, E)`` patches at ``(B, L)`` grid positions into steps."""
        ...


def group_teachers(teachers: Sequence[VisionTransformer], dtype: torch.dtype, hold: bool = True) -> list[Group]:
    """Group teachers of the same architecture; a teacher that cannot be packed forms a group of its own.

    Parameters
    ----------
    dtype
        Number format of the packed weights, fp32 or bf16.
    hold
        Whether to keep the packed weights in memory. If False, they are packed again for every pass and then discarded.
        `PagedTeachers` are never held.
    """
    if isinstance(teachers, PagedTeachers):
        if architecture_of(teachers.blank) is None:
            return [_ModuleGroup(k, teachers) for k in range(len(teachers))]
        return [_PackedGroup(list(range(len(teachers))), teachers, teachers.blank, dtype, hold=False)]
    alike: dict[Architecture, list[int]] = {}
    groups: list[Group] = []
    for k, teacher in enumerate(teachers):
        architecture = architecture_of(teacher)
        if architecture is None:
            groups.append(_ModuleGroup(k, teachers))
        else:
            alike.setdefault(architecture, []).append(k)
    packed = []
    for members in alike.values():
        models = [teachers[k] for k in members]
        packed.append(_PackedGroup(members, models, models[0], dtype, hold))
    return [*groups, *packed]


class _PackedGroup:
    def __init__(
        self,
        members: list[int],
        models: Sequence[VisionTransformer],
        like: VisionTransformer,
        dtype: torch.dtype,
        hold: bool,
    ) -> None:
        self._members, self._models, self._like, self._dtype = members, models, like, dtype
        self._places = torch.tensor(members)
        self._weight_bytes = 4 * sum(parameter.numel() for parameter in like.parameters())
        self._held = pack(models, dtype) if hold else None

    def steps(self, patches: Tensor, index: Tensor | None) -> list[Step]:
        B, N = patches.shape[0], patches.shape[1] + self._like.num_prefix_tokens
        size = max(1, min(STEP_ROWS // (B * N), STEP_BYTES // self._weight_bytes))
        return [
            _PackedStep(self, slice(start, start + size), patches, index)
            for start in range(0, len(self._members), size)
        ]

    def members(self, part: slice, device: torch.device) -> slice | Tensor:
        chosen = self._members[part]
        if chosen[-1] - chosen[0] == len(chosen) - 1:
            return slice(chosen[0], chosen[-1] + 1)
        self._places = self._places.to(device)
        return self._places[part]

    def pack(self, part: slice) -> Pack:
        if self._held is not None:
            return self._held.part(part.start, part.stop)
        return pack(self._models[part], self._dtype)

    def bytes(self, part: slice, B: int, L: int) -> int:
        return activation_bytes(self._like, len(self._members[part]), B, L, self._dtype)


class _PackedStep:
    def __init__(self, group: _PackedGroup, part: slice, patches: Tensor, index: Tensor | None) -> None:
        self.members = group.members(part, patches.device)
        self._group, self._part, self._patches, self._index = group, part, patches, index
        self._done: Pass | None = None

    def forward(self, scratch: Arena, keep: Arena | None) -> StepOutput:
        done = forward(self._group.pack(self._part), self._patches, self._index, scratch, keep)
        self._done = None if keep is None else done
        return StepOutput(done.logits, done.attention, done.features)

    def backward(self, scratch: Arena, of_logits: Tensor, of_features: Tensor | None) -> Tensor:
        done, self._done = self._done, None
        pack = self._group.pack(self._part)
        if done is None:
            done = forward(pack, self._patches, self._index, scratch, scratch)
        return backward(pack, done, of_logits, scratch, of_features)

    def bytes(self) -> int:
        return self._group.bytes(self._part, *self._patches.shape[:2])


@dataclass(frozen=True)
class _ModuleGroup:
    member: int
    teachers: Sequence[VisionTransformer]

    def steps(self, patches: Tensor, index: Tensor | None) -> list[Step]:
        return [_ModuleStep(self.member, self.teachers, patches, index)]


class _ModuleStep:
    def __init__(
        self, member: int, teachers: Sequence[VisionTransformer], patches: Tensor, index: Tensor | None
    ) -> None:
        self.members: slice | Tensor = slice(member, member + 1)
        self._member, self._teachers, self._patches, self._index = member, teachers, patches, index

    def forward(self, scratch: Arena, keep: Arena | None) -> StepOutput:
        out = forward_patches(self._teachers[self._member], self._patches, self._index, attention=True)
        assert out.attention is not None
        return StepOutput(out.logits.float()[None], out.attention[None], out.features.float()[None])

    def backward(self, scratch: Arena, of_logits: Tensor, of_features: Tensor | None) -> Tensor:
        with torch.enable_grad():
            patches = self._patches.detach().requires_grad_(True)
            out = forward_patches(self._teachers[self._member], patches, self._index)
            outputs, upstream = [out.logits.float()], [of_logits[0]]
            if of_features is not None:
                outputs, upstream = [*outputs, out.features.float()], [*upstream, of_features[0]]
            return torch.autograd.grad(outputs, patches, upstream)[0]

    def bytes(self) -> int:
        return 0
