"""Settings of the server's stages, from the ensemble to distillation."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from fedmitr_flwr.settings.choices import Augmentation, InversionName, Precision, RandomFamily, Start, Weighting
from fedmitr_flwr.settings.run_config import FloatList, IntList, SettingsError, Stage


class EnsembleSettings(Stage):
    """How the teachers' predictions are combined (A(x) = sum_k w_k(c) p_k(c|x))."""

    weighting: Weighting = Field(
        "competence",
        description="Weight of a teacher for a class: equal, by its number of examples, by its label histogram, or by "
        "the class competence estimated from how its classifier head moved (needs nothing but the upload).",
    )
    power: float = Field(
        0.5, ge=0.0, le=4.0, description="Exponent on the weights before they are normalised; 0 is uniform."
    )
    outlier_guard: float = Field(
        0.0,
        ge=0.0,
        le=1.0,
        description="A teacher is heard less when the others agree with it less than this many times as much as with "
        "the typical one, on synthetic and random images and for the classes that both know, or when its weights "
        "point away from theirs; 0: nobody is judged, 0.5 is sensible.",
    )


class InversionSettings(Stage):
    """Stage 1, sparse model inversion (SMI, arXiv 2510.27186)."""

    method: InversionName = Field(
        "sparse",
        description="`sparse`: at each stop the patches with the least attention leave for good (SMI). `rebirth`: "
        "those with the most leave as a finished image, and the others go on (Patch Rebirth): n stops yield n + 1 "
        "images, which share the patches evenly.",
    )
    images: int = Field(120, ge=1, le=10_000_000, description="Synthetic images, spread evenly over the classes.")
    batch_size: int = Field(40, ge=1, description="Images inverted at a time.")
    iterations: int = Field(40, ge=1, le=1_000_000, description="Optimisation steps for each batch.")
    stops: IntList = Field(
        (6, 10, 14, 18), description="Iterations before which patches are stopped; empty: dense inversion."
    )
    fractions: FloatList = Field(
        (0.3, 0.3, 0.3, 0.3), description="Fraction of the remaining patches stopped at each of them, under `sparse`."
    )
    learning_rate: float = Field(0.1, gt=0.0, le=100.0, description="Adam learning rate, in normalised pixels.")
    beta1: float = Field(0.5, ge=0.0, lt=1.0, description="Adam beta 1.")
    beta2: float = Field(0.99, ge=0.0, lt=1.0, description="Adam beta 2.")
    tv_weight: float = Field(0.05, ge=0.0, description="Weight of the total variation.")
    l2_weight: float = Field(
        0.0, ge=0.0, description="Weight of the mean squared pixel: a pull towards the normalisation mean."
    )
    jitter: int = Field(
        0, ge=0, le=64, description="Largest random shift in whole patches at dense iterations; 0: none."
    )
    color_shift: float = Field(
        0.0,
        ge=0.0,
        le=3.0,
        description="ColorShift of Plug-In Inversion: in each iteration the ensemble sees each channel of each image "
        "less a random mean of up to this, and divided by exp of a random number of up to this; the paper has 1. "
        "0: none.",
    )
    copies: int = Field(
        1,
        ge=1,
        le=1024,
        description="Looks at each image in an iteration, under different jitter and colours, whose gradients are "
        "averaged. An iteration takes as many times as long; the paper of Plug-In Inversion has 32.",
    )
    diversity: float = Field(
        0.0,
        ge=0.0,
        le=1000.0,
        description="Weight of a contrastive term that makes the images of a batch differ in what the teachers see in "
        "them (CMI; its authors have 0.8): the larger `inversion.batch-size`, the more there are to differ from. "
        "0: off.",
    )
    diversity_temperature: float = Field(
        0.1,
        ge=0.01,
        le=10.0,
        description="Temperature of the similarities in that term; the lower, the more the nearest image counts.",
    )
    centring: int = Field(
        0,
        ge=0,
        le=1_000_000,
        description="Iterations in which an image grows from its central patches, ring by ring, to the whole grid, as "
        "in Plug-In Inversion; the first stop can't come before. 0: the whole grid from the start.",
    )
    start: Start = Field(
        "fields",
        description="Starting noise: `white` (Gaussian, around the normalisation mean), or as `distill.noise-kind`.",
    )
    start_std: float = Field(0.5, ge=0.0, le=10.0, description="Standard deviation of `white` starting noise.")
    precision: Precision = Field(
        "auto",
        description="What the teachers compute in; loss, pixels and updates are always fp32. `auto`: bf16 where the "
        "device is fast at bf16 products (CUDA, AMX, AMD from Zen 4 on) and the model is wider than 128, else fp32.",
    )
    teachers_per_batch: int = Field(
        0,
        ge=0,
        description="Teachers that a batch is inverted from, drawn for each batch by their weight for its classes; "
        "0: all.",
    )
    activation_memory_mb: int = Field(
        640,
        ge=0,
        description="Activations of all teachers together, in MiB, kept between forward and backward pass. With more, "
        "each teacher runs forward twice, half as long again.",
    )
    teacher_memory_mb: int = Field(
        4096,
        ge=0,
        description="Weights of all teachers, in MiB, as they came and packed. With more, they are held once, in bf16; "
        "if that is too much as well, they are read from the uploads on disk for every pass.",
    )

    @model_validator(mode="after")
    def _schedule(self) -> Self:
        problems: list[tuple[str, object, str]] = []
        if any(b <= a for a, b in zip(self.stops, self.stops[1:], strict=False)) or any(s < 1 for s in self.stops):
            problems.append(("inversion.stops", self.stops, "must be strictly increasing and at least 1"))
        elif self.stops and self.stops[-1] >= self.iterations:
            allowed = f"must lie below inversion.iterations = {self.iterations}"
            problems.append(("inversion.stops", self.stops, allowed))
        if len(self.fractions) != len(self.stops):
            allowed = f"must have as many entries as inversion.stops ({len(self.stops)}), has {len(self.fractions)}"
            problems.append(("inversion.fractions", self.fractions, allowed))
        if any(not 0.0 < r < 1.0 for r in self.fractions):
            problems.append(("inversion.fractions", self.fractions, "must lie between 0 and 1, both excluded"))
        if self.centring >= self.iterations:
            allowed = f"must lie below inversion.iterations = {self.iterations}"
            problems.append(("inversion.centring", self.centring, allowed))
        elif self.stops and self.centring > self.stops[0]:
            allowed = f"must not exceed the first of inversion.stops, {self.stops[0]}: a stop needs the whole grid"
            problems.append(("inversion.centring", self.centring, allowed))
        if self.copies > 1 and self.jitter == 0 and self.color_shift == 0:
            allowed = "must be 1 without inversion.jitter and inversion.color-shift: all copies would be the same"
            problems.append(("inversion.copies", self.copies, allowed))
        if self.method == "rebirth" and not self.stops:
            problems.append(("inversion.method", "rebirth", "needs inversion.stops"))
        if problems:
            raise SettingsError(*problems)
        return self


