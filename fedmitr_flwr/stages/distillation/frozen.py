"""The part of the student that distillation does not train, and what it makes of the images of the pool.

`distill.trainable` names the part that is trained. Blocks before it are frozen together with the patch embedding. Their
output for an image is the same in every step, so it is computed once for each image of the pool and kept. A step then
runs the remaining blocks alone. The full images and their high- and low-density patches are different inputs of the
frozen blocks, because attention mixes the patches; the output is kept for each of them.

Kept tokens are fp32 if they fit in `distill.cache-memory-mb`, else bf16 if these fit. Otherwise each step runs the
frozen blocks again, without autograd.

Letters: B images, L patches, N tokens, D embedding, E pixels of a patch, Q rows that the head reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from fedmitr_flwr.ensemble.ensemble import Ensemble
from fedmitr_flwr.models.trainable import blocks_before, train_mode
from fedmitr_flwr.models.vit import forward_trunk, in_trunk, read_tokens
from fedmitr_flwr.settings import DistillSettings
from fedmitr_flwr.stages.density import subsets
from fedmitr_flwr.stages.distillation.teacher_heads import last_norms

KEY = "distill.trainable"


@dataclass(frozen=True)
class FrozenPart:
    """What distillation does not train.

    Attributes
    ----------
    blocks
        Number of leading blocks that are frozen together with the patch embedding; None: nothing is frozen.
    norm
        Whether the last norm is frozen too, so that only the classifier head is trained.
    """

    blocks: int | None
    norm: bool = False


def frozen_part(value: str, depth: int, shared_blocks: int = 0, shared_norm: bool = False) -> FrozenPart:
    """Return what `distill.trainable` freezes.

    Parameters
    ----------
    value
        The setting.
    depth
        Number of blocks of the student.
    shared_blocks
        For `auto`: number of leading blocks that no client trained.
    shared_norm
        For `auto`: whether no client trained the last norm either.

    Raises
    ------
    SettingsError
        If the model has fewer blocks than `last-N` names.
    """
    if value == "all" or (value == "auto" and shared_blocks == 0):
        return FrozenPart(None)
    if value == "auto":
        return FrozenPart(shared_blocks, norm=shared_blocks == depth and shared_norm)
    if value == "head":
        return FrozenPart(depth, norm=True)
    return FrozenPart(blocks_before(value, depth, KEY))


def clients_part(value: str, ensemble: Ensemble) -> FrozenPart:
    """Return what `distill.trainable` freezes, given the teachers.

    Raises
    ------
    SettingsError
        As for `frozen_part`.
    """
    depth, shared = len(ensemble.teachers[0].blocks), ensemble.shared_blocks
    return frozen_part(value, depth, shared, value == "auto" and shared == depth and _same_norm(ensemble))


def _same_norm(ensemble: Ensemble) -> bool:
    """Return whether all teachers have the same norm between the last block and the head."""
    first = list(last_norms(ensemble.teachers[0]).parameters())
    others = (last_norms(teacher).parameters() for teacher in ensemble.teachers)
    return all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def freeze(student: VisionTransformer, part: FrozenPart) -> None:
    """Let the student train all parameters but those of the frozen part."""
    for name, parameter in student.named_parameters():
        frozen = part.blocks is not None and in_trunk(name, part.blocks)
        parameter.requires_grad_(not frozen and not (part.norm and name.startswith(("norm.", "fc_norm."))))


class StudentTrunk:
    """The frozen blocks of a student, whose output for the images of a pool is kept.

    Parameters
    ----------
    student
        The student with its starting weights, on its device.
    blocks
        Number of frozen blocks, at least 1.
    ensemble
        The teachers. If they have the same frozen blocks, their outputs are computed from the same tokens.
    dtype
        Number format of the kept tokens, fp32 or bf16.
    """

    def __init__(self, student: VisionTransformer, blocks: int, ensemble: Ensemble, dtype: torch.dtype) -> None:
        self.blocks, self.dtype = blocks, dtype
        self._student = student
        self.shared = blocks == ensemble.shared_blocks and ensemble.has_trunk_of(student)

    @torch.no_grad()
    def __call__(self, patches: Tensor, index: Tensor | None = None) -> Tensor:
        """Return the tokens of ``(B, L, E)`` patches at ``(B, L)`` grid positions: ``(B, N, D)`` or ``(B, Q, D)``."""
        training = self._student.training
        self._student.eval()
        tokens = forward_trunk(self._student, patches, index, self.blocks).tokens
        if training:
            train_mode(self._student)
        return tokens.to(self.dtype)

    def empty(self, device: torch.device) -> Tensor:
        """Return no tokens, ``(0, D)``."""
        return torch.empty(0, self._student.embed_dim, dtype=self.dtype, device=device)


def student_trunk(
    student: VisionTransformer,
    part: FrozenPart,
    ensemble: Ensemble,
    settings: DistillSettings,
    images: int,
    inverted: int,
) -> StudentTrunk | None:
    """Return the frozen blocks of a student if their output is kept, else None.

    Parameters
    ----------
    student, part, ensemble
        As for `StudentTrunk` and `freeze`.
    settings
        `distill.cache-memory-mb`, and the loss terms that need the tokens of a part of the patches.
    images
        Largest number of images of pools in memory.
    inverted
        Number of these with a density split.
    """
    if part.blocks is None or part.blocks == 0:
        return None
    dtype = keeps_tokens(student, part.blocks, settings, images, inverted)
    return None if dtype is None else StudentTrunk(student, part.blocks, ensemble, dtype)


def keeps_tokens(
    student: VisionTransformer, blocks: int, settings: DistillSettings, images: int, inverted: int
) -> torch.dtype | None:
    """Return the number format of kept tokens: fp32 or bf16, or None if they exceed `distill.cache-memory-mb`.

    Parameters
    ----------
    student, settings, images, inverted
        As for `student_trunk`.
    blocks
        Number of frozen blocks.
    """
    numbers, limit = token_numbers(student, blocks, settings, images, inverted), settings.cache_memory_mb << 20
    return next((dtype for dtype in (torch.float32, torch.bfloat16) if numbers * dtype.itemsize <= limit), None)


def token_numbers(
    student: VisionTransformer, blocks: int, settings: DistillSettings, images: int, inverted: int
) -> int:  # fmt: skip
    """Return an upper bound on how many numbers the kept tokens have; parameters as for `student_trunk`."""
    P, prefix = student.patch_embed.num_patches, student.num_prefix_tokens
    parts = int(uses_high(settings)) + int(settings.low_weight > 0)
    if blocks == len(student.blocks):
        tokens = read_tokens(student) * (images + parts * inverted)
    else:  # the parts of an image have each of its patches at most once
        tokens = images * (P + prefix) + inverted * (min(parts, 1) * P + parts * prefix)
    return int(tokens * student.embed_dim)


def uses_high(settings: DistillSettings) -> bool:
    """Return whether a loss term needs the student's output for the high-density patches alone."""
    return settings.ce_weight > 0 and settings.ce_on == "high"


