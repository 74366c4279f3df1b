"""What DENSE and Co-Boosting share: a generator trained anew for each batch, in turn with the student.

In each of `generator.rounds` rounds the generator starts from fresh weights and is trained against the ensemble for
`generator.iterations` updates, with its latent vectors; its best batch joins all earlier ones, and the student learns
from them. Generator, optimiser and their constants are those of DENSE's published code, which Co-Boosting took over:
three convolutions behind a linear map, Adam(1e-3, 0.5, 0.999), latent size 256, 30 updates, 200 rounds. The batch of
128 is that of Co-Boosting's commands for both methods; DENSE's own has 256.

Departures, for both methods:

- The student starts from `distill.start` and learns under `distill.steps`, optimiser and temperature, by KL to the
  ensemble and by what each teacher makes of an image (published: KL alone), and the ensemble is A(x) with
  `ensemble.weighting`: whatever FedMITR has beside its images, they have too. The steps are spread over the rounds as
  one pass of the growing pool each would spread them, which is the published schedule.
- `distill.views`, `distill.mix` and `distill.noise` add the further images that FedMITR's pool has, as many random
  images as FedMITR would take; the published methods have 1, 0 and 0.
- The generator's images are augmented by `distill.augment` before the ensemble sees them (published: crop and flip).
- A ViT keeps no batch statistics, and LayerNorm has none to compare with, so the stability term on them is absent.
- Labels are drawn from the classes that at least one client knows.
- Images of other sizes than 32: the first map has side S / 4, beyond 64 pixels there are more doublings instead.

Letters: B images of a batch, N of the pool, P patches, E pixels of a patch, C classes, Z latent size.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedmitr_flwr.models.build import build_model
from fedmitr_flwr.models.patch_grid import PatchGrid
from fedmitr_flwr.models.vit import forward_patches
from fedmitr_flwr.pipeline.inputs import PipelineInputs, PipelineResult
from fedmitr_flwr.pipeline.methods.common import untrained_result
from fedmitr_flwr.pipeline.steps import distilled, make_ensemble, student_start
from fedmitr_flwr.settings import GeneratorSettings, Settings
from fedmitr_flwr.stages.density import PatchSplit
from fedmitr_flwr.stages.distillation.pool import Pool, gather
from fedmitr_flwr.stages.relabel import soften
from fedmitr_flwr.stages.synthetic import SyntheticImages
from fedmitr_flwr.training.augment import augment


class Generator(nn.Module):
    """Images from latent vectors, within the valid pixel range.

    Parameters
    ----------
    grid
        Geometry and range of the images.
    settings
        Latent size, and channels of the last hidden map; the others have twice as many.
    """

    low: Tensor
    high: Tensor

    def __init__(self, grid: PatchGrid, settings: GeneratorSettings) -> None:
        super().__init__()
        size, width = grid.image_size, settings.width
        doublings = max(2, math.ceil(math.log2(size / 16)))
        self.size, self.side = size, math.ceil(size / 2**doublings)
        self.register_buffer("low", grid.low.view(-1, 1, 1))
        self.register_buffer("high", grid.high.view(-1, 1, 1))
        self.first = nn.Linear(settings.latent, 2 * width * self.side**2)
        layers: list[nn.Module] = [nn.BatchNorm2d(2 * width)]
        for number in range(doublings):
            out = width if number == doublings - 1 else 2 * width
            convolution = nn.Conv2d(2 * width, out, 3, padding=1, bias=False)
            layers += [nn.Upsample(scale_factor=2), convolution, nn.BatchNorm2d(out), nn.LeakyReLU(0.2)]
        self.body = nn.Sequential(*layers, nn.Conv2d(width, grid.channels, 3, padding=1), nn.Sigmoid())

    def forward(self, latent: Tensor) -> Tensor:
        """``(B, Z)`` latent vectors to ``(B, ch, S, S)`` normalised images."""
        maps = self.first(latent).view(len(latent), -1, self.side, self.side)
        images: Tensor = self.body(maps)[..., : self.size, : self.size]
        return self.low + (self.high - self.low) * images

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """Draw all weights anew: N(0, 0.02), scales of the norms N(1, 0.02), biases 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.BatchNorm2d):
                mean = 1.0 if isinstance(module, nn.BatchNorm2d) else 0.0
                module.weight.copy_(mean + 0.02 * torch.randn(module.weight.shape, generator=generator))
                if module.bias is not None:
                    module.bias.zero_()


