"""The K client models as one frozen function A(x), by default sum_k w_k(c) p_k(c|x).

A further model, the expert, can multiply this distribution by its own: a product of experts (Hinton 2002).

Teachers of an architecture that `packing.py` supports are packed and run by the hand-written passes of `passes.py`.
Other teachers, and calls that need autograd, use `vit.forward_patches`.

If all teachers have the same weights in the patch embedding and the first t blocks, because no client trained them,
these run once for all teachers. A pass then costs t + K (n - t) blocks instead of K n, n blocks of a teacher.

Letters: B images, K teachers, C classes, L patches kept, E pixels of a patch, N tokens, D embedding.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cached_property

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional as F

from fedmitr_flwr.ensemble.combining import COMBINATIONS, Combined, of_logs
from fedmitr_flwr.ensemble.engine.graphs import Graphs
from fedmitr_flwr.ensemble.engine.groups import Groups, Start, Step, group_teachers
from fedmitr_flwr.ensemble.engine.kernels import Arena
from fedmitr_flwr.ensemble.engine.teachers import MemoryLimits, PagedTeachers
from fedmitr_flwr.ensemble.engine.trunk import shared_depth_of_models
from fedmitr_flwr.ensemble.loss_terms import Seen, Term
from fedmitr_flwr.ensemble.outputs import EnsembleOutput, LossGradient, TeacherOutputs
from fedmitr_flwr.models.vit import forward_patches, forward_tokens, forward_trunk
from fedmitr_flwr.settings import Combination

LABEL_ROWS = 1600
"""Number of patches in one forward pass without gradients, so that a small ViT's activations stay in the L2 cache.

