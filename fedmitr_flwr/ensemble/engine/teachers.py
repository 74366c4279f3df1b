"""The client models as teachers: held in memory as fp32, held as bf16, or read from the uploads at each use.

Teachers that share their first blocks (`trunk.py`) are held as one trunk and K tails.

Letters: K teachers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, overload

import torch
from timm.models.vision_transformer import VisionTransformer

from fedmitr_flwr.ensemble.engine.packing import WIDE, architecture_of
from fedmitr_flwr.ensemble.engine.trunk import State, move_trunk, shared_depth, with_shared_trunk
from fedmitr_flwr.models.vit import in_trunk
from fedmitr_flwr.runs.tensors import StoredState

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

    def place(self, teacher: VisionTransformer, count: int, depth: int = 0) -> Place:
        """Return how teachers are held: as precise as fits in the limit.

        Parameters
        ----------
        teacher
            One of the teachers, fp32.
        count
            K.
        depth
            Number of leading blocks that all teachers share, together with the patch embedding. They count once.
        """
        packable = architecture_of(teacher) is not None
        places: tuple[Place, ...] = ("held", "bf16") if packable else ("held",)  # others are neither packed nor rounded
        limit = self.teachers << 20
        return next((place for place in places if _all_bytes(teacher, count, depth, place) <= limit), "paged")

    def size(self, teacher: VisionTransformer, count: int, depth: int = 0) -> int:
        """Return the largest number of bytes that the teachers need during a pass, held as `place` says.

        Teachers whose packed weights are not held are packed for one step of a pass at a time: at least one teacher,
        else at most `STEP_BYTES` of weights. Such a step needs the pack and its transposed copy, and for paged teachers
        the weights that were read. A trunk is such a step too.

        Parameters
        ----------
        teacher, count, depth
            As for `place`.
        """
        place, (trunk, each) = self.place(teacher, count, depth), (4 * part for part in numbers_of(teacher, depth))
        step = each if architecture_of(teacher) is None else each * max(1, min(STEP_BYTES // each, count))
        step = max(step, trunk)
        return _all_bytes(teacher, count, depth, place) + {"held": 0, "bf16": 2 * step, "paged": 3 * step}[place]

    def within(self, room: int, teacher: VisionTransformer, count: int, depth: int = 0) -> MemoryLimits:
        """Return limits under which the teachers need at most `room` bytes; 0 if even paged teachers need more."""
        limits = replace(self, teachers=min(self.teachers, max(0, room >> 20)))
        while limits.teachers and limits.size(teacher, count, depth) > room:
            below = (_all_bytes(teacher, count, depth, limits.place(teacher, count, depth)) - 1) >> 20
            limits = replace(limits, teachers=max(0, min(below, limits.teachers - 1)))
        return limits

    def shrink(self, teacher: VisionTransformer, count: int, depth: int = 0) -> bool:
        """Convert one of `count` teachers to bf16, in place, if together they exceed the limit as fp32.

        Returns
        -------
        bool
            Whether the teacher is bf16 after the call.
        """
        if is_bf16(teacher):
            return True
        if architecture_of(teacher) is None or self.place(teacher, count, depth) == "held":
            return False
        teacher.to(torch.bfloat16)
        return True


class PagedTeachers(Sequence[VisionTransformer]):
    """K frozen teachers of one architecture, each built from its state at every access and not kept.

    Their outputs equal those of teachers in memory bit for bit; each access costs the time to read the weights. Blocks
    that all teachers share are read once, and all teachers use the same tensors for them.

    Parameters
    ----------
    blank
        A model of the architecture on the CPU; it is copied, not changed.
    states
        K state dicts: `tensors.StoredState` of files that must remain in place, or mappings in memory.
    device
        Device of the teachers.
    depth
        Number of leading blocks that all states share; None: they are compared.

    Attributes
    ----------
    blank
        The copy. Its trunk has the weights that all teachers share.
    depth
        Number of these blocks; 0: no trunk.
    """

    def __init__(
        self, blank: VisionTransformer, states: Sequence[State], device: torch.device, depth: int | None = None
    ) -> None:
        self.blank = copy.deepcopy(blank).eval().requires_grad_(False)
        self.depth = shared_depth(states, len(blank.blocks)) if depth is None else depth
        self._states, self._device = states, device
        if self.depth:
            _fill(self.blank, states[0], self._shared, assign=True)
            move_trunk(self.blank, self.depth, device)

    def _shared(self, name: str) -> bool:
        return self.depth > 0 and in_trunk(name, self.depth)

    def __len__(self) -> int:
        return len(self._states)

    @overload
    def __getitem__(self, place: int) -> VisionTransformer: ...
    @overload
    def __getitem__(self, place: slice) -> list[VisionTransformer]: ...
    def __getitem__(self, place: int | slice) -> VisionTransformer | list[VisionTransformer]:
        if isinstance(place, slice):
            return [self[k] for k in range(*place.indices(len(self)))]
        teacher = with_shared_trunk(self.blank, self.depth)
        # Nothing writes to the weights, so they are used in the file's memory pages without a copy.
        _fill(teacher, self._states[place], lambda name: not self._shared(name), assign=True)
        return teacher.to(self._device).eval().requires_grad_(False)

    def plus(self, model: VisionTransformer) -> PagedTeachers:
        """Return these teachers and one more model of their architecture, whose weights stay in memory."""
        state = {name: value.detach().float().cpu() for name, value in model.state_dict().items()}
        return PagedTeachers(self.blank, [*self._states, state], self._device)

    def take(self, members: Iterable[int], limits: MemoryLimits) -> Sequence[VisionTransformer]:
        """Return the teachers at the positions `members`, in memory if the limits allow it."""
        return load_teachers(self.blank, [self._states[k] for k in members], limits, self._device, self.depth)


def load_teachers(
    blank: VisionTransformer,
    states: Sequence[State],
    limits: MemoryLimits,
    device: torch.device,
    depth: int | None = None,
) -> Sequence[VisionTransformer]:
    """Build teachers from uploads: fp32 if they fit in memory, else bf16 if they fit, else `PagedTeachers`.

    Teachers in memory that share their first blocks have the same tensors there.

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
    depth
        Number of leading blocks that all states share; None: they are compared.
    """
    depth = shared_depth(states, len(blank.blocks)) if depth is None else depth
    if limits.place(blank, len(states), depth) == "paged":
        return PagedTeachers(blank, states, device, depth)
    teachers: list[VisionTransformer] = []
    for state in states:
        if depth and teachers:
            teacher = with_shared_trunk(teachers[0], depth)
            _fill(teacher, state, lambda name: not in_trunk(name, depth))
        else:
            teacher = copy.deepcopy(blank)
            teacher.load_state_dict(state)
            limits.shrink(teacher, len(states), depth)
        teachers.append(teacher.to(device))
    return teachers


def _fill(model: VisionTransformer, state: State, needed: Callable[[str], bool], *, assign: bool = False) -> None:
    """Load the weights of all names for which `needed` is true; with `assign`, use the tensors without a copy.

    Raises
    ------
    RuntimeError
        If the state lacks one of these weights, or has one that the model does not have.
    """
    if isinstance(state, StoredState):
        part = state.read(needed)
    else:
        part = {name: state[name] for name in state if needed(name)}
    found = model.load_state_dict(part, strict=False, assign=assign)
    wrong = [*found.unexpected_keys, *filter(needed, found.missing_keys)]
    if wrong:
        raise RuntimeError(f"weights are missing or have no place in the model: {', '.join(wrong)}")


def numbers_of(teacher: VisionTransformer, depth: int = 0) -> tuple[int, int]:
    """Return how many weights a trunk of `depth` blocks has, and how many all other weights are; 0: no trunk."""
    sizes = {name: parameter.numel() for name, parameter in teacher.named_parameters()}
    trunk = sum(size for name, size in sizes.items() if depth and in_trunk(name, depth))
    return trunk, sum(sizes.values()) - trunk


def _all_bytes(teacher: VisionTransformer, count: int, depth: int, place: Place) -> int:
    """Return the bytes that the weights of all teachers need at a place."""
    copies = 3 if teacher.embed_dim >= WIDE else 2  # original, packed, and transposed
    held = 4 * (1 if architecture_of(teacher) is None else copies)
    trunk, tail = numbers_of(teacher, depth)
    if place == "paged":
        return 4 * trunk
    return {"held": held, "bf16": 2}[place] * (trunk + tail * count)


def is_bf16(teacher: VisionTransformer) -> bool:
    """Return whether a teacher is held as bf16."""
    return all(parameter.dtype == torch.bfloat16 for parameter in teacher.parameters())
