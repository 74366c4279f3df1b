"""Hard images: while the student learns, images are inverted on which it and the ensemble disagree.

After Adaptive DeepInversion (Yin et al. 2020, arXiv 1912.08795, section 3.3): the loss of inversion gets a competition
term, here ``- a JS(A(x), s(x))`` with the Jensen-Shannon divergence, which lies between 0 and log 2, so that it can't
outweigh the cross-entropy without end. An image has to look like y to the ensemble, and like something else to the
student as it is then. `distill.adversarial-rounds` rounds are spread evenly over the steps; what each makes goes
through the density split and relabeling like all others, and stays in the pool to the end.

Departures: the paper inverts in alternation with whole distillations, here hard images join one that is under way. All
are new ones, from noise; none made before is refined. They get augmented views (`distill.views`), but no mixed or
random images beside them.

Letters: B images, C classes.
"""

from __future__ import annotations

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from fedmitr_flwr.ensemble.ensemble import Ensemble
from fedmitr_flwr.models.patch_grid import PatchGrid
from fedmitr_flwr.models.vit import forward_patches
from fedmitr_flwr.pipeline.steps import split_and_relabel
from fedmitr_flwr.runs.observer import Observer
from fedmitr_flwr.settings import Settings
from fedmitr_flwr.stages.distillation.pool import Pool, make_pool
from fedmitr_flwr.stages.inversion.methods import invert_batch
from fedmitr_flwr.stages.inversion.terms import Disagreement
from fedmitr_flwr.stages.synthetic import SyntheticImages


class HardImages:
    """Holds the rounds: the `grow` of `distill.distill`.

    Parameters
    ----------
    ensemble, student, grid
        As in the pipeline.
    classes
        ``(C',)`` int64, which take turns as labels.
    settings
        Of all stages.
    pool
        What the student learns from before the first round.
    seed
        Of the run.
    generator
        CPU generator of augmentation.
    observer
        Hears what each round made.
    """

    def __init__(
        self,
        ensemble: Ensemble,
        student: VisionTransformer,
        classes: Tensor,
        grid: PatchGrid,
        settings: Settings,
        pool: Pool,
        *,
        seed: int,
        generator: torch.Generator,
        observer: Observer,
    ) -> None:
        self._ensemble, self._student, self._classes, self._grid = ensemble, student, classes, grid
        self._settings, self._pool, self._seed = settings, pool, seed
        self._generator, self._observer = generator, observer
        self._rounds = round_steps(settings.distill.adversarial_rounds, settings.distill.steps)

    def __call__(self, step: int) -> Pool | None:
        """Hold the round that is due before a step, and return the pool with its images; None if there is none."""
        if step not in self._rounds:
            return None
        self._student.eval()
        images = self._invert(self._rounds.index(step))
        settings = self._settings
        split, targets = split_and_relabel(self._ensemble, images, self._grid, settings)
        recipe = settings.distill.model_copy(update={"mix": 0.0, "noise": 0.0})
        made = make_pool(self._ensemble, images, split, targets, self._grid, recipe, generator=self._generator)
        self._pool = self._pool.join(made)
        with torch.no_grad():
            said = forward_patches(self._student, made.patches[: len(images.labels)], None).logits
        agrees = said.argmax(1) == made.targets.probabilities[: len(images.labels)].argmax(1)
        self._observer.event(
            "distill",
            step=step,
            hard_images=len(images.labels),
            loss=float(images.loss.mean()),
            student_agrees=float(agrees.float().mean()),
        )
        return self._pool

    def _invert(self, number: int) -> SyntheticImages:
        """The images of a round; its batches have numbers, and so seeds, that no other batch of the run has."""
        settings, distill = self._settings.inversion, self._settings.distill
        runs = -(-distill.adversarial_images // settings.images_per_run)
        turn = number * runs + torch.arange(runs, device=self._classes.device)
        batches = self._classes[turn % len(self._classes)].split(settings.batch_size)
        first = -(-settings.runs // settings.batch_size) + number * len(batches)
        terms = [Disagreement(self._student, distill.adversarial_weight)]
        parts = [
            invert_batch(self._ensemble, labels, self._grid, settings, number=batch, seed=self._seed, terms=terms)
            for batch, labels in enumerate(batches, first)
        ]
        return SyntheticImages.join(parts)


def round_steps(rounds: int, steps: int) -> list[int]:
    """Steps before which the rounds are held: as many before the first as between two and after the last."""
    return [steps * number // (rounds + 1) for number in range(1, rounds + 1)]
