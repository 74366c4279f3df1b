"""What a pipeline is given, and what it returns.

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
from fedmitr_flwr.ensemble.averaging import fedavg
from fedmitr_flwr.ensemble.ensemble import Ensemble
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
        Number of images that it was trained on.
    histogram
        Number of them in each of the C classes; None if withheld.
    """

    state: Mapping[str, Tensor]
    num_examples: int
    histogram: tuple[int, ...] | None


@dataclass(frozen=True)
class PipelineInputs:
    """What a pipeline is given.

    Attributes
    ----------
    settings
        All stages' settings.
    spec
        Classes, geometry and normalisation.
    uploads
        K >= 1 uploads, in an order that does not depend on their arrival.
    initial
        State dict of the common initialisation.
    seed
        Seed of noise, jitter, order and augmentation.
    device
        Where the stages run.
    observer
        Receives events and times.
    checkpoints
        Keeps what is finished; what it holds already is not made again.
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
        """``(K,)`` int64 number of examples of each client."""
        return torch.tensor([upload.num_examples for upload in self.uploads])

    @property
    def states(self) -> list[Mapping[str, Tensor]]:
        """K state dicts."""
        return [upload.state for upload in self.uploads]

    def average(self) -> dict[str, Tensor]:
        """Return the one-shot FedAvg of the uploads."""
        return fedavg(self.states, self.num_examples)


@dataclass(frozen=True)
class StageContext:
    """What the stages of one run have in common.

    Attributes
    ----------
    ensemble
        The weighted teachers.
    grid
        Geometry and valid range of the synthetic images.
    settings
        All stages' settings.
    """

    ensemble: Ensemble
    grid: PatchGrid
    settings: Settings

    @property
    def inversion(self) -> InversionTask:
        """The same for stage 1."""
        return InversionTask(self.ensemble, self.grid, self.settings.inversion)


@dataclass(frozen=True)
class PipelineResult:
    """What came out, and what evaluation and the report look at.

    Attributes
    ----------
    state, fedavg
        State dicts of the global model and of the one-shot average, fp32 on the CPU.
    ensemble
        The teachers with their weights.
    synthetic, split
        The synthetic images and the density split of their patches; None of a method that makes none.
    diagnostics
        Of the synthetic images; None without them.
    seconds
        Wall-clock seconds of ``invert``, ``relabel`` and ``distill``.
    """

    state: dict[str, Tensor]
    fedavg: dict[str, Tensor]
    ensemble: Ensemble
    synthetic: SyntheticImages | None
    split: PatchSplit | None
    diagnostics: Diagnostics | None
    seconds: dict[str, float]


class Pipeline(Protocol):
    """What turns uploads into a global model: `run_pipeline` or a baseline."""

    def __call__(self, inputs: PipelineInputs) -> PipelineResult:
        """Run it; see `run_pipeline`."""
