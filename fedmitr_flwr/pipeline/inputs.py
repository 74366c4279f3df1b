"""Inputs and result of a pipeline, the function that turns uploads into a global model.

Letters: K teachers, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from fedmitr_flwr.data import ImageSpec
from fedmitr_flwr.ensemble.averaging import fedavg, merged
from fedmitr_flwr.ensemble.bounds import bounded_counts
from fedmitr_flwr.ensemble.ensemble import Ensemble
from fedmitr_flwr.models.moments import Moments
from fedmitr_flwr.models.patch_grid import PatchGrid
from fedmitr_flwr.pipeline.checkpoints import Checkpoints
from fedmitr_flwr.pipeline.diagnostics import Diagnostics
from fedmitr_flwr.runs.observer import Observer
from fedmitr_flwr.settings import Settings
from fedmitr_flwr.stages.density import PatchSplit
from fedmitr_flwr.stages.inversion.batch import InversionTask
from fedmitr_flwr.stages.synthetic import SyntheticImages


@dataclass(frozen=True)
class Upload:
    """One accepted upload.

    Attributes
    ----------
    state
        State dict of the client's model, fp32.
    num_examples
        Number of images on which the model was trained.
    histogram
        Number of these images in each of the C classes; None if the client withheld it.
    name
        Name of the client, for messages.
    moments
        Moments of the features of these images under the common initialisation; None if the run does not ask for them.
    """

    state: Mapping[str, Tensor]
    num_examples: int
    histogram: tuple[int, ...] | None
    name: str = ""
    moments: Moments | None = None


@dataclass(frozen=True)
class PipelineInputs:
    """Inputs of a pipeline.

    Attributes
    ----------
    settings
        Settings of all stages.
    spec
        Classes, geometry and normalisation of the images.
    uploads
        K >= 1 uploads, in an order that does not depend on their arrival.
    initial
        State dict of the common initialisation.
    seed
        Seed of noise, jitter, order and augmentation.
    device
        Device on which the stages run.
    observer
        Receives events and measures the time of each stage.
    checkpoints
        Saves finished parts; parts that are already saved are not computed again. None: nothing is saved.
    """

    settings: Settings
    spec: ImageSpec
    uploads: Sequence[Upload]
    initial: Mapping[str, Tensor]
    seed: int = 0
    device: torch.device = field(default_factory=partial(torch.device, "cpu"))
    observer: Observer = field(default_factory=Observer)
    checkpoints: Checkpoints | None = None

    @property
    def num_examples(self) -> Tensor:
        """``(K,)`` fp64 number of examples of each client, bounded by the others' (`bounds.bounded_counts`)."""
        return bounded_counts(torch.tensor([upload.num_examples for upload in self.uploads]))

    @property
    def histograms(self) -> Tensor | None:
        """``(K, C)`` fp64 examples of each class, bounded likewise; None if some client withheld its histogram."""
        shared = [upload.histogram for upload in self.uploads if upload.histogram is not None]
        if len(shared) < len(self.uploads):
            return None
        counts = torch.tensor(shared, dtype=torch.float64)
        return counts * (self.num_examples / counts.sum(1).clamp_min(1.0))[:, None].clamp(max=1.0)

    def named(self, place: int) -> str:
        """Return the name of a client, or its number."""
        return self.uploads[place].name or f"client {place + 1}"

    @property
    def states(self) -> list[Mapping[str, Tensor]]:
        """K state dicts."""
        return [upload.state for upload in self.uploads]

    def average(self) -> dict[str, Tensor]:
        """Return the one-shot FedAvg of the uploads."""
        return fedavg(self.states, self.num_examples)

    def merged(self, weights: Tensor) -> dict[str, Tensor]:
        """Return the merged model, whose head is averaged class by class with ``(K, C)`` weights on the CPU."""
        return merged(self.initial, self.states, weights, self.settings.distill.merge_scale)


@dataclass(frozen=True)
class StageContext:
    """Teachers, geometry and settings, which all stages of a run use.

    Attributes
    ----------
    ensemble
        The weighted teachers.
    grid
        Geometry and valid pixel range of the synthetic images.
    settings
        Settings of all stages.
    """

    ensemble: Ensemble
    grid: PatchGrid
    settings: Settings

    @property
    def inversion(self) -> InversionTask:
        """The part of the context that stage 1 needs."""
        return InversionTask(self.ensemble, self.grid, self.settings.inversion)


@dataclass(frozen=True)
class PipelineResult:
    """Result of a pipeline: the global model, and what evaluation and report need.

    Attributes
    ----------
    state, fedavg
        State dicts of the global model and of the one-shot average, fp32 on the CPU.
    ensemble
        The weighted teachers.
    synthetic, split
        Synthetic images and the density split of their patches; None if the method makes no such images.
    diagnostics
        Diagnostics of inverted images; None if the method inverts none.
    seconds
        Wall-clock seconds of each of the stages ``invert``, ``relabel`` and ``distill`` that the method has.
    warnings
        Sentences about clients that were bounded or that dominate the result.
    """

    state: dict[str, Tensor]
    fedavg: dict[str, Tensor]
    ensemble: Ensemble
    synthetic: SyntheticImages | None
    split: PatchSplit | None
    diagnostics: Diagnostics | None
    seconds: dict[str, float]
    warnings: tuple[str, ...] = ()


class Pipeline(Protocol):
    """Signature of a function that turns uploads into a global model: `fedmitr.run_pipeline` or a baseline."""

    def __call__(self, inputs: PipelineInputs) -> PipelineResult:
        """Run the pipeline; see `fedmitr.run_pipeline`."""
