"""Run the iterations of inversion on one batch of images.

Letters: B images, C classes, P patches of the full grid, L patches kept, E = channels x patch pixels, S side in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fedmitr_flwr.ensemble.engine.precision import compute_dtype
from fedmitr_flwr.ensemble.ensemble import Ensemble
from fedmitr_flwr.ensemble.loss_terms import Term
from fedmitr_flwr.models.patch_grid import PatchGrid
from fedmitr_flwr.settings import InversionSettings
from fedmitr_flwr.stages.inversion.cuda_graphs import SteadySteps, stretches, suits
from fedmitr_flwr.stages.inversion.pixel_adam import PixelAdam, scatter, take
from fedmitr_flwr.stages.inversion.prior import Prior
from fedmitr_flwr.stages.inversion.schedule import Choice, growth
from fedmitr_flwr.stages.inversion.terms import terms_of
from fedmitr_flwr.stages.inversion.views import View
from fedmitr_flwr.stages.random_images.families import random_images
from fedmitr_flwr.stages.synthetic import SyntheticImages

CHECK = 100
"""Number of iterations between two checks that loss and pixels are finite. Each check waits for the GPU."""


@dataclass(frozen=True)
class Watch:
    """Callbacks of an inversion; None: no callback.

    Attributes
    ----------
    on_iteration
        Called in each iteration with its number, from 0, and the ``(B,)`` detached cross-entropies, still on the
        device.
    on_stop
        Called after each stop with the number of the iteration, the current ``(B, ch, S, S)`` images, and the
        ``(B, L)`` patches that are kept.
    """

    on_iteration: Callable[[int, Tensor], None] | None = None
    on_stop: Callable[[int, Tensor, Tensor], None] | None = None


NOBODY = Watch()
"""No callbacks."""


@dataclass(frozen=True)
class InversionTask:
    """An ensemble to invert, the geometry of the images, and the settings.

    Attributes
    ----------
    ensemble
        Frozen teachers, on the same device as the labels.
    grid
        Geometry and valid pixel range of the images.
    settings
        Iterations, stop schedule, optimiser and priors.
    """

    ensemble: Ensemble
    grid: PatchGrid
    settings: InversionSettings


class InversionDivergedError(RuntimeError):
    """A loss or a pixel is not finite; the message names the iteration.

    Attributes
    ----------
    iteration
        Number of the iteration.
    last_good
        Images at the last check at which everything was finite, at most `CHECK` iterations earlier.
    """

    def __init__(self, iteration: int, last_good: SyntheticImages) -> None:
        super().__init__(
            f"pixels or loss are not finite at inversion iteration {iteration}: "
            "a teacher's weights are broken, or inversion.learning-rate is too high"
        )
        self.iteration, self.last_good = iteration, last_good


def optimise(
    batch: InversionBatch,
    stops: Mapping[int, Choice],
    generator: torch.Generator,
    watch: Watch = NOBODY,
) -> None:
    """Run all iterations of a batch.

    Parameters
    ----------
    stops
        Functions that choose the patches to keep, by iteration.
    generator
        CPU generator of jitter and colour shifts.
    watch
        Callbacks.
    """
    settings = batch.task.settings
    grown = growth(batch.task.grid, settings.centring)
    alike = stretches(stops, grown, settings.iterations)
    try:
        for iteration in range(settings.iterations):
            if iteration in grown:
                batch.restart(grown[iteration])
            batch.expect(alike.get(iteration, 0))
            loss = batch.step(batch.views(generator), stops.get(iteration))
            if watch.on_iteration is not None:
                watch.on_iteration(iteration, loss)
            if watch.on_stop is not None and iteration in stops:
                watch.on_stop(iteration, batch.result().images, batch.kept)
            if (iteration + 1) % CHECK == 0 or iteration in stops:
                batch.check_finite()
        batch.check_finite()
    finally:
        batch.release()


class InversionBatch:
    """A batch of images that is being inverted.

    Parameters
    ----------
    task
        Teachers, geometry and settings.
    labels
        ``(B,)`` int64 target classes.
    start
        ``(B, ch, S, S)`` starting images, which are clipped to the valid range.
    kept
        ``(B, L)`` int64 numbers of the patches to optimise, sorted; None: all patches.
    terms
        Terms of the loss besides those that the settings ask for.

    Raises
    ------
    ValueError
        If `kept` is empty or has a patch outside the grid.
    """

    def __init__(
        self,
        task: InversionTask,
        labels: Tensor,
        start: Tensor,
        kept: Tensor | None = None,
        terms: Sequence[Term] = (),
    ) -> None:
        grid, settings = task.grid, task.settings
        if kept is not None and kept.shape[1] == 0:
            raise ValueError("kept is empty, but inversion needs at least one patch of each image")
        if kept is not None and not 0 <= int(kept.min()) <= int(kept.max()) < grid.num_patches:
            raise ValueError(
                f"kept has patches {int(kept.min())} to {int(kept.max())}, "
                f"but the patches of the grid are 0 to {grid.num_patches - 1}"
            )
        self.task, self._labels = task, labels
        self._terms = (*terms_of(settings), *terms)
        device = labels.device
        self._dtype = compute_dtype(settings.precision, task.ensemble.teachers[0].embed_dim, device)
        self._low, self._high = grid.bounds(device)
        self._canvas = torch.minimum(torch.maximum(grid.to_patches(start), self._low), self._high)  # (B, P, E)
        self.kept = torch.arange(grid.num_patches, device=device).repeat(len(labels), 1) if kept is None else kept
        self._begin()
        self._loss = torch.zeros(len(labels), device=device)
        # _broken: first iteration with a loss that is not finite, or -1. On the device, so that no iteration waits.
        self._iteration, self._broken = 0, torch.full((), -1, device=device)
        self._last_good = self.result()

    def _begin(self) -> None:
        """Create the optimiser and the prior of the kept patches."""
        self._steady: SteadySteps | None = None
        self._adam = PixelAdam(take(self._canvas, self.kept), self.task.settings)
        self._prior = Prior(self._canvas, self.kept, self.task.grid, self.task.settings)

    def restart(self, kept: Tensor) -> None:
        """Continue from the current pixels with a new optimiser and other patches, ``(L,)`` int64 for all images."""
        self._canvas = scatter(self._canvas, self.kept, self._adam.pixels)
        self.kept = kept.to(self._labels.device).repeat(len(self._labels), 1)
        self._begin()

    def expect(self, steps: int) -> None:
        """Announce that no patch is stopped in the next `steps` iterations, so that they can run as a CUDA graph.

        `cuda_graphs.suits` decides whether they do. An iteration with views or with a choice of patches is still
        allowed; from then on, iterations run without the graph.
        """
        device = self._labels.device
        if suits(steps, self.task.ensemble, self.task.settings, self._terms, device):
            table = self._adam.table(steps)
            self._steady = SteadySteps(self._steady_step, table, self._iteration, self.task.ensemble, device)

    def views(self, generator: torch.Generator) -> list[View]:
        """Draw the `inversion.copies` random views of one iteration."""
        count, device, grid, settings = len(self._labels), self._labels.device, self.task.grid, self.task.settings
        return [View.draw(count, grid, settings, generator, device) for _ in range(settings.copies)]

    def step(self, views: Sequence[View] = (View(),), choose: Choice | None = None) -> Tensor:
        """Run one iteration without waiting for the device.

        Parameters
        ----------
        views
            Views of the images on which the ensemble is evaluated. Losses, gradients and attention are averaged over
            them.
        choose
            Chooses the patches to keep, by their attention; the others are stopped before the update. None: all
            patches are kept.

        Returns
        -------
        Tensor
            ``(B,)`` detached cross-entropies before the update.
        """
        if self._steady is not None:
            if choose is None and self._steady.left and all(view == View() for view in views):
                self._loss = self._steady()
                self._adam.counted()
                self._iteration += 1
                return self._loss
            self._steady = None
        update = partial(self._adam.step, low=self._low, high=self._high)
        self._loss = self._iterate(self._iteration, views, choose, update)
        self._iteration += 1
        return self._loss

    def _steady_step(self, scalars: Tensor, iteration: Tensor) -> Tensor:
        """Run one iteration in a form that can be recorded as a CUDA graph; see `cuda_graphs.Body`."""
        update = partial(self._adam.step_by, scalars, low=self._low, high=self._high)
        return self._iterate(iteration, (View(),), None, update)

    def _iterate(
        self,
        iteration: int | Tensor,
        views: Sequence[View],
        choose: Choice | None,
        update: Callable[[Tensor], None],
    ) -> Tensor:
        """Run one iteration: compute loss and gradient, stop patches if asked to, add the prior, update the pixels.

        Parameters
        ----------
        iteration
            Number of the iteration, or the same as ``()`` int64 on the device.
        views, choose
            As for `step`.
        update
            Updates the pixels, given the ``(B, L, E)`` gradient.
        """
        looks = zip(*(self._look(view) for view in views), strict=True)
        loss, gradient, attention = (torch.stack(part).mean(0) if len(part) > 1 else part[0] for part in looks)
        self._broken.copy_(torch.where(self._breaks(loss), iteration, self._broken))
        if choose is not None:
            self._canvas = scatter(self._canvas, self.kept, self._adam.pixels)
            stay = choose(attention)
            self.kept, gradient = self.kept.gather(1, stay), take(gradient, stay)
            self._adam.keep(stay)
            self._prior = Prior(self._canvas, self.kept, self.task.grid, self.task.settings)
        self._prior.add_gradient(self._adam.pixels, gradient)
        update(gradient)
        return loss

    def _breaks(self, loss: Tensor) -> Tensor:
        """Return whether one of these losses is not finite and all earlier ones were, ``()`` bool."""
        return ~torch.isfinite(loss).all() & (self._broken < 0)

    def _look(self, view: View) -> tuple[Tensor, Tensor, Tensor]:
        """Return losses ``(B,)``, gradients ``(B, L, E)`` and attention ``(B, L)`` of one view."""
        seen, index = view.of(self._adam.pixels), self.task.grid.shifted(self.kept, view.shift)
        out = self.task.ensemble.loss_gradient(seen, index, self._labels, self._dtype, self._terms)
        return out.loss, view.pull_back(out.gradient), out.attention

    def release(self) -> None:
        """Free the memory of the teachers' activations and of the CUDA graph."""
        self._steady = None
        self.task.ensemble.release()

    def result(self) -> SyntheticImages:
        """Return the current images in new tensors."""
        images = self.task.grid.to_images(scatter(self._canvas, self.kept, self._adam.pixels))
        return SyntheticImages(images, self._labels, self.kept, self._loss)

    def check_finite(self) -> None:
        """Check that everything is finite. This waits for the device.

        Raises
        ------
        InversionDivergedError
            If a loss of an iteration so far, or a current pixel, is not finite.
        """
        iteration = int(self._broken)
        if iteration < 0 and not bool(torch.isfinite(self._adam.pixels).all()):
            iteration = self._iteration - 1
        if iteration >= 0:
            raise InversionDivergedError(iteration, self._last_good)
        self._last_good = self.result()


def starting_images(count: int, grid: PatchGrid, settings: InversionSettings, generator: torch.Generator) -> Tensor:
    """Return the noise that `inversion.start` names, ``(count, ch, S, S)`` fp32 on the CPU, not yet clipped."""
    if settings.start != "white":
        return random_images(settings.start, count, grid, generator)
    white = torch.randn(count, grid.channels, grid.image_size, grid.image_size, generator=generator)
    return white * settings.start_std
