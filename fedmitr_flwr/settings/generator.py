"""Settings of the generator that replaces inversion in two baselines."""

from __future__ import annotations

from pydantic import Field

from fedmitr_flwr.settings.run_config import Stage


class GeneratorSettings(Stage):
    """The image generator of `run.method = dense` and `co-boosting`; other methods ignore these settings."""

    rounds: int = Field(
        200,
        ge=1,
        le=100_000,
        description="Number of rounds. Each generates one batch of images and is followed by a share of "
        "`distill.steps`.",
    )
    batch_size: int = Field(
        128,
        ge=2,
        description="Number of images generated in a round. The images of all rounds stay in memory.",
    )
    iterations: int = Field(30, ge=1, le=1_000_000, description="Number of generator updates in a round.")
    learning_rate: float = Field(1e-3, gt=0.0, le=10.0, description="Adam's learning rate for generator and latents.")
    latent: int = Field(256, ge=1, le=65_536, description="Length of the latent vectors from which images are made.")
    width: int = Field(64, ge=1, le=4096, description="Number of channels of the last hidden feature map.")
    adversarial: float = Field(
        1.0,
        ge=0.0,
        description="Weight of the loss term that rewards images on which student and ensemble disagree. 0: off.",
    )
    perturbation: float = Field(
        8.0,
        ge=0.0,
        le=255.0,
        description="For `co-boosting`: change of each pixel before the student sees an image, in 255ths of the pixel "
        "range. 0: images stay as generated; 255: changes by the whole range.",
    )
