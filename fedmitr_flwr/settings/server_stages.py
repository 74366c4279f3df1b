"""Settings of the server's stages: ensemble, inversion, density, relabeling and distillation."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from fedmitr_flwr.settings.choices import (
    INVERSIONS,
    RANDOM_FAMILIES,
    STUDENT_STARTS,
    Augmentation,
    InversionName,
    Precision,
    RandomFamily,
    Start,
    StudentStart,
    described,
)
from fedmitr_flwr.settings.run_config import FloatList, IntList, SettingsError, Stage


class InversionSettings(Stage):
    """Stage 1, sparse model inversion (SMI, arXiv 2510.27186)."""

    method: InversionName = Field("sparse", description=described("Way of inverting.", INVERSIONS))
    images: int = Field(
        120, ge=1, le=10_000_000, description="Number of synthetic images, spread evenly over the classes."
    )
    batch_size: int = Field(40, ge=1, description="Number of images that are inverted together.")
    iterations: int = Field(40, ge=1, le=1_000_000, description="Number of optimisation steps of each batch.")
    stops: IntList = Field(
        (6, 10, 14, 18),
        description="Iterations, counted from 0, at which patches stop being optimised. Empty: dense inversion, every "
        "patch is optimised to the end.",
    )
    fractions: FloatList = Field(
        (0.3, 0.3, 0.3, 0.3),
        description="For `sparse`: fraction of the remaining patches that is stopped at each of `inversion.stops`, one "
        "entry for each stop. Ignored by `rebirth`.",
    )
    learning_rate: float = Field(
        0.1, gt=0.0, le=100.0, description="Learning rate of Adam on the pixels, in units of normalised pixels."
    )
    beta1: float = Field(0.5, ge=0.0, lt=1.0, description="Adam's beta 1, the decay of the mean gradient.")
    beta2: float = Field(0.99, ge=0.0, lt=1.0, description="Adam's beta 2, the decay of the mean squared gradient.")
    tv_weight: float = Field(
        0.05, ge=0.0, description="Weight of the total variation in the loss, which favours smooth images. 0: off."
    )
    l2_weight: float = Field(
        0.0,
        ge=0.0,
        description="Weight of the mean squared normalised pixel in the loss, which pulls pixels towards the "
        "normalisation mean. 0: off.",
    )
    jitter: int = Field(
        0,
        ge=0,
        le=64,
        description="Largest random cyclic shift of the image in an iteration, in whole patches along each axis. "
        "0: no shift.",
    )
    color_shift: float = Field(
        0.0,
        ge=0.0,
        le=3.0,
        description="Strength r of the ColorShift of Plug-In Inversion. In each iteration the ensemble sees "
        "(x - m) / exp(u) in place of each channel x of each image, with m and u drawn uniformly from [-r, r]. The "
        "paper uses 1. 0: off.",
    )
    copies: int = Field(
        1,
        ge=1,
        le=1024,
        description="Number of views of each image in an iteration, each with its own jitter and colour shift; their "
        "gradients are averaged. The time of an iteration grows in proportion. The paper of Plug-In Inversion uses 32. "
        "1: a single view.",
    )
    diversity: float = Field(
        0.0,
        ge=0.0,
        le=1000.0,
        description="Weight of a contrastive loss term that pushes the images of a batch apart in the teachers' [CLS] "
        "features (CMI; its authors use 0.8). The larger `inversion.batch-size`, the more images each one is compared "
        "with. 0: off.",
    )
    diversity_temperature: float = Field(
        0.1,
        ge=0.01,
        le=10.0,
        description="Temperature of the similarities in the term of `inversion.diversity`. The lower it is, the more "
        "an image is pushed away from the most similar ones only.",
    )
    centring: int = Field(
        0,
        ge=0,
        le=1_000_000,
        description="Number of iterations in which an image grows from its central patches, ring by ring, to the whole "
        "grid (Plug-In Inversion). Must not exceed the first of `inversion.stops`. 0: the whole grid from the start.",
    )
    start: Start = Field(
        "fields",
        description="Noise that the pixels start from. `white`: Gaussian noise around the normalisation mean; the "
        "others as for `distill.noise-kind`.",
    )
    start_std: float = Field(
        0.5,
        ge=0.0,
        le=10.0,
        description="Standard deviation of the starting noise `white`, in normalised pixels.",
    )
    precision: Precision = Field(
        "auto",
        description="Number format in which the teachers compute; loss, pixels and pixel updates are always fp32. "
        "`auto`: bf16 if the device multiplies bf16 matrices fast (CUDA, AMX, AMD from Zen 4 on) and the model's "
        "embedding is wider than 128, otherwise fp32.",
    )
    teachers_per_batch: int = Field(
        0,
        ge=0,
        description="Number of teachers from which a batch is inverted. They are drawn at random for each batch, with "
        "probabilities given by their weights for the batch's classes. 0: all teachers.",
    )
    activation_memory_mb: int = Field(
        640,
        ge=0,
        description="Memory limit in MiB for the activations that all teachers together keep between the forward and "
        "the backward pass. Above it no activations are kept and each teacher runs its forward pass twice, which takes "
        "about 1.5 times as long. 0: none are kept, unless all teachers run in one step.",
    )
    teacher_memory_mb: int = Field(
        4096,
        ge=0,
        description="Memory limit in MiB for the weights of all teachers, including their packed copies. Above it each "
        "teacher is held once, in bf16. If that exceeds the limit too, the teachers are read from the uploads on disk "
        "for every pass. Blocks that are the same in all uploads count once. 0: always read from disk.",
    )

    @model_validator(mode="after")
    def _schedule(self) -> Self:
        problems: list[tuple[str, object, str]] = []
        if any(b <= a for a, b in zip(self.stops, self.stops[1:], strict=False)) or any(s < 1 for s in self.stops):
            problems.append(("inversion.stops", self.stops, "must be strictly increasing integers of at least 1"))
        elif self.stops and self.stops[-1] >= self.iterations:
            allowed = f"must be below inversion.iterations = {self.iterations}"
            problems.append(("inversion.stops", self.stops, allowed))
        if len(self.fractions) != len(self.stops):
            allowed = f"must have as many entries as inversion.stops ({len(self.stops)}), has {len(self.fractions)}"
            problems.append(("inversion.fractions", self.fractions, allowed))
        if any(not 0.0 < r < 1.0 for r in self.fractions):
            problems.append(("inversion.fractions", self.fractions, "every entry must be above 0 and below 1"))
        if self.centring >= self.iterations:
            allowed = f"must be below inversion.iterations = {self.iterations}"
            problems.append(("inversion.centring", self.centring, allowed))
        elif self.stops and self.centring > self.stops[0]:
            allowed = (
                f"must not exceed the first of inversion.stops ({self.stops[0]}), because a stop needs the whole grid"
            )
            problems.append(("inversion.centring", self.centring, allowed))
        if self.copies > 1 and self.jitter == 0 and self.color_shift == 0:
            allowed = "must be 1 if inversion.jitter and inversion.color-shift are 0, because all copies would be equal"
            problems.append(("inversion.copies", self.copies, allowed))
        if self.method == "rebirth" and not self.stops:
            problems.append(("inversion.method", "rebirth", "needs at least one entry in inversion.stops"))
        if problems:
            raise SettingsError(*problems)
        return self


class DensitySettings(Stage):
    """Stage 2, the split of each image's patches into high and low density."""

    rule: Literal["survival", "quantile", "mass", "otsu"] = Field(
        "survival",
        description="Which patches of an image have high density. `survival`: those that inversion never stopped. "
        "`quantile`: a fixed number with the most attention. `mass`: the fewest patches that together hold "
        "`density.mass` of the attention. `otsu`: those above a threshold that Otsu's method sets for each image.",
    )
    quantile: float = Field(
        0.75, gt=0.0, lt=1.0, description="For the rule `quantile`: fraction of the patches that have low density."
    )
    mass: float = Field(
        0.5, gt=0.0, lt=1.0, description="For the rule `mass`: fraction of the attention in the high-density patches."
    )


