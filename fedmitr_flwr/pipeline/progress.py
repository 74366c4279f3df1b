"""What the pipeline tells an observer while its two long stages run.

Each report reads a loss from the device, and the stage waits for it on a GPU: so there is one every few steps only.
Letters: B images, C classes.
"""

from __future__ import annotations

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from fedmitr_flwr.models.vit import forward_patches
from fedmitr_flwr.runs.observer import Observer
from fedmitr_flwr.settings import InversionSettings
from fedmitr_flwr.stages.distillation.losses import LossTerms
from fedmitr_flwr.stages.distillation.pool import Pool
from fedmitr_flwr.stages.inversion.batch import Watch
from fedmitr_flwr.stages.inversion.methods import runs

REPORTS = 40  # of one inversion batch
LATER_REPORTS = 5  # of one after the first ten: their curves look alike, and there may be thousands
SHOWN_CLASSES = 20  # whose first image is shown at each stop
FINISHED_SHOWN = 100
DISTILL_REPORTS = 200
PROBED_IMAGES = 64


class InversionProgress:
    """Reports loss and confidence of inversion, and shows the first image of each class at each stop.

    Parameters
    ----------
    observer
        Hears of it.
    settings
        Of the inversion.
    classes
        Number of classes that take turns as labels.
    """

    def __init__(self, observer: Observer, settings: InversionSettings, classes: int) -> None:
        self.observer = observer
        self.settings = settings
        self.shown = min(classes, SHOWN_CLASSES)
        self.batches = -(-runs(settings) // settings.batch_size)

    def of_batch(self, number: int) -> Watch:
        """Callbacks for the batch `number`, counted from 0."""
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
    """Callback of `distill.distill`: the loss terms, and now and then how often student and ensemble agree.

    Parameters
    ----------
    observer
        Hears of it; every tenth of the steps as a line of the log, more often if it has listeners.
    steps
        Of the whole stage.
    student, pool
        Agreement is taken on up to 64 images spread over the pool.
    """

    def __init__(self, observer: Observer, steps: int, student: VisionTransformer, pool: Pool) -> None:
        self.observer, self.steps, self.student, self.pool = observer, steps, student, pool
        self._logged, self._every = max(1, steps // 10), max(1, steps // DISTILL_REPORTS)

    def __call__(self, step: int, terms: LossTerms) -> None:
        """Take one step's terms."""
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
            self.student.train()
        return float((logits.argmax(1) == images.targets.probabilities.argmax(1)).float().mean())
