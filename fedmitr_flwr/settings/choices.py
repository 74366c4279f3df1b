"""The choices of the settings whose values are names.

Four of the lists have a registry that maps each name to its implementation: `pipeline.methods.METHODS`,
`stages.inversion.methods.INVERSION`, `ensemble.weighting.WEIGHTINGS` and `stages.random_images.FAMILIES`. Tests check
that list and registry have the same names.
"""

from __future__ import annotations

from typing import Literal

MethodName = Literal[
    "fedmitr",
    "fedavg",
    "head-aggregation",
    "dense-inversion",
    "dense-inversion-kl",
    "hard-labels",
    "random-images",
    "dense",
    "co-boosting",
]
"""Choices of `run.method`."""

Weighting = Literal["uniform", "examples", "histogram", "competence"]
"""Choices of `ensemble.weighting`."""

InversionName = Literal["sparse", "rebirth"]
"""Choices of `inversion.method`."""

RandomFamily = Literal["fields", "contours", "shapes"]
"""Choices of `distill.noise-kind`."""

Start = Literal["white", RandomFamily]
"""Choices of `inversion.start`."""

Augmentation = Literal["none", "shift", "flip", "strong"]
"""Choices of `train.augment` and `distill.augment`."""

Precision = Literal["auto", "fp32", "bf16"]
"""Choices of `inversion.precision`."""

UploadDtype = Literal["fp32", "fp16", "bf16"]
"""Choices of `train.upload-dtype`."""
