"""DENSE (Zhang et al., NeurIPS 2022, arXiv 2112.12371): train an image generator and the student in turn.

The generator minimises ``CE(A(x), y) - l KL(A(x) || s(x))``. The second term applies only to images on which the most
probable classes of student and ensemble differ, that is, to images near the decision boundary. Its weight l is
`generator.adversarial`; the authors' command uses 1. The student is trained on all images generated so far.
`generator.py` lists the departures from the paper.

Letters: B images, C classes.
"""

from __future__ import annotations

from torch import Tensor

from fedmitr_flwr.pipeline.inputs import PipelineInputs, PipelineResult
from fedmitr_flwr.pipeline.methods.common import Method
from fedmitr_flwr.pipeline.methods.generator import InTurn, cross_entropy, divergence, generated_images
from fedmitr_flwr.stages.distillation.pool import Pool, Targets, label_patches, unnamed_pool


def dense(inputs: PipelineInputs) -> PipelineResult:
    """Run DENSE; see `fedmitr.run_pipeline`."""
    return _Dense(inputs).run()


class _Dense(InTurn):
    def __init__(self, inputs: PipelineInputs) -> None:
        super().__init__(inputs)
        self._targets: list[Targets] = []

    def loss(self, patches: Tensor, labels: Tensor) -> Tensor:
        seen = self.teachers(patches).probabilities
        return boundary_loss(seen, self.student_logits(patches), labels, self.settings.adversarial)

    def extend(self, patches: Tensor, labels: Tensor) -> None:
        self._targets.append(label_patches(self.teachers, patches, self.recipe, trunk=self.trunk))

    def pool(self, steps: int) -> Pool:
        return unnamed_pool(self.patches, Targets.join(self._targets))


def boundary_loss(probabilities: Tensor, logits: Tensor, labels: Tensor, weight: float) -> Tensor:
    """Return ``CE(A, y) - weight [argmax A != argmax s] KL(A || s)`` of each image, ``(B,)``.

    Parameters
    ----------
    probabilities, logits
        ``(B, C)`` A(x) and the student's logits; gradients flow to both.
    labels
        ``(B,)`` int64.
    weight
        l, the weight of the second term; 0: off.
    """
    differ = probabilities.argmax(1) != logits.argmax(1)
    return cross_entropy(probabilities, labels) - weight * differ * divergence(probabilities, logits)


DENSE = Method(dense, "DENSE ([arXiv 2112.12371](https://arxiv.org/abs/2112.12371))", generated_images, generates=True)
