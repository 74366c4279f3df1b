"""The names that settings choose from, each list once.

A name stands here and in the registry of the room that implements it: `pipeline.methods.METHODS`,
`stages.inversion.methods.INVERSION`, `ensemble.weighting.WEIGHTINGS`, `stages.random_images.FAMILIES`. Tests hold that
both agree.
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
"""`run.method`."""

Weighting = Literal["uniform", "examples", "histogram", "competence"]
"""`ensemble.weighting`."""

InversionName = Literal["sparse", "rebirth"]
"""`inversion.method`."""

RandomFamily = Literal["fields", "contours", "shapes"]
"""`distill.noise-kind`."""

Start = Literal["white", RandomFamily]
"""`inversion.start`."""

Augmentation = Literal["none", "shift", "flip", "strong"]
"""`train.augment` and `distill.augment`."""

Precision = Literal["auto", "fp32", "bf16"]
"""`inversion.precision`."""

UploadDtype = Literal["fp32", "fp16", "bf16"]
"""`train.upload-dtype`."""
