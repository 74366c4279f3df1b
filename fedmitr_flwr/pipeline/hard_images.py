"""Hard images: images on which student and ensemble disagree, inverted during distillation.

This follows Adaptive DeepInversion (Yin et al. 2020, arXiv 1912.08795, section 3.3). A competition term is added to the
loss of inversion, here ``- a JS(A(x), s(x))`` with the Jensen-Shannon divergence. The divergence lies between 0 and
log 2, so the gain of the term is bounded, while the cross-entropy is not. The loss favours images that the ensemble
assigns to class y and the current student does not. `distill.adversarial-rounds` rounds are spread evenly over the
steps of distillation. The images of a round go through density split and relabeling like all other images and stay in
the pool to the end.

Departures: the paper alternates inversion with complete distillations; here hard images are added while a single
distillation runs. The images of each round start from noise; no image of an earlier round is refined. Hard images get
augmented views (`distill.views`), but no mixed or random images are added for them.

Letters: B images, C classes.
"""

from __future__ import annotations

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from fedmitr_flwr.models.vit import forward_patches
from fedmitr_flwr.pipeline.inputs import StageContext
from fedmitr_flwr.pipeline.steps import split_and_relabel
from fedmitr_flwr.runs.observer import Observer
from fedmitr_flwr.stages.distillation.frozen import StudentTrunk
from fedmitr_flwr.stages.distillation.pool import Pool, make_pool
from fedmitr_flwr.stages.inversion.methods import images_per_run, invert_batch, runs
from fedmitr_flwr.stages.inversion.terms import Disagreement
from fedmitr_flwr.stages.synthetic import SyntheticImages


class HardImages:
    """The rounds of hard images; an instance is passed to `distill.distill` as `grow`.

    Parameters
    ----------
    context
        Teachers, geometry and settings.
    student
        The model that distillation trains.
    classes
        ``(C',)`` int64 classes, which take turns as labels.
    pool
        The pool before the first round.
    seed
        Seed of the run.
    generator
        CPU generator of augmentation.
    observer
        Receives an event after each round.
    trunk
        Frozen blocks of the student whose output the pool keeps; None: it keeps none.
    """

    def __init__(
        self,
        context: StageContext,
        student: VisionTransformer,
        classes: Tensor,
        pool: Pool,
        *,
        seed: int,
        generator: torch.Generator,
        observer: Observer,
        trunk: StudentTrunk | None = None,
    ) -> None:
        self._context, self._student, self._classes, self._pool = context, student, classes, pool
        self._seed, self._generator, self._observer, self._trunk = seed, generator, observer, trunk
        distill = context.settings.distill
        self._rounds = round_steps(distill.adversarial_rounds, distill.steps)

    def __call__(self, step: int) -> Pool | None:
        """Run the round that is due before `step` and return the extended pool; None if no round is due."""
        if step not in self._rounds:
            return None
        self._student.eval()
        context = self._context
        images = self._invert(self._rounds.index(step))
        recipe = context.settings.distill.model_copy(update={"mix": 0.0, "noise": 0.0})
        relabelled = split_and_relabel(context, images)
        made = make_pool(
            context.ensemble, relabelled, context.grid, recipe, generator=self._generator, trunk=self._trunk
        )
        self._pool = self._pool.join(made)
        with torch.no_grad():
            said = forward_patches(self._student, made.inverted.patches, None).logits
        agrees = said.argmax(1) == made.inverted.targets.probabilities.argmax(1)
        self._observer.event(
            "distill",
            step=step,
            hard_images=len(images.labels),
            loss=float(images.loss.mean()),
            student_agrees=float(agrees.float().mean()),
        )
        return self._pool

    def _invert(self, number: int) -> SyntheticImages:
        """Invert the images of one round, in batches whose numbers, and so seeds, no other batch of the run has."""
        settings, distill = self._context.settings.inversion, self._context.settings.distill
        count = -(-distill.adversarial_images // images_per_run(settings))
        turn = number * count + torch.arange(count, device=self._classes.device)
        batches = self._classes[turn % len(self._classes)].split(settings.batch_size)
        first = -(-runs(settings) // settings.batch_size) + number * len(batches)
        terms = [Disagreement(self._student, distill.adversarial_weight)]
        task = self._context.inversion
        parts = [
            invert_batch(task, labels, number=batch, seed=self._seed, terms=terms)
            for batch, labels in enumerate(batches, first)
        ]
        return SyntheticImages.join(parts)


def round_steps(rounds: int, steps: int) -> list[int]:
    """Return the steps before which the rounds run; they divide all steps into `rounds` + 1 equal parts."""
    return [steps * number // (rounds + 1) for number in range(1, rounds + 1)]
