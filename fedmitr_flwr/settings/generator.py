"""Settings of the generator that two baselines have in place of inversion."""

from __future__ import annotations

from pydantic import Field

from fedmitr_flwr.settings.run_config import Stage


class GeneratorSettings(Stage):
    """The generator of `run.method` `dense` and `co-boosting`; the other methods have none."""

    rounds: int = Field(
        200,
        ge=1,
        le=100_000,
        description="Batches that are generated one after the other, each followed by its share of `distill.steps`.",
    )
    batch_size: int = Field(
        128,
        ge=2,
        description="Images generated in a round; those of all rounds stay in memory.",
    )
    iterations: int = Field(30, ge=1, le=1_000_000, description="Updates of the generator in a round.")
    learning_rate: float = Field(1e-3, gt=0.0, le=10.0, description="Adam learning rate of generator and latents.")
    latent: int = Field(256, ge=1, le=65_536, description="Length of the latent vectors.")
    width: int = Field(64, ge=1, le=4096, description="Channels of the generator's last hidden map.")
    adversarial: float = Field(
        1.0, ge=0.0, description="Weight of the term that asks for images on which student and ensemble disagree."
    )
    perturbation: float = Field(
        8.0,
        ge=0.0,
        le=255.0,
        description="How far `co-boosting` moves each pixel before the student sees an image, in 255ths of the pixel "
        "range; 0: not at all.",
    )
