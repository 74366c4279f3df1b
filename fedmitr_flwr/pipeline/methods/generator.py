"""The part that DENSE and Co-Boosting have in common: a generator that is trained in turn with the student.

In each of `generator.rounds` rounds the generator gets new random weights. It is trained with the ensemble for
`generator.iterations` updates, together with its latent vectors. Its best batch is added to those of the earlier
rounds, and the student is trained on all of them. Generator, optimiser and their constants are those of DENSE's
published code, which Co-Boosting adopted: three convolutions after a linear map, Adam(1e-3, 0.5, 0.999), latent size
256, 30 updates, 200 rounds. The batch size of 128 is that of Co-Boosting's commands for both methods; DENSE's own is
256.

Departures, for both methods:

- Everything but the images is as in FedMITR: the student's start (`distill.start`), steps, optimiser and temperature,
  and the ensemble A(x) with `ensemble.weighting`. The student is trained by KL to the ensemble and by the outputs of
  each teacher; the published methods use KL alone.
- The steps are divided among the rounds in proportion to the size of the pool, as in the published schedule, where each
  round is followed by one pass over the pool. Their total is `distill.steps`.
- `distill.views`, `distill.mix` and `distill.noise` add the same further images as in FedMITR, and as many random
  images as FedMITR would use. The published methods add none (1, 0 and 0).
- The generator's images are augmented by `distill.augment` before the ensemble is evaluated on them; the published
  methods crop and flip them.
- The stability term on batch statistics is left out, because LayerNorm, which ViTs use, stores none.
- Labels are drawn from the classes for which at least one client has evidence.
- For image sizes other than 32, the first feature map has side S / 4; above 64 pixels there are more doublings instead.

Letters: B images of a batch, N images of the pool, P patches, E pixels of a patch, C classes, Z latent size.
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
from fedmitr_flwr.pipeline.methods.common import the_ensemble, untrained_result
from fedmitr_flwr.pipeline.starts import student_start
from fedmitr_flwr.pipeline.steps import distilled, freeze_student, make_ensemble
from fedmitr_flwr.settings import GeneratorSettings, Settings
from fedmitr_flwr.stages.density import PatchSplit
from fedmitr_flwr.stages.distillation.frozen import StudentTrunk
from fedmitr_flwr.stages.distillation.pool import Pool, gather
from fedmitr_flwr.stages.relabel import soften
from fedmitr_flwr.stages.synthetic import SyntheticImages
from fedmitr_flwr.training.augment import augment


class Generator(nn.Module):
    """A network that makes images from latent vectors, within the valid pixel range.

    Parameters
    ----------
    grid
        Geometry and valid pixel range of the images.
    settings
        Latent size and number of channels of the last hidden map; the other maps have twice as many channels.
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
        """Return ``(B, ch, S, S)`` normalised images for ``(B, Z)`` latent vectors."""
        maps = self.first(latent).view(len(latent), -1, self.side, self.side)
        images: Tensor = self.body(maps)[..., : self.size, : self.size]
        return self.low + (self.high - self.low) * images

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """Draw new weights: N(0, 0.02) for weights, N(1, 0.02) for the scales of norms, 0 for biases."""
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
    """Train a generator from new weights, and return the batch with the lowest loss, ``(count, ch, S, S)``.

    Parameters
    ----------
    net
        In train mode, so that its norms use the statistics of the batch. Its weights are drawn anew.
    count
        Number of images.
    loss
        Function from ``(count, ch, S, S)`` images to a scalar.
    settings
        Learning rate and number of updates.
    generator
        CPU generator of weights and latent vectors.

    Raises
    ------
    RuntimeError
        If no update has a finite loss.
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
            weight.grad = gradient  # torch.autograd.grad gives the weights of the other models no gradients
        optimizer.step()
    if not math.isfinite(lowest):
        raise RuntimeError("the generator's loss is not finite; lower generator.learning-rate")
    return best


class InTurn(ABC):
    """One run of a method that trains generator and student in turn.

    Parameters
    ----------
    inputs
        As for `fedmitr.run_pipeline`.

    Attributes
    ----------
    teachers
        The ensemble with the weights computed from the uploads.
    patches, labels
        ``(N, P, E)`` and ``(N,)``: all images generated so far, with their further images. The label is -1 for images
        without one.
    trunk
        Frozen blocks of the student whose output the pool keeps; None: it keeps none.
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
        self.trunk: StudentTrunk | None = None

    @abstractmethod
    def loss(self, patches: Tensor, labels: Tensor) -> Tensor:
        """Return the generator's loss for each image, ``(B,)``, given ``(B, P, E)`` patches and ``(B,)`` labels."""

    @abstractmethod
    def extend(self, patches: Tensor, labels: Tensor) -> None:
        """Process ``(M, P, E)`` new patches and their ``(M,)`` labels, before they are added to `patches`."""

    @abstractmethod
    def pool(self, steps: int) -> Pool:
        """Return the pool on which the student is trained in the next `steps` steps."""

    def run(self) -> PipelineResult:
        """Run the method. The generated images are the result's synthetic images, with all patches kept."""
        inputs, result = self.inputs, untrained_result(self.inputs, self.teachers)
        with inputs.observer.stage("distill"):
            self.student.load_state_dict(student_start(inputs, self.teachers))
            self.trunk = freeze_student(inputs, self.teachers, self.student, self.recipe, (self._most_images(), 0))
            first = self._grow(0)
            assert first is not None
            state = distilled(inputs, self.teachers, self.student, first, self.recipe, self.random, grow=self._grow)
        made = SyntheticImages.join(self._made)
        split = PatchSplit(torch.ones_like(made.kept, dtype=torch.bool))
        seconds = dict(inputs.observer.seconds)
        return replace(result, state=state, synthetic=made, split=split, seconds=seconds)

    def _most_images(self) -> int:
        """Return an upper bound on the images of pools in memory.

        A pool has all images that are generated, or those of the steps of a round. Two pools and their parts are in
        memory while the new one is joined.
        """
        recipe, rounds = self.recipe, self.settings.rounds
        noise = recipe.noise * self.inputs.settings.inversion.images
        made = math.ceil(rounds * self.settings.batch_size * (recipe.views + recipe.mix) + noise)
        ends = [*self._starts[1:], recipe.steps]
        longest = max(end - start for start, end in zip(self._starts, ends, strict=True))
        return 3 * max(made, longest * recipe.batch_size)

    def _grow(self, step: int) -> Pool | None:
        """Run the rounds that are due before a step of the student, and return the new pool; None: keep the old one."""
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
        """Return the student's logits ``(B, C)`` for ``(B, P, E)`` patches."""
        return forward_patches(self.student, patches, None).logits