def generate(
    net: Generator,
    count: int,
    loss: Callable[[Tensor], Tensor],
    settings: GeneratorSettings,
    generator: torch.Generator,
) -> Tensor:
    """Train a generator from fresh weights, and return the batch that had the least loss; ``(count, ch, S, S)``.

    Parameters
    ----------
    net
        In train mode, as its norms take the batch's own statistics.
    loss
        Of ``(count, ch, S, S)`` images, a scalar.
    generator
        CPU generator of weights and latent vectors.
    """
    net.reset(generator)
    latent = torch.randn(count, net.first.in_features, generator=generator).to(net.first.weight.device)
    learnt = [latent.requires_grad_(True), *net.parameters()]
    optimizer = torch.optim.Adam(learnt, settings.learning_rate, betas=(0.5, 0.999))
    best, lowest = torch.empty(0), math.inf
    for _ in range(settings.iterations):
        images: Tensor = net(latent)
        value = loss(images)
        if float(value) < lowest:
            best, lowest = images.detach(), float(value)
        for weight, gradient in zip(learnt, torch.autograd.grad(value, learnt), strict=True):
            weight.grad = gradient  # no other model's weights get one
        optimizer.step()
    if not math.isfinite(lowest):
        raise RuntimeError("the generator's loss is not finite; lower generator.learning-rate")
    return best