The measurements are in `benchmarks/results/engine-constants.md`.
"""


class Ensemble:
    """K frozen teachers with class-wise weights.

    If the weights of a teacher differ between classes, the weighted sum of distributions does not sum to one over the
    classes, so it is divided by its sum. With equal weights for all classes the sum is one.

    The teachers' weights are packed at the first use without autograd; later changes to them have no effect. Teachers
    above the memory limit are converted to bf16 in place; `PagedTeachers` stay on disk.

    Parameters
    ----------
    teachers
        K timm ViTs that `vit.check_supported` accepts, or `PagedTeachers`. They are put into eval mode and frozen.
    weights
        ``(K, C)`` non-negative, each column sums to one.
    limits
        Memory limits; None: the defaults.
    graphs
        State of CUDA graphs that is shared with another ensemble on the same device; None: a new one.
    rule
        How the teachers' outputs are combined, a name in `combining.COMBINATIONS`.
    expert
        A model of the teachers' architecture, frozen like them. A(x) is then multiplied by the softmax of its logits
        and normalised. It is neither a teacher nor drawn, and its attention does not count. None: no expert.

    Raises
    ------
    ValueError
        If there are no teachers, or `weights` does not have one row for each.
    """

    def __init__(
        self,
        teachers: Sequence[VisionTransformer],
        weights: Tensor,
        limits: MemoryLimits | None = None,
        graphs: Graphs | None = None,
        *,
        rule: Combination = "probabilities",
        expert: VisionTransformer | None = None,
    ) -> None:
        if weights.ndim != 2 or len(weights) != len(teachers) or len(teachers) == 0:
            raise ValueError(f"weights of shape {tuple(weights.shape)} do not fit {len(teachers)} teachers")
        self.limits = limits or MemoryLimits()
        self.graphs = graphs or Graphs()
        self.expert = None if expert is None else expert.eval().requires_grad_(False)
        if isinstance(teachers, PagedTeachers):
            self.teachers: Sequence[VisionTransformer] = teachers
            self._models: Sequence[VisionTransformer] = teachers if expert is None else teachers.plus(expert)
            self._hold = False
        else:
            self.teachers = [teacher.eval().requires_grad_(False) for teacher in teachers]
            self._models = self.teachers if expert is None else [*self.teachers, expert]
            count = len(self._models)
            fits = all(self.limits.place(model, count) == "held" for model in self._models)
            depth = 0 if fits else self.shared_blocks  # the comparison of the weights is put off if it is not needed
            self._hold = sum(self.limits.shrink(model, count, depth) for model in self._models) == 0
        self.weights, self.rule = weights, rule
        self._groups: dict[torch.dtype, Groups] = {}
        self._scratch, self._trunk = Arena(), Arena()
        self._kept: list[Arena] = []

    @cached_property
    def shared_blocks(self) -> int:
        """t, the number of leading blocks that have the same weights in all models, the patch embedding included.

        The models are the teachers and the expert. 0 if the first block or the patch embedding differs, or if there is
        one model.
        """
        if isinstance(self._models, PagedTeachers):
            return self._models.depth
        return shared_depth_of_models(self._models)

    def has_trunk_of(self, model: VisionTransformer) -> bool:
        """Return whether the teachers share blocks and a model on their device has the same weights in them."""
        first = self.teachers.blank if isinstance(self.teachers, PagedTeachers) else self.teachers[0]
        return 0 < self.shared_blocks <= shared_depth_of_models([first, model])

    def __call__(
        self,
        patches: Tensor,
        index: Tensor | None = None,
        *,
        attention: bool = False,
        labels: Tensor | None = None,
    ) -> EnsembleOutput:
        """Compute A(x) for patches; gradients flow to `patches`.

        Parameters
        ----------
        patches
            ``(B, L, E)`` flattened normalised patches.
        index
            ``(B, L)`` int64 positions in the full grid; None: all patches, in order.
        attention
            Whether to return the attention too.
        labels
            ``(B,)`` int64 target classes. The attention is averaged over the teachers by their weights for these
            classes; None: by their weights averaged over A(x).

        Raises
        ------
        ValueError
            If `patches` requires a gradient and the teachers are paged: an autograd graph would hold all of them in
            memory. `loss_gradient` works with paged teachers.
        """
        if patches.requires_grad and torch.is_grad_enabled():
            if isinstance(self.teachers, PagedTeachers):
                raise ValueError("teachers read from disk keep no graph for autograd: use Ensemble.loss_gradient")
            logits, seen = self._by_autograd(patches, index)
        else:
            out = self.see(patches, index)
            logits, seen = out.logits, out.attention
        probabilities = self.combine(logits)
        return EnsembleOutput(probabilities, self._share(probabilities, seen, labels) if attention else None)

    def _by_autograd(self, patches: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the logits of all models, in the graph, and the attention ``(K, B, L)`` of the teachers."""
        depth, models, whole = self.shared_blocks, [_fp32(model) for model in self._models], None
        if depth == 0:
            outputs = [forward_patches(model, patches, index, attention=True) for model in models]
        else:
            trunk = forward_trunk(models[0], patches, index, depth, attention=True)
            whole = trunk.attention
            outputs = [forward_tokens(model, trunk.tokens, depth, attention=True) for model in models]
        seen = [whole if out.attention is None else out.attention for out in outputs[: len(self.weights)]]
        logits = torch.stack([out.logits.float() for out in outputs])
        return logits, torch.stack([each.detach() for each in seen if each is not None])

    @torch.no_grad()
    def see(
        self, patches: Tensor, index: Tensor | None = None, *, features: bool = False, tokens: bool = False
    ) -> TeacherOutputs:
        """Return the outputs of every teacher, and the logits of the expert, without autograd.

        Parameters
        ----------
        patches, index
            As for `__call__`.
        features
            Whether to return the [CLS] tokens too.
        tokens
            Whether to return what the teachers' common trunk makes of the patches too.
        """
        (B, L, _), K = patches.shape, len(self.teachers)
        logits = patches.new_empty(self.num_models, B, self.weights.shape[1])
        attention = patches.new_empty(self.num_models, B, L)
        seen, common = None, []
        size = max(1, LABEL_ROWS // L)
        for first in range(0, B, size):
            part = slice(first, first + size)
            start, steps = self._steps(patches[part], None if index is None else index[part], torch.float32)
            start.forward(self._scratch, None)
            if tokens and start.tokens is not None:
                common.append(start.tokens.clone())
            for step in steps:
                out = step.forward(self._scratch, None)
                logits[step.members, part], attention[step.members, part] = out.logits, out.attention
                if features:
                    if seen is None:
                        seen = patches.new_empty(self.num_models, B, out.features.shape[-1])
                    seen[step.members, part] = out.features
        of_teachers = None if seen is None else seen[:K]
        return TeacherOutputs(logits, attention[:K], of_teachers, torch.cat(common) if common else None)

    def loss_gradient(
        self,
        patches: Tensor,
        index: Tensor | None,
        labels: Tensor,
        dtype: torch.dtype = torch.float32,
        terms: Sequence[Term] = (),
    ) -> LossGradient:
        """Compute ``-log A_y`` and its exact gradient with respect to the pixels, in bounded memory for any K.

        The gradient needs the outputs of all teachers first. Their activations are kept until then if they fit in
        `MemoryLimits.activations`; otherwise each teacher runs forward a second time. A trunk that all teachers share
        runs forward and backward once.

        Parameters
        ----------
        patches, index
            ``(B, L, E)`` and ``(B, L)`` as for `__call__`.
        labels
            ``(B,)`` int64.
        dtype
            Number format that the teachers compute in, fp32 or bf16; loss and gradient are summed in fp32.
        terms
            Further loss terms, added to the sum of the losses before the gradient is computed. `LossGradient.loss`
            does not include them.
        """
        with torch.no_grad():
            start, steps = self._steps(patches, index, dtype)
            arenas = self._arenas(start, steps)
            start.forward(self._scratch, self._trunk)
            logits = patches.new_empty(self.num_models, len(patches), self.weights.shape[1])
            seen = patches.new_empty(self.num_models, *patches.shape[:2])
            features = []
            for step, arena in zip(steps, arenas, strict=True):
                out = step.forward(self._scratch, arena)
                logits[step.members], seen[step.members] = out.logits, out.attention
                features += [out.features] if terms else []
        logits.requires_grad_(True)
        with torch.enable_grad():
            probabilities, logs = self._combined(logits)
            loss = -logs.gather(1, labels[:, None]).squeeze(1)
            total, leaves = loss.sum(), [logits]
            if terms:
                leaves += [leaf.detach().requires_grad_(True) for leaf in (patches, *features)]
                weights = F.pad(self.weights, (0, 0, 0, self.num_models - len(self.weights)))  # 0 for the expert
                shares = [weights[step.members][:, labels] for step in steps]
                look = Seen(leaves[1], index, labels, probabilities, leaves[2:], shares)
                total = total + sum(term(look) for term in terms)
            upstream, *more = torch.autograd.grad(total, leaves, allow_unused=True)
        nothing: list[Tensor | None] = [None] * (1 + len(steps))
        direct, *of_features = more or nothing
        probabilities = probabilities.detach()
        with torch.no_grad():
            gradient = steps[0].backward(self._scratch, upstream[steps[0].members], of_features[0])
            for step, of in zip(steps[1:], of_features[1:], strict=True):
                gradient += step.backward(self._scratch, upstream[step.members], of)
            gradient = start.backward(self._scratch, gradient)
            if direct is not None:
                gradient += direct
        attention = self._share(probabilities, seen[: len(self.teachers)], labels)
        return LossGradient(loss.detach(), gradient, attention, probabilities)

    def combine(self, logits: Tensor) -> Tensor:
        """Combine logits into the ensemble's ``(B, C)`` probabilities.

        Parameters
        ----------
        logits
            ``(K, B, C)`` of the teachers; with an expert ``(K + 1, B, C)``, its logits last, as `see` returns them.

        Raises
        ------
        ValueError
            If there are more or fewer logits than models.
        """
        return self._combined(logits).probabilities

    def _combined(self, logits: Tensor) -> Combined:
        if len(logits) != self.num_models:
            raise ValueError(f"logits of {len(logits)} models do not fit an ensemble of {self.num_models}")
        if self.expert is None:
            return COMBINATIONS[self.rule](logits, self.weights)
        return of_logs(COMBINATIONS[self.rule](logits[:-1], self.weights).logs + logits[-1])

    def _share(self, probabilities: Tensor, seen: Tensor, labels: Tensor | None) -> Tensor:
        """Return the ``(B, L)`` mean of the teachers' attention, weighted by their class weights."""
        if labels is None:
            share = probabilities.detach() @ self.weights.T  # (B, K)
            share = share / share.sum(-1, keepdim=True)
        else:
            share = self.weights[:, labels].T
        return torch.einsum("bk,kbl->bl", share, seen)

    def draw(self, count: int, labels: Tensor, generator: torch.Generator) -> Ensemble:
        """Draw `count` teachers without replacement, by their weights for the classes of `labels`.

        The weights of a drawn teacher are divided by its approximate probability of being drawn,
        ``1 - (1 - q)^count`` for its share q, so that teachers that are rarely drawn weigh more when they are. Then the
        weights are normalised for each class again.

        Parameters
        ----------
        count
            Number of teachers; 0 or at least K: return this ensemble and draw nothing.
        labels
            ``(B,)`` int64.
        generator
            CPU generator.
        """
        K = len(self.teachers)
        if count == 0 or count >= K:
            return self
        share = self.weights[:, labels].mean(1).double().cpu()
        share = share / share.sum()
        members = torch.multinomial(share + 1e-12, count, generator=generator).sort().values
        likely = 1 - (1 - share[members]) ** count
        weights = self.weights[members.to(labels.device)] / likely.to(self.weights)[:, None].clamp_min(1e-6)
        total = weights.sum(0)
        weights = torch.where(total > 0, weights / total.clamp_min(1e-30), torch.full_like(weights, 1 / count))
        if isinstance(self.teachers, PagedTeachers):
            return self.with_weights(weights, self.teachers.take(members.tolist(), self.limits))
        return self.with_weights(weights, [self.teachers[k] for k in members.tolist()])

    def with_weights(self, weights: Tensor, teachers: Sequence[VisionTransformer] | None = None) -> Ensemble:
        """Return an ensemble with other weights, and otherwise as this one.

        Parameters
        ----------
        weights
            ``(K, C)`` weights of its teachers.
        teachers
            Its K teachers; None: the same.
        """
        chosen = self.teachers if teachers is None else teachers
        return Ensemble(chosen, weights, self.limits, self.graphs, rule=self.rule, expert=self.expert)

    def release(self) -> None:
        """Free the memory of the activations."""
        self._scratch, self._trunk = Arena(), Arena()
        self._kept = []

    @property
    def num_models(self) -> int:
        """Number of models that a pass runs: K teachers, and the expert if there is one."""
        return len(self._models)

    @property
    def held(self) -> bool:
        """Whether the packed weights stay in memory between passes; if False, they are packed again for each pass."""
        return self._hold

    @property
    def buffers(self) -> list[Tensor]:
        """Buffers that the passes write to, until `release`."""
        return [buffer for arena in (self._scratch, self._trunk, *self._kept) for buffer in arena.buffers]

    @property
    def activation_bytes(self) -> int:
        """Size in bytes of the buffers that the passes use, until `release`."""
        return sum(arena.bytes for arena in (self._scratch, self._trunk, *self._kept))

    def _steps(self, patches: Tensor, index: Tensor | None, dtype: torch.dtype) -> tuple[Start, list[Step]]:
        if dtype not in self._groups:
            self._groups[dtype] = group_teachers(self._models, dtype, self._hold, self.shared_blocks)
        return self._groups[dtype].steps(patches, index)

    def _arenas(self, start: Start, steps: list[Step]) -> list[Arena] | list[None]:
        """Return the buffers for each step's activations; None for every step if they exceed the limit.

        The activations of the trunk count once, and are always kept: they need no more memory than those of a teacher.
        """
        needed = start.bytes() + sum(step.bytes() for step in steps)
        if len(steps) > 1 and needed > self.limits.activations << 20:
            self._kept.clear()
            return [None] * len(steps)
        self._kept += [Arena() for _ in range(len(steps) - len(self._kept))]
        return self._kept[: len(steps)]


def _fp32(model: VisionTransformer) -> VisionTransformer:
    return model if model.patch_embed.proj.weight.dtype == torch.float32 else copy.deepcopy(model).float()
