"""The client models as teachers: held in memory as fp32, held as bf16, or read from the uploads at each use.

Letters: K teachers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, overload

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from fedmitr_flwr.ensemble.engine.packing import WIDE, architecture_of
from fedmitr_flwr.runs.tensors import StoredState

State = Mapping[str, Tensor]
Place = Literal["held", "bf16", "paged"]
"""How teachers are held: in memory as fp32, original and packed; in memory as bf16 alone; or on disk."""

STEP_BYTES = 16 << 20
"""Largest fp32 size in bytes of the weights, summed over the teachers of a step, that run as one batched product.

It bounds the memory of a step: where weights are packed again for every pass, those of a step are in memory about four
times. Larger models gain nothing from batching, because their matrices leave the cache between two images anyway.
"""


@dataclass(frozen=True)
class MemoryLimits:
    """Limits on the memory of an ensemble, in MiB; the defaults equal those of the settings.

    Attributes
    ----------
    activations
        Limit on the activations of all teachers between the forward and the backward pass. Above it, each teacher runs
        forward twice.
    teachers
        Limit on the weights of all teachers, original and packed. Above it, the weights are held once, as bf16, and
        packed again for every pass. If that exceeds the limit too, `load_teachers` reads them from disk at each use.
    """

    activations: int = 640
    teachers: int = 4096

    def place(self, teacher: VisionTransformer, count: int) -> Place:
        """Return how `count` teachers of this fp32 one's architecture are held: as precise as fits in the limit."""
        packable = architecture_of(teacher) is not None
        places: tuple[Place, ...] = ("held", "bf16") if packable else ("held",)  # others are neither packed nor rounded
        return next((place for place in places if _all_bytes(teacher, count, place) <= self.teachers << 20), "paged")

    def size(self, teacher: VisionTransformer, count: int) -> int:
        """Return the largest number of bytes that `count` teachers need, held as `place` says, during a pass.

        Teachers whose packed weights are not held are packed for one step of a pass at a time: at least one teacher,
        else at most `STEP_BYTES` of weights. Such a step needs the pack and its transposed copy, and for paged teachers
        the weights that were read.
        """
        place, each = self.place(teacher, count), 4 * _numbers(teacher)
        step = each if architecture_of(teacher) is None else each * max(1, min(STEP_BYTES // each, count))
        return _all_bytes(teacher, count, place) + {"held": 0, "bf16": 2 * step, "paged": 3 * step}[place]

    def within(self, room: int, teacher: VisionTransformer, count: int) -> MemoryLimits:
        """Return limits under which the teachers need at most `room` bytes; 0 if even paged teachers need more."""
        limits = replace(self, teachers=min(self.teachers, max(0, room >> 20)))
        while limits.teachers and limits.size(teacher, count) > room:
            below = (_all_bytes(teacher, count, limits.place(teacher, count)) - 1) >> 20
            limits = replace(limits, teachers=max(0, min(below, limits.teachers - 1)))
        return limits

    def shrink(self, teacher: VisionTransformer, count: int) -> bool:
        """Convert one of `count` teachers to bf16, in place, if together they exceed the limit as fp32.

        Returns
        -------
        bool
            Whether the teacher is bf16 after the call.
        """
        if not is_bf16(teacher) and architecture_of(teacher) is not None and self.place(teacher, count) != "held":
            teacher.to(torch.bfloat16)
        return is_bf16(teacher)


class PagedTeachers(Sequence[VisionTransformer]):
    """K frozen teachers of one architecture, each built from its state at every access and not kept.

    Their outputs equal those of teachers in memory bit for bit; each access costs the time to read the weights.

    Parameters
    ----------
    blank
        A model of the architecture on the CPU; it is copied, not changed.
    states
        K state dicts: `tensors.StoredState` of files that must remain in place, or mappings in memory.
    device
        Device of the teachers.
    """

    def __init__(self, blank: VisionTransformer, states: Sequence[State], device: torch.device) -> None:
        self.blank = copy.deepcopy(blank).eval().requires_grad_(False)
        self._states, self._device = states, device

    def __len__(self) -> int:
        return len(self._states)

    @overload
    def __getitem__(self, place: int) -> VisionTransformer: ...
    @overload
    def __getitem__(self, place: slice) -> list[VisionTransformer]: ...
    def __getitem__(self, place: int | slice) -> VisionTransformer | list[VisionTransformer]:
        if isinstance(place, slice):
            return [self[k] for k in range(*place.indices(len(self)))]
        state = self._states[place]
        teacher = copy.deepcopy(self.blank)
        # Nothing writes to the weights, so they are used in the file's memory pages without a copy.
        teacher.load_state_dict(state.read() if isinstance(state, StoredState) else dict(state), assign=True)
        return teacher.to(self._device).eval().requires_grad_(False)

    def plus(self, model: VisionTransformer) -> PagedTeachers:
        """Return these teachers and one more model of their architecture, whose weights stay in memory."""
        state = {name: value.detach().float().cpu() for name, value in model.state_dict().items()}
        return PagedTeachers(self.blank, [*self._states, state], self._device)

    def take(self, members: Iterable[int], limits: MemoryLimits) -> Sequence[VisionTransformer]:
        """Return the teachers at the positions `members`, in memory if the limits allow it."""
        return load_teachers(self.blank, [self._states[k] for k in members], limits, self._device)


def load_teachers(
    blank: VisionTransformer, states: Sequence[State], limits: MemoryLimits, device: torch.device
) -> Sequence[VisionTransformer]:
    """Build teachers from uploads: fp32 if they fit in memory, else bf16 if they fit, else `PagedTeachers`.

    Parameters
    ----------
    blank
        An fp32 model of the architecture, on the CPU.
    states
        K state dicts.
    limits
        Memory limits of the ensemble.
    device
        Device of the teachers.
    """
    if limits.place(blank, len(states)) == "paged":
        return PagedTeachers(blank, states, device)
    teachers = []
    for state in states:
        teacher = copy.deepcopy(blank)
        teacher.load_state_dict(state)
        limits.shrink(teacher, len(states))
        teachers.append(teacher.to(device))
    return teachers


def _numbers(teacher: VisionTransformer) -> int:
    return sum(parameter.numel() for parameter in teacher.parameters())


def _all_bytes(teacher: VisionTransformer, count: int, place: Place) -> int:
    """Return the bytes that the weights of all teachers need at a place."""
    copies = 3 if teacher.embed_dim >= WIDE else 2  # original, packed, and transposed
    held = 4 * (1 if architecture_of(teacher) is None else copies)
    return {"held": held, "bf16": 2, "paged": 0}[place] * _numbers(teacher) * count


def is_bf16(teacher: VisionTransformer) -> bool:
    """Return whether a teacher is held as bf16."""
    return bool(teacher.patch_embed.proj.weight.dtype == torch.bfloat16)