class InTurn(ABC):
    """Generation and distillation in turn: one run of a method.

    Parameters
    ----------
    inputs
        As for `pipeline.run_pipeline`.

    Attributes
    ----------
    teachers
        The ensemble as it was made of the uploads.
    patches, labels
        ``(N, P, E)`` and ``(N,)``: everything generated so far, with its further images; label -1 for those that have
        none.
    """

    def __init__(self, inputs: PipelineInputs) -> None:
        settings = inputs.settings
        self.inputs, self.settings = inputs, settings.generator
        self.teachers, self.known = make_ensemble(inputs)
        self.student = build_model(settings.model, inputs.spec)
        self.grid = PatchGrid.of(self.student, inputs.spec)
        self.recipe = settings.distill.model_copy(update={"kl_weight": 1.0, "ce_weight": 0.0, "low_weight": 0.0})
        self.random = torch.Generator().manual_seed(inputs.seed)
        with torch.random.fork_rng(devices=[]):
            self.net = Generator(self.grid, self.settings).to(inputs.device)
        self.patches = torch.empty(0, device=inputs.device)
        self.labels = torch.empty(0, dtype=torch.int64, device=inputs.device)
        self._made: list[SyntheticImages] = []
        self._starts = round_starts(self.settings.rounds, self.recipe.steps)

    @abstractmethod
    def loss(self, patches: Tensor, labels: Tensor) -> Tensor:
        """``(B,)`` what the generator minimises, of ``(B, P, E)`` patches and ``(B,)`` labels."""

    @abstractmethod
    def extend(self, patches: Tensor, labels: Tensor) -> None:
        """Take ``(M, P, E)`` new patches of the pool and their ``(M,)`` labels, before they join the others."""

    @abstractmethod
    def pool(self, steps: int) -> Pool:
        """What the student learns from in the next `steps` steps."""

    def run(self) -> PipelineResult:
        """Return the student; the generated images are the result's synthetic ones, every patch of them kept."""
        inputs, result = self.inputs, untrained_result(self.inputs, self.teachers)
        with inputs.observer.stage("distill"):
            self.student.load_state_dict(student_start(inputs, self.teachers, result.fedavg))
            self.student.to(inputs.device)
            first = self._grow(0)
            assert first is not None
            state = distilled(inputs, self.teachers, self.student, first, self.recipe, self.random, grow=self._grow)
        made = SyntheticImages.join(self._made)
        split = PatchSplit(torch.ones_like(made.kept, dtype=torch.bool))
        seconds = dict(inputs.observer.seconds)
        return replace(result, state=state, synthetic=made, split=split, seconds=seconds)

    def _grow(self, step: int) -> Pool | None:
        """Hold the rounds that are due before a step of the student; None if there are none."""
        pool = None
        while self._starts and self._starts[0] <= step:
            start = self._starts.pop(0)
            self._round()
            steps = (self._starts[0] if self._starts else self.recipe.steps) - start
            pool = self.pool(steps) if steps > 0 else pool
        return pool

    def _round(self) -> None:
        """Generate a batch and add it to the pool."""
        count, number = self.settings.batch_size, len(self._made)
        chosen = torch.randint(len(self.known), (count,), generator=self.random)
        labels = self.known[chosen.to(self.known.device)]
        self.student.eval()

        def loss(images: Tensor) -> Tensor:
            seen = augment(images, self.recipe.augment, self.random)
            return self.loss(self.grid.to_patches(seen), labels).mean()

        images = generate(self.net, count, loss, self.settings, self.random)
        noise = self.recipe.noise * self.inputs.settings.inversion.images / count if number == 0 else 0.0
        recipe = self.recipe.model_copy(update={"noise": noise})
        patches, pseudo = gather(images, labels, self.grid, recipe, self.random)
        self.extend(patches, pseudo)
        self.patches = torch.cat([self.patches, patches]) if number else patches
        self.labels = torch.cat([self.labels, pseudo])
        seen = self.teachers(self.grid.to_patches(images)).probabilities
        kept = torch.arange(self.grid.num_patches, device=images.device).repeat(count, 1)
        self._made.append(SyntheticImages(images, labels, kept, cross_entropy(seen, labels)))
        every = max(1, self.settings.rounds // 10)
        if (number + 1) % every == 0:
            done = f"{(number + 1) * count}/{self.settings.rounds * count}"
            self.inputs.observer.event("distill", generated=done, loss=float(self._made[-1].loss.mean()))

    def student_logits(self, patches: Tensor) -> Tensor:
        """``(B, C)`` what the student sees in ``(B, P, E)`` patches."""
        return forward_patches(self.student, patches, None).logits


def round_starts(rounds: int, steps: int) -> list[int]:
    """Step of the student before which each round is held, the first at 0.

    Round r is followed by a share r of the steps: one pass over a pool of r batches.
    """
    return [round(steps * number * (number + 1) / (rounds * (rounds + 1))) for number in range(rounds)]


def cross_entropy(probabilities: Tensor, labels: Tensor) -> Tensor:
    """``-log p_y``, ``(B,)``, of ``(B, C)`` probabilities and ``(B,)`` labels."""
    return -probabilities.gather(1, labels[:, None]).squeeze(1).clamp_min(1e-12).log()


def divergence(probabilities: Tensor, logits: Tensor, temperature: float = 1.0) -> Tensor:
    """``T^2 KL(p^(1/T) || softmax(logits / T))`` of each image, ``(B,)``; gradients flow to both ``(B, C)`` tensors."""
    target = soften(probabilities, temperature) if temperature != 1.0 else probabilities
    log_target, log_student = target.clamp_min(1e-12).log(), (logits.float() / temperature).log_softmax(-1)
    return F.kl_div(log_student, log_target, reduction="none", log_target=True).sum(1) * temperature**2


def generated_images(settings: Settings) -> str:
    """Say what a method with a generator did with the uploads."""
    count = settings.generator.rounds * settings.generator.batch_size
    return (
        "It trained a generator with the ensemble of uploads and, in turn, distilled the ensemble into this model on "
        f"{count} generated images."
    )