def round_starts(rounds: int, steps: int) -> list[int]:
    """Return the step of the student before which each round runs; 0 for the first.

    The number of steps after round r, counted from 1, is proportional to r, the number of batches in the pool.
    """
    return [round(steps * number * (number + 1) / (rounds * (rounds + 1))) for number in range(rounds)]


def cross_entropy(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Return ``-log p_y``, ``(B,)``, for ``(B, C)`` probabilities and ``(B,)`` labels."""
    return -probabilities.gather(1, labels[:, None]).squeeze(1).clamp_min(1e-12).log()


def divergence(probabilities: Tensor, logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Return ``T^2 KL(p^(1/T) || softmax(logits / T))`` of each image, ``(B,)``.

    Parameters
    ----------
    probabilities, logits
        ``(B, C)``; gradients flow to both.
    temperature
        T; 1 leaves both unchanged.
    """
    target = soften(probabilities, temperature) if temperature != 1.0 else probabilities
    log_target, log_student = target.clamp_min(1e-12).log(), (logits.float() / temperature).log_softmax(-1)
    return F.kl_div(log_student, log_target, reduction="none", log_target=True).sum(1) * temperature**2


def generated_images(settings: Settings) -> str:
    """Return the sentence of the model card on what a method with a generator did with the uploads."""
    count = settings.generator.rounds * settings.generator.batch_size
    return (
        f"It trained a generator with {the_ensemble(settings)} and, in turn, distilled the ensemble into this model on "
        f"{count} generated images."
    )
