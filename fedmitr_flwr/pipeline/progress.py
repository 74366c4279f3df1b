"""Reports to the observer while the two long stages, inversion and distillation, run.

Each report reads a loss from the device, for which the stage waits on a GPU; therefore reports come only every few
steps.

Letters: B images, C classes.
"""

from __future__ import annotations

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from fedmitr_flwr.models.trainable import train_mode
from fedmitr_flwr.models.vit import forward_patches
from fedmitr_flwr.runs.observer import Observer
from fedmitr_flwr.settings import InversionSettings
from fedmitr_flwr.stages.distillation.losses import LossTerms
from fedmitr_flwr.stages.distillation.pool import Pool
from fedmitr_flwr.stages.inversion.batch import Watch
from fedmitr_flwr.stages.inversion.methods import runs

REPORTS = 40  # for each of the first ten inversion batches
LATER_REPORTS = 5  # for each later one: the curves are similar, and there may be thousands of batches
SHOWN_CLASSES = 20  # classes whose first image is shown at each stop
FINISHED_SHOWN = 100  # finished images in the snapshot
DISTILL_REPORTS = 200  # in the whole distillation, about
PROBED_IMAGES = 64  # images on which student and ensemble are compared


class InversionProgress:
    """Report loss and confidence of inversion, and send the first image of each class at each stop.

    Parameters
    ----------
    observer
        Receives the reports.
    settings
        Iterations, images and batch size.
    classes
        Number of classes that the labels cycle through.
    """

    def __init__(self, observer: Observer, settings: InversionSettings, classes: int) -> None:
        self.observer = observer
        self.settings = settings
        self.shown = min(classes, SHOWN_CLASSES)
        self.batches = -(-runs(settings) // settings.batch_size)

    def of_batch(self, number: int) -> Watch:
        """Return the callbacks for a batch; `number` counts from 0."""
        iterations, total = self.settings.iterations, self.settings.iterations * self.batches
        every = max(1, iterations // (REPORTS if number < 10 else LATER_REPORTS))
        first = number * self.settings.batch_size

        def on_iteration(iteration: int, loss: Tensor) -> None:
            if (iteration + 1) % every == 0 or iteration == 0:
                done = number * iterations + iteration + 1
                self.observer.progress(
                    "invert",
                    done,
                    total,
                    lambda: {
                        "iteration": iteration,
                        "loss": float(loss.mean()),
                        "confidence": float(loss.neg().exp().mean()),
                    },
                )

        def on_stop(iteration: int, images: Tensor, kept: Tensor) -> None:
            if first < self.shown:
                rows = slice(0, self.shown - first)
                number_of = torch.arange(first, first + len(images[rows]))
                where = torch.tensor(iteration)
                self.observer.snapshot("stop", iteration=where, row=number_of, images=images[rows], kept=kept[rows])

        return Watch(on_iteration, on_stop)


class DistillProgress:
    """Callback of `distill.distill`: report the loss terms and the agreement of student and ensemble.

    The agreement is the fraction of up to 64 images, spread over the pool, for which both predict the same class.

    Parameters
    ----------
    observer
        Receives the reports: about ten log lines over the stage and, if it has listeners, `DISTILL_REPORTS` reports.
    steps
        Number of steps of the stage.
    student, pool
        The model that is trained, and its images.
    """

    def __init__(self, observer: Observer, steps: int, student: VisionTransformer, pool: Pool) -> None:
        self.observer, self.steps, self.student, self.pool = observer, steps, student, pool
        self._logged, self._every = max(1, steps // 10), max(1, steps // DISTILL_REPORTS)

    def __call__(self, step: int, terms: LossTerms) -> None:
        """Report the terms of one step if a report is due; `step` counts from 0."""
        if (step + 1) % self._logged == 0:
            self.observer.event("distill", step=step + 1, **terms.values())
        due = (step + 1) % self._every == 0 or self._probes(step)
        if self.observer.watched and due:
            self.observer.progress("distill", step + 1, self.steps, lambda: self._values(step, terms))

    def _values(self, step: int, terms: LossTerms) -> dict[str, float]:
        values = terms.values()
        if self._probes(step):
            values["agreement"] = self._agreement()
        return values

    def _probes(self, step: int) -> bool:
        return step == 0 or (step + 1) % self._logged == 0 or step + 1 == self.steps

    @torch.no_grad()
    def _agreement(self) -> float:
        size = len(self.pool)
        images = self.pool.batch(torch.linspace(0, size - 1, min(size, PROBED_IMAGES)).long()).images
        self.student.eval()
        try:
            logits = forward_patches(self.student, images.patches, None).logits
        finally:
            train_mode(self.student)
        return float((logits.argmax(1) == images.targets.probabilities.argmax(1)).float().mean())
