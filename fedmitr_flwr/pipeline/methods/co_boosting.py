"""Co-Boosting (Dai et al., ICLR 2024, arXiv 2402.15070): hard samples and the ensemble's weights improve each other.

A generator as in DENSE, with three changes. Cross-entropy is weighted by how hard an image is for the ensemble, and the
student's disagreement counts everywhere: ``(1 - A_y) CE(A(x), y) - l T^2 KL(A(x)^(1/T) || s(x)^(1/T))``, T = 3. The
teachers' say is learnt on the images made so far, by steps of the sign of the gradient of CE(A(x), y). And before the
student sees an image, it is moved by `generator.perturbation` along the sign of the gradient of a random direction of
the ensemble's output at temperature 4, so that images are diverse, and the ensemble labels what comes out.

Constants are those of the authors' code: l = 1, perturbation 8/255, hardness to the power 1, weights from 1/K between
0 and 1, step 0.01 for ten clients (the paper's 0.1/K) and 0.99 of it after each round.

Departures beside those of `baselines.generated`: one number a teacher multiplies its class-wise weights of
`ensemble.weighting`, where the authors weight logits; under ``uniform`` it is their weight of probabilities. Perturbed
pixels are clipped to the valid range. Only as many images are perturbed as the student takes before the next round, and
mixed and random images (`distill.mix`, `distill.noise`) are not.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fedmitr_flwr.ensemble.ensemble import Ensemble
from fedmitr_flwr.models.patch_grid import PatchGrid
from fedmitr_flwr.pipeline.inputs import PipelineInputs, PipelineResult
from fedmitr_flwr.pipeline.methods.common import Method
from fedmitr_flwr.pipeline.methods.generator import InTurn, cross_entropy, divergence, generated_images
from fedmitr_flwr.stages.distillation.pool import Pool, label_patches, unnamed_pool
from fedmitr_flwr.stages.relabel import soften

DECAY = 0.99
TEMPERATURE = 3.0
DIRECTION_TEMPERATURE = 4.0


def co_boosting(inputs: PipelineInputs) -> PipelineResult:
    """See `pipeline.run_pipeline`; the result's ensemble is the one with the learnt weights."""
    method = _CoBoosting(inputs)
    result = method.run()
    return replace(result, ensemble=method.ensemble)


class _CoBoosting(InTurn):
    def __init__(self, inputs: PipelineInputs) -> None:
        super().__init__(inputs)
        K = len(self.teachers.teachers)
        self.ensemble, self.say = self.teachers, torch.full((K,), 1 / K, device=inputs.device)
        self._step = 0.1 / K
        self._logits = torch.empty(K, 0, self.teachers.weights.shape[1], device=inputs.device)

    def loss(self, patches: Tensor, labels: Tensor) -> Tensor:
        seen = self.ensemble(patches).probabilities
        return hard_loss(seen, self.student_logits(patches), labels, self.settings.adversarial)

    def extend(self, patches: Tensor, labels: Tensor) -> None:
        """Learn the teachers' say: one pass over all images that have a label, a step for each batch of them."""
        named = labels >= 0
        self._logits = torch.cat([self._logits, self.teachers.see(patches[named]).logits], 1)
        known = torch.cat([self.labels[self.labels >= 0], labels[named]])
        order = torch.randperm(len(known), generator=self.random).to(known.device)
        for rows in order.split(self.settings.batch_size):
            self.say = step_of_say(self.teachers, self.say, self._logits[:, rows], known[rows], self._step)
        self._step *= DECAY
        self.ensemble = reweighted(self.teachers, self.say)

    def pool(self, steps: int) -> Pool:
        """As many images as `steps` take, drawn anew, perturbed and labelled by the ensemble as it is now."""
        wanted, size = steps * self.recipe.batch_size, len(self.labels)
        passes = [torch.randperm(size, generator=self.random) for _ in range(-(-wanted // size))]
        rows = torch.cat(passes)[:wanted].to(self.labels.device)
        patches = self.patches[rows]
        named = (self.labels[rows] >= 0).nonzero().squeeze(1)
        for part in named.split(self.settings.batch_size):
            patches[part] = perturbed(self.ensemble, patches[part], self.grid, self.settings.perturbation, self.random)
        return unnamed_pool(patches, label_patches(self.ensemble, patches, self.recipe))


def hard_loss(probabilities: Tensor, logits: Tensor, labels: Tensor, weight: float) -> Tensor:
    """``(1 - A_y) CE(A, y) - weight T^2 KL(A^(1/T) || s^(1/T))`` of each image, ``(B,)``; T = 3.

    Parameters
    ----------
    probabilities, logits
        ``(B, C)`` A(x) and the student's logits; gradients flow to both, but not through the hardness ``1 - A_y``.
    labels
        ``(B,)`` int64.
    """
    hardness = 1 - probabilities.detach().gather(1, labels[:, None]).squeeze(1)
    return hardness * cross_entropy(probabilities, labels) - weight * divergence(probabilities, logits, TEMPERATURE)


def reweighted(ensemble: Ensemble, say: Tensor) -> Ensemble:
    """The ensemble with each teacher's class-wise weights times its say, ``(K,)``, normalised for each class again.

    A class whose teachers all have lost their say keeps its weights.
    """
    scaled = ensemble.weights * say[:, None]
    total = scaled.sum(0)
    weights = torch.where(total > 0, scaled / total.clamp_min(1e-12), ensemble.weights)
    return Ensemble(ensemble.teachers, weights, ensemble.limits)


def step_of_say(ensemble: Ensemble, say: Tensor, logits: Tensor, labels: Tensor, size: float) -> Tensor:
    """Move each teacher's say by `size` against the sign of the gradient of CE(A(x), y), within 0 and 1; ``(K,)``.

    Parameters
    ----------
    ensemble
        With the weights as they were before any say.
    logits
        ``(K, B, C)`` of its teachers.
    labels
        ``(B,)`` int64.
    """
    say = say.detach().requires_grad_(True)
    loss = cross_entropy(reweighted(ensemble, say).combine(logits), labels).mean()
    (gradient,) = torch.autograd.grad(loss, say)
    return (say.detach() - size * gradient.sign()).clamp(0.0, 1.0)


def perturbed(ensemble: Ensemble, patches: Tensor, grid: PatchGrid, size: float, generator: torch.Generator) -> Tensor:
    """Move images along the sign of the gradient of ``v . A(x)^(1/4)``, v uniform in [-1, 1]^C (ODS, Tashiro 2020).

    Parameters
    ----------
    patches
        ``(B, P, E)`` within the valid range, where they stay.
    size
        How far each pixel moves, in 255ths of the range of its channel.
    generator
        CPU generator of the directions.
    """
    patches = patches.detach().requires_grad_(True)
    softer = soften(ensemble(patches).probabilities, DIRECTION_TEMPERATURE)
    direction = (2 * torch.rand(softer.shape, generator=generator) - 1).to(softer.device)
    (gradient,) = torch.autograd.grad((direction * softer).sum(), patches)
    low, high = grid.bounds(patches.device)
    moved = patches.detach() + gradient.sign() * (high - low) * (size / 255)
    return torch.minimum(torch.maximum(moved, low), high)


CO_BOOSTING = Method(
    co_boosting, "Co-Boosting ([arXiv 2402.15070](https://arxiv.org/abs/2402.15070))", generated_images, generates=True
)