class DensitySettings(Stage):
    """Stage 2, which patches count as dense."""

    rule: Literal["survival", "quantile", "mass", "otsu"] = Field(
        "survival",
        description="High density: patches that survived inversion, the top quantile of the attention, the fewest "
        "patches that hold a share of the attention mass, or above Otsu's threshold for each image.",
    )
    quantile: float = Field(0.75, gt=0.0, lt=1.0, description="Fraction of the patches that is low for `quantile`.")
    mass: float = Field(0.5, gt=0.0, lt=1.0, description="Share of the attention mass that is high for `mass`.")


class RelabelSettings(Stage):
    """Stage 3, ensemble labels for the low-density patches."""

    labels: Literal["soft", "hard", "off"] = Field(
        "soft",
        description="What the low-density patches learn: the ensemble's soft label, its arg max, or nothing.",
    )
    temperature: float = Field(1.0, gt=0.0, le=100.0, description="Temperature of the soft labels; 1 leaves them.")


class DistillSettings(Stage):
    """Stage 4, distillation into the global model."""

    start: Literal["fedavg", "initial", "merged"] = Field(
        "merged",
        description="The student's first weights: one-shot average, common initialisation, or the initialisation plus "
        "`distill.merge-scale` times the mean client update with class-wise weights for the head.",
    )
    merge_scale: float = Field(1.0, ge=0.0, le=10.0, description="Scale of the mean update for `merged`.")
    steps: int = Field(1200, ge=1, le=10_000_000, description="Optimiser steps.")
    batch_size: int = Field(64, ge=1, description="Images in a step.")
    learning_rate: float = Field(1e-3, gt=0.0, le=10.0, description="Peak learning rate (AdamW, warm-up, cosine).")
    weight_decay: float = Field(0.05, ge=0.0, le=10.0, description="Decoupled weight decay.")
    temperature: float = Field(1.0, gt=0.0, le=100.0, description="Temperature of KL(A(x) || s(x)).")
    labels: Literal["soft", "hard"] = Field(
        "soft", description="What full images learn: the ensemble's distribution A(x), or its most probable class."
    )
    ce_on: Literal["full", "high"] = Field(
        "full",
        description="Where CE(s(.), y) looks: the full image, or its high-density patches alone (the paper's words).",
    )
    kl_weight: float = Field(1.0, ge=0.0, description="Weight of KL(A(x) || s(x)) on full images.")
    ce_weight: float = Field(0.2, ge=0.0, description="Weight of the cross-entropy with the pseudo-label y.")
    low_weight: float = Field(1.0, ge=0.0, description="Weight of KL(q_low || s(x_low)) on the low-density patches.")
    feature_weight: float = Field(
        1.0,
        ge=0.0,
        description="Weight of the distance from each teacher's [CLS] token, to which the student's is mapped by a "
        "linear map of its own. Keeps 2 K D bytes for each image of the pool, D the embedding; 0 with "
        "`distill.teacher-weight` 0: none.",
    )
    teacher_weight: float = Field(
        10.0,
        ge=0.0,
        description="Weight of KL(p_k || q_k), mean over the teachers: what each one's own head reads in its token, "
        "and in the student's after that map.",
    )
    augment: Augmentation = Field(
        "shift", description="Augmentation of the synthetic images' further views, as `train.augment`."
    )
    views: int = Field(
        2,
        ge=1,
        le=1000,
        description="Views of each synthetic image: itself and augmented ones, each labelled by the ensemble.",
    )
    mix: float = Field(
        0.0,
        ge=0.0,
        le=1000.0,
        description="Further images for each synthetic one, whose patches are mixed from two of them; labelled by the "
        "ensemble (KL term only). 0: none.",
    )
    noise_kind: RandomFamily = Field(
        "contours",
        description="`fields`: noise of random coarseness, contrast and mean, for any images; `contours`: bright "
        "random lines on a dark ground, for writing; `shapes`: coloured shapes on a plain ground, for pictures of "
        "things.",
    )
    noise: float = Field(
        100.0,
        ge=0.0,
        le=1000.0,
        description="Further images for each synthetic one, of random noise; labelled by the ensemble (KL term only). "
        "0: none. The pool of all images stays in memory: 0.6 MB for each at 224 px in colour.",
    )

    adversarial_rounds: int = Field(
        0,
        ge=0,
        le=10_000,
        description="Times that further images are inverted while the student learns, on which it and the ensemble "
        "disagree (Adaptive DeepInversion); spread evenly over the steps. They stay in the pool. 0: none. With rounds "
        "no state of distillation is kept, and a run that is cut off there distils anew. Without effect on methods "
        "that invert nothing.",
    )
    adversarial_images: int = Field(
        40, ge=1, le=10_000_000, description="Images of a round, as `inversion` makes them."
    )
    adversarial_weight: float = Field(
        1.0,
        ge=0.0,
        le=1000.0,
        description="Weight of the disagreement (Jensen-Shannon divergence, at most 0.69) against the cross-entropy in "
        "their inversion; too high, and they look like nothing to either. 0: they are images like all others.",
    )

    @property
    def learns_teachers(self) -> bool:
        """Whether any term of the loss reads what each teacher makes of an image."""
        return self.feature_weight > 0.0 or self.teacher_weight > 0.0

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        problems: list[tuple[str, object, str]] = []
        if self.kl_weight == self.ce_weight == self.low_weight == 0.0:
            problems.append(("distill.kl-weight", 0.0, "kl-weight, ce-weight and low-weight must not all be 0"))
        if self.adversarial_rounds >= self.steps:
            allowed = f"must lie below distill.steps = {self.steps}: each is followed by a step at least"
            problems.append(("distill.adversarial-rounds", self.adversarial_rounds, allowed))
        if problems:
            raise SettingsError(*problems)
        return self
