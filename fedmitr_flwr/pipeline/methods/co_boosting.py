"""Co-Boosting (Dai et al., ICLR 2024, arXiv 2402.15070): hard samples and the ensemble's weights improve each other.

A generator is trained as in DENSE, with three changes:

- The generator minimises ``(1 - A_y) CE(A(x), y) - l T^2 KL(A(x)^(1/T) || s(x)^(1/T))``, T = 3. The first factor gives
  images that are hard for the ensemble a higher weight. The second term, the student's disagreement, applies to all
  images.
- The ensemble weights are learnt. After each round, one weight for each teacher is updated on all images generated so
  far, by steps against the sign of the gradient of CE(A(x), y).
- The student is trained on perturbed images. Each image is moved by `generator.perturbation` along the sign of the
  gradient of a random linear combination of the ensemble's outputs at temperature 4, which makes the images more
  diverse. The ensemble labels the perturbed images.

Constants are those of the authors' code: l = 1; perturbation 8/255; hardness to the power 1; teacher weights start at
1/K and stay between 0 and 1; step 0.01 for ten clients (0.1/K in the paper), multiplied by 0.99 after each round.

Departures, besides those in `generator.py`:

- The learnt weight of a teacher is a factor on its class-wise weights of `ensemble.weighting`; the authors weight the
  logits of the teachers. With ``uniform`` the factors are the teachers' weights in the mean of the probabilities.
- Perturbed pixels are clipped to the valid range.
- Only as many images are perturbed as the student uses before the next round.
- Mixed and random images (`distill.mix`, `distill.noise`) are not perturbed.

Letters: K teachers, B images, C classes, P patches of the full grid, E pixels of a patch.
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
    """Run Co-Boosting; see `fedmitr.run_pipeline`. The result's ensemble has the learnt weights."""
    method = _CoBoosting(inputs)
    result = method.run()
    return replace(result, ensemble=method.ensemble)


class _CoBoosting(InTurn):
    def __init__(self, inputs: PipelineInputs) -> None:
        super().__init__(inputs)
        K = len(self.teachers.teachers)
        self.ensemble, self.vote_weights = self.teachers, torch.full((K,), 1 / K, device=inputs.device)
        self._step = 0.1 / K
        self._logits = torch.empty(self.teachers.num_models, 0, self.teachers.weights.shape[1], device=inputs.device)

    def loss(self, patches: Tensor, labels: Tensor) -> Tensor:
        seen = self.ensemble(patches).probabilities
        return hard_loss(seen, self.student_logits(patches), labels, self.settings.adversarial)

    def extend(self, patches: Tensor, labels: Tensor) -> None:
        """Update the teachers' vote weights in one pass over all images with a label, one step for each batch."""
        named = labels >= 0
        self._logits = torch.cat([self._logits, self.teachers.see(patches[named]).logits], 1)
        known = torch.cat([self.labels[self.labels >= 0], labels[named]])
        order = torch.randperm(len(known), generator=self.random).to(known.device)
        for rows in order.split(self.settings.batch_size):
            logits = self._logits[:, rows]
            self.vote_weights = vote_weight_step(self.teachers, self.vote_weights, logits, known[rows], self._step)
        self._step *= DECAY
        self.ensemble = reweighted(self.teachers, self.vote_weights)

    def pool(self, steps: int) -> Pool:
        """Draw as many images as `steps` steps need, perturb them and label them by the current ensemble."""
        wanted, size = steps * self.recipe.batch_size, len(self.labels)
        passes = [torch.randperm(size, generator=self.random) for _ in range(-(-wanted // size))]
        rows = torch.cat(passes)[:wanted].to(self.labels.device)
        patches = self.patches[rows]
        named = (self.labels[rows] >= 0).nonzero().squeeze(1)
        for part in named.split(self.settings.batch_size):
            patches[part] = perturbed(self.ensemble, patches[part], self.grid, self.settings.perturbation, self.random)
        return unnamed_pool(patches, label_patches(self.ensemble, patches, self.recipe, trunk=self.trunk))


def hard_loss(probabilities: Tensor, logits: Tensor, labels: Tensor, weight: float) -> Tensor:
    """Return ``(1 - A_y) CE(A, y) - weight T^2 KL(A^(1/T) || s^(1/T))`` of each image, ``(B,)``; T = 3.

    Parameters
    ----------
    probabilities, logits
        ``(B, C)`` A(x) and the student's logits; gradients flow to both, but not through the hardness ``1 - A_y``.
    labels
        ``(B,)`` int64.
    weight
        l, the weight of the student's disagreement; 0: off.
    """
    hardness = 1 - probabilities.detach().gather(1, labels[:, None]).squeeze(1)
    return hardness * cross_entropy(probabilities, labels) - weight * divergence(probabilities, logits, TEMPERATURE)


def reweighted(ensemble: Ensemble, vote_weights: Tensor) -> Ensemble:
    """Multiply the teachers' class-wise weights by ``(K,)`` vote weights, and normalise them in each class again.

    A class in which all products are 0 keeps its weights.
    """
    scaled = ensemble.weights * vote_weights[:, None]
    total = scaled.sum(0)
    weights = torch.where(total > 0, scaled / total.clamp_min(1e-12), ensemble.weights)
    return ensemble.with_weights(weights)


def vote_weight_step(ensemble: Ensemble, vote_weights: Tensor, logits: Tensor, labels: Tensor, size: float) -> Tensor:
    """Move each vote weight by `size` against the sign of the gradient of CE(A(x), y); ``(K,)``, clipped to 0..1.

    Parameters
    ----------
    ensemble
        The ensemble with its original weights, before any vote weights are applied.
    vote_weights
        ``(K,)`` current vote weights.
    logits
        ``(K, B, C)`` logits of its teachers, or with those of its expert as in `Ensemble.combine`.
    labels
        ``(B,)`` int64.
    size
        Size of the step.
    """
    vote_weights = vote_weights.detach().requires_grad_(True)
    loss = cross_entropy(reweighted(ensemble, vote_weights).combine(logits), labels).mean()
    (gradient,) = torch.autograd.grad(loss, vote_weights)
    return (vote_weights.detach() - size * gradient.sign()).clamp(0.0, 1.0)


def perturbed(ensemble: Ensemble, patches: Tensor, grid: PatchGrid, size: float, generator: torch.Generator) -> Tensor:
    """Move images along the sign of the gradient of ``v . A(x)^(1/4)``, v uniform in [-1, 1]^C (ODS, Tashiro 2020).

    Parameters
    ----------
    patches
        ``(B, P, E)`` within the valid range. The result is clipped to this range.
    size
        Distance by which each pixel moves, in 255ths of the range of its channel; 0: no change.
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