class RelabelSettings(Stage):
    """Stage 3, labels by the ensemble for the low-density patches."""

    labels: Literal["soft", "hard", "off"] = Field(
        "soft",
        description="Target of the low-density patches. `soft`: the distribution that the ensemble predicts from these "
        "patches alone; `hard`: its most probable class; `off`: no target, the low-density term is left out.",
    )
    temperature: float = Field(
        1.0,
        gt=0.0,
        le=100.0,
        description="Temperature of the labels for `relabel.labels = soft`. 1: unchanged; above 1: flatter.",
    )


class DistillSettings(Stage):
    """Stage 4, distillation into the global model."""

    start: StudentStart = Field("merged", description=described("Initial weights of the student.", STUDENT_STARTS))
    merge_scale: float = Field(
        1.0,
        ge=0.0,
        le=10.0,
        description="For `merged` and `run.method = head-aggregation`: factor on the mean client update of all weights "
        "but the head. 1: the mean itself; 0: these weights keep the common initialisation.",
    )
    task_scale: float = Field(
        0.3,
        ge=0.0,
        le=10.0,
        description="For `task-arithmetic`, as `distill.start` and as `run.method`: factor on the sum of the client "
        "updates of all weights but the head. With K clients, 1 / K gives the mean.",
    )
    trainable: str = Field(
        "auto",
        pattern=r"^(auto|all|head|last-[1-9][0-9]{0,3})$",
        description="Weights of the student that distillation trains; all others keep their start. `auto`: those that "
        "the clients trained. If all uploads have the same patch embedding and the same first blocks, these are not "
        "trained; else all weights are. `all`: all weights. `head`: the classifier head. `last-N`: the last N "
        "transformer blocks, the last norm and the head; N is at least 1 and at most the number of blocks.",
    )
    cache_memory_mb: int = Field(
        1024,
        ge=0,
        description="Memory limit in MiB for the output of the student's frozen blocks (`distill.trainable`) for all "
        "images of the pool. It is kept as fp32 if that fits, else as bf16. If bf16 exceeds the limit too, each step "
        "computes it again. 0: it is never kept.",
    )
    steps: int = Field(1200, ge=1, le=10_000_000, description="Number of optimiser steps.")
    batch_size: int = Field(64, ge=1, description="Number of images in a step.")
    learning_rate: float = Field(
        1e-3,
        gt=0.0,
        le=10.0,
        description="Peak learning rate of AdamW. It rises over the first 5 % of the steps and falls to 0 along a "
        "cosine.",
    )
    weight_decay: float = Field(
        0.05, ge=0.0, le=10.0, description="AdamW's weight decay of the parameters with two or more dimensions. 0: off."
    )
    temperature: float = Field(
        1.0,
        gt=0.0,
        le=100.0,
        description="Temperature of both distributions in KL(A(x) || s(x)). 1: unchanged; above 1: flatter.",
    )
    labels: Literal["soft", "hard"] = Field(
        "soft",
        description="Target of full images. `soft`: the ensemble's distribution A(x); `hard`: its most probable class.",
    )
    ce_on: Literal["full", "high"] = Field(
        "full",
        description="Input of the student in the cross-entropy with the pseudo-label y. `full`: the full image; "
        "`high`: its high-density patches alone, as the FedMITR paper states.",
    )
    kl_weight: float = Field(
        1.0,
        ge=0.0,
        description="Weight of KL(A(x) || s(x)) on full images, A the ensemble and s the student. 0: off; mixed and "
        "random images are then left out too.",
    )
    ce_weight: float = Field(
        0.2, ge=0.0, description="Weight of the student's cross-entropy with the pseudo-label y. 0: off."
    )
    low_weight: float = Field(
        1.0,
        ge=0.0,
        description="Weight of KL(q_low || s(x_low)) on the low-density patches, q_low the labels of stage 3. 0: off.",
    )
    feature_weight: float = Field(
        1.0,
        ge=0.0,
        description="Weight of the squared distance between each teacher's [CLS] token and the student's token after "
        "a learnt linear map to that teacher. Takes 2 K D bytes of memory for each image of the pool, for K teachers "
        "of embedding width D. 0: off; the memory is saved only if `distill.teacher-weight` is 0 too.",
    )
    teacher_weight: float = Field(
        10.0,
        ge=0.0,
        description="Weight of KL(p_k || q_k), a weighted mean over the teachers k. p_k is what the teacher's head "
        "predicts from its own [CLS] token, q_k what it predicts from the student's token after the linear map. "
        "0: off.",
    )
    augment: Augmentation = Field(
        "shift",
        description="Augmentation of the further views of synthetic images (`distill.views`) and of generated images. "
        "Values as for `train.augment`.",
    )
    views: int = Field(
        2,
        ge=1,
        le=1000,
        description="Number of views of each synthetic image in the pool: the image itself and augmented copies, each "
        "labelled by the ensemble. 1: the image alone.",
    )
    mix: float = Field(
        0.0,
        ge=0.0,
        le=1000.0,
        description="Number of mixed images for each synthetic image. A mixed image takes each of its patches from one "
        "of two synthetic images. It is labelled by the ensemble and has no pseudo-label y. 0: none.",
    )
    noise_kind: RandomFamily = Field("contours", description=described("Family of the random images.", RANDOM_FAMILIES))
    noise: float = Field(
        100.0,
        ge=0.0,
        le=1000.0,
        description="Number of random images for each synthetic image. They are labelled by the ensemble and have no "
        "pseudo-label y. All images stay in memory; one of 224 px in colour takes 0.6 MB. 0: none.",
    )

    adversarial_rounds: int = Field(
        0,
        ge=0,
        le=10_000,
        description="Number of rounds in which further images are inverted during distillation, with a loss that "
        "rewards disagreement between student and ensemble (Adaptive DeepInversion). The rounds are spread evenly over "
        "the steps; their images stay in the pool. 0: none. With rounds, distillation writes no checkpoints, so an "
        "interrupted run repeats it from its start. No effect on methods without inversion.",
    )
    adversarial_images: int = Field(
        40,
        ge=1,
        le=10_000_000,
        description="Number of images that each of the `distill.adversarial-rounds` inverts, under the settings of "
        "`inversion`.",
    )
    adversarial_weight: float = Field(
        1.0,
        ge=0.0,
        le=1000.0,
        description="Weight of the disagreement (Jensen-Shannon divergence, at most 0.69) relative to the "
        "cross-entropy in the inversion of these images. If it is too high, neither student nor ensemble recognises a "
        "class in them. 0: they are inverted like all other images.",
    )

    @property
    def learns_teachers(self) -> bool:
        """Whether any loss term uses the outputs of the single teachers."""
        return self.feature_weight > 0.0 or self.teacher_weight > 0.0

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        problems: list[tuple[str, object, str]] = []
        if self.kl_weight == self.ce_weight == self.low_weight == 0.0:
            problems.append(("distill.kl-weight", 0.0, "distill.kl-weight, ce-weight and low-weight must not all be 0"))
        if self.adversarial_rounds >= self.steps:
            allowed = f"must be below distill.steps = {self.steps}, because each round needs a step after it"
            problems.append(("distill.adversarial-rounds", self.adversarial_rounds, allowed))
        if problems:
            raise SettingsError(*problems)
        return self
