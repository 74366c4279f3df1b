"""The choices of the settings whose values are names, and what each name stands for.

Six of the lists have a registry that maps each name to its implementation: `pipeline.methods.METHODS`,
`stages.inversion.methods.INVERSION`, `ensemble.weighting.WEIGHTINGS`, `ensemble.combining.COMBINATIONS`,
`pipeline.starts.STARTS` and `stages.random_images.families.FAMILIES`.
Their names have a description here, from which the settings page is made. Tests check that list, descriptions and
registry have the same names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MethodName = Literal[
    "fedmitr",
    "fedavg",
    "head-aggregation",
    "task-arithmetic",
    "ace-merging",
    "wudi-merging",
    "lda",
    "ridge",
    "dense-inversion",
    "dense-inversion-kl",
    "hard-labels",
    "random-images",
    "dense",
    "co-boosting",
]
"""Choices of `run.method`."""

MOMENT_METHODS: tuple[MethodName, ...] = ("lda", "ridge")
"""The methods that need `train.share-moments`."""

RecipeName = Literal["auto", "scratch", "pretrained"]
"""Choices of `run.recipe`."""

Weighting = Literal["uniform", "examples", "histogram", "competence"]
"""Choices of `ensemble.weighting`."""

Combination = Literal["probabilities", "logits", "sigmoids"]
"""Choices of `ensemble.combine`."""

InversionName = Literal["sparse", "rebirth"]
"""Choices of `inversion.method`."""

RandomFamily = Literal["fields", "contours", "shapes"]
"""Choices of `distill.noise-kind`."""

Start = Literal["white", RandomFamily]
"""Choices of `inversion.start`."""

StudentStart = Literal["fedavg", "initial", "merged", "task-arithmetic", "ace-merging", "wudi-merging", "moments"]
"""Choices of `distill.start`."""

Augmentation = Literal["none", "shift", "flip", "strong"]
"""Choices of `train.augment` and `distill.augment`."""

Precision = Literal["auto", "fp32", "bf16"]
"""Choices of `inversion.precision`."""

UploadDtype = Literal["fp32", "fp16", "bf16"]
"""Choices of `train.upload-dtype`."""


@dataclass(frozen=True)
class Choice:
    """One name of a list, and what it stands for."""

    name: str
    description: str


METHODS = (
    Choice("fedmitr", description="inversion, density split, relabeling and distillation"),
    Choice("fedavg", description="the average of the uploads, weighted by their number of images"),
    Choice("head-aggregation", description="the average of the updates, with class-wise weights for the head"),
    Choice(
        "task-arithmetic",
        description="the common initialisation plus `distill.task-scale` times the sum of the updates, with class-wise "
        "weights for the head",
    ),
    Choice(
        "ace-merging",
        description="the same with linear layers merged by input covariances that are estimated from the updates (ACE)",
    ),
    Choice(
        "wudi-merging",
        description="the same with linear layers merged so that the updates interfere little (WUDI)",
    ),
    Choice(
        "lda",
        description="the common initialisation with a linear discriminant of the clients' feature moments as its head "
        "(needs `train.share-moments = true`)",
    ),
    Choice(
        "ridge",
        description="the same with a head from regularised least squares (needs `train.share-moments = true`)",
    ),
    Choice("dense-inversion", description="inversion without stopping patches, and distillation with cross-entropy"),
    Choice("dense-inversion-kl", description="the same without cross-entropy"),
    Choice("hard-labels", description="FedMITR with the most probable class in place of each distribution"),
    Choice("random-images", description="distillation on random images alone"),
    Choice("dense", description="DENSE, an image generator in place of inversion"),
    Choice("co-boosting", description="Co-Boosting, likewise"),
)
RECIPES = (
    Choice("auto", description="`pretrained` if `model.init` is `pretrained` or `file:PATH`, otherwise `scratch`"),
    Choice("scratch", description="the defaults, which are made for small models that are trained from scratch"),
    Choice("pretrained", description="values for a ViT with pretrained weights, shown beside the defaults"),
)
WEIGHTINGS = (
    Choice("uniform", description="the same for all teachers"),
    Choice("examples", description="the client's number of training images"),
    Choice(
        "histogram",
        description="the client's number of images of the class (needs `train.share-label-histogram = true`)",
    ),
    Choice(
        "competence",
        description="that number as estimated from the update of the classifier head; needs only the upload",
    ),
)
COMBINATIONS = (
    Choice("probabilities", description="the weighted mean of their probabilities"),
    Choice(
        "logits",
        description="the softmax of the weighted mean of their logits, as in Co-Boosting; a teacher with large logits "
        "counts more",
    ),
    Choice(
        "sigmoids",
        description="the weighted mean of the sigmoids of their logits, divided by its sum over the classes",
    ),
)
INVERSIONS = (
    Choice(
        "sparse",
        description="each stop excludes the patches with the least attention from the rest of the inversion (SMI)",
    ),
    Choice(
        "rebirth",
        description="each stop takes out the patches with the most attention as a finished image and inverts the "
        "remaining patches further (Patch Rebirth); n stops yield n + 1 images with equally many patches each",
    ),
)
STUDENT_STARTS = (
    Choice("fedavg", description="mean of the uploads, weighted by their numbers of images"),
    Choice("initial", description="the common initialisation"),
    Choice(
        "merged",
        description="the common initialisation plus the mean client update, where each class's row of the head is "
        "averaged with the ensemble's weights for that class",
    ),
    Choice("task-arithmetic", description="as `merged`, with `distill.task-scale` times the sum of the updates"),
    Choice(
        "ace-merging",
        description="as `merged`, with linear layers merged by input covariances estimated from the updates "
        "(ACE-Merging)",
    ),
    Choice(
        "wudi-merging",
        description="as `merged`, with linear layers merged so that the updates interfere little (WUDI-Merging)",
    ),
    Choice(
        "moments",
        description="the common initialisation with the head of `ensemble.moments-weight` (needs "
        "`train.share-moments = true`)",
    ),
)
RANDOM_FAMILIES = (
    Choice("fields", description="noise of random coarseness, contrast and mean, for any data"),
    Choice("contours", description="bright random lines on a dark ground, for writing"),
    Choice("shapes", description="coloured shapes on a plain ground, for pictures of objects"),
)


def described(purpose: str, choices: tuple[Choice, ...]) -> str:
    """Return the description of a setting: its purpose, and what each of its choices stands for."""
    return " ".join([purpose, *(f"`{choice.name}`: {choice.description}." for choice in choices)])