@dataclass(frozen=True)
class PartTokens:
    """Tokens of a part of each image's patches, for B images.

    Attributes
    ----------
    flat
        Tokens of all images, one image after the other, ``(sum of N, D)``.
    first
        ``(B,)`` int64 position of each image's first token.
    """

    flat: Tensor
    first: Tensor

    def __getitem__(self, rows: Tensor) -> PartTokens:
        return PartTokens(self.flat, self.first[rows])

    def of(self, rows: Tensor, count: int) -> Tensor:
        """Return the tokens ``(b, count, D)`` fp32 of images that have `count` tokens each."""
        places = self.first[rows][:, None] + torch.arange(count, device=rows.device)
        return self.flat[places].float()

    @classmethod
    def of_patches(cls, trunk: StudentTrunk, patches: Tensor, mask: Tensor, batch_size: int = 128) -> PartTokens:
        """Compute the tokens of the ``(B, P)`` masked patches of images, given all ``(B, P, E)`` patches."""
        flat, first, end = [], torch.zeros(len(mask), dtype=torch.int64, device=mask.device), 0
        for rows, index in subsets(mask):
            for some, places in zip(rows.split(batch_size), index.split(batch_size), strict=True):
                chosen = patches[some].gather(1, places[..., None].expand(-1, -1, patches.shape[-1]))
                tokens = trunk(chosen, places)
                first[some] = end + tokens.shape[1] * torch.arange(len(some), device=mask.device)
                flat.append(tokens.flatten(0, 1))
                end += len(flat[-1])
        return cls(torch.cat(flat) if flat else trunk.empty(patches.device), first)

    @staticmethod
    def join(parts: Sequence[PartTokens]) -> PartTokens:
        """Concatenate the tokens of all images of `parts`."""
        flat, first, end = [], [], 0
        for part in parts:
            flat.append(part.flat)
            first.append(part.first + end)
            end += len(part.flat)
        return PartTokens(torch.cat(flat), torch.cat(first))
