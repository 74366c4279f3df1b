"""The four stages in order: from uploads to one global ViT, without any data.

Letters: B images, K teachers, C classes, D embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from fedmitr_flwr.adversarial import HardImages
from fedmitr_flwr.averaging import fedavg, merged
from fedmitr_flwr.branches import Branches
from fedmitr_flwr.checkpoints import Checkpoints
from fedmitr_flwr.data import ImageSpec
from fedmitr_flwr.density import PatchSplit
from fedmitr_flwr.diagnostics import Diagnostics, diagnose
from fedmitr_flwr.distill import distill
from fedmitr_flwr.ensemble import Ensemble
from fedmitr_flwr.grid import PatchGrid
from fedmitr_flwr.models import build_model
from fedmitr_flwr.observe import Observer
from fedmitr_flwr.outliers import trust
from fedmitr_flwr.pool import Pool, make_pool
from fedmitr_flwr.progress import FINISHED_SHOWN, DistillProgress, InversionProgress
from fedmitr_flwr.settings import DistillSettings, Settings
from fedmitr_flwr.synthesis import invert_batch, split_and_relabel
from fedmitr_flwr.synthetic import SyntheticImages
from fedmitr_flwr.teachers import MemoryLimits, PagedTeachers, load_teachers
from fedmitr_flwr.watch import NOBODY
from fedmitr_flwr.weighting import class_weights, evidence


@dataclass(frozen=True)
class ClientModel:
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
    clients
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
    clients: Sequence[ClientModel]
    initial: Mapping[str, Tensor]
    seed: int = 0
    device: torch.device = field(default_factory=partial(torch.device, "cpu"))
    observer: Observer = field(default_factory=Observer)
    checkpoints: Checkpoints | None = None

    @property
    def num_examples(self) -> Tensor:
        """``(K,)`` int64 number of examples of each client."""
        return torch.tensor([client.num_examples for client in self.clients])

    def average(self) -> dict[str, Tensor]:
        """Return the one-shot FedAvg of the uploads."""
        return fedavg([client.state for client in self.clients], self.num_examples)


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


def run_pipeline(inputs: PipelineInputs) -> PipelineResult:
    """Run FedMITR on validated uploads.

    Raises
    ------
    SettingsError, ValueError
        If the weighting needs histograms that clients withheld.
    InversionDivergedError, RuntimeError
        If a loss stops being finite.
    """
    settings, observer, checkpoints = inputs.settings, inputs.observer, inputs.checkpoints
    ensemble, known = make_ensemble(inputs)
    model = build_model(settings.model, inputs.spec)
    grid = PatchGrid.of(model, inputs.spec)
    with observer.stage("invert"):
        synthetic = invert_all(ensemble, known, grid, inputs)
        found = diagnose(ensemble, synthetic, grid, settings.inversion)
        observer.event("diagnostics", **found.as_dict())
        for warning in found.warnings():
            observer.event("diagnostics", warning=warning)
    with observer.stage("relabel"):
        split, targets = split_and_relabel(ensemble, synthetic, grid, settings, observer)
        observer.event(
            "relabel",
            high_density=float(split.high.float().mean()),
            ensemble_agrees=float((targets.probabilities.argmax(1) == synthetic.labels)[targets.present].float().mean())
            if bool(targets.present.any())
            else 0.0,
        )
    average = inputs.average()
    state = checkpoints.model() if checkpoints is not None else None
    if state is None:
        with observer.stage("distill"):
            model.load_state_dict(student_start(inputs, ensemble, average))
            generator = torch.Generator().manual_seed(inputs.seed)
            pool = make_pool(ensemble, synthetic, split, targets, grid, settings.distill, generator=generator)
            observer.event("distill", labelled_images=len(pool.labels))
            harder = HardImages(
                ensemble, model, known, grid, settings, pool, seed=inputs.seed, generator=generator, observer=observer
            )
            grow = harder if settings.distill.adversarial_rounds > 0 else None
            state = distilled(inputs, ensemble, model, pool, settings.distill, generator, grow)
        if checkpoints is not None:
            checkpoints.save_model(state)
    return PipelineResult(state, average, ensemble, synthetic, split, found, dict(observer.seconds))


def make_ensemble(inputs: PipelineInputs) -> tuple[Ensemble, Tensor]:
    """Load the uploads as teachers and weight them.

    Returns
    -------
    ensemble
        On the inputs' device.
    known
        ``(C',)`` int64 classes that at least one client knows something of.
    """
    settings, clients, device = inputs.settings, inputs.clients, inputs.device
    limits = MemoryLimits(settings.inversion.activation_memory_mb, settings.inversion.teacher_memory_mb)
    blank = build_model(settings.model, inputs.spec)
    teachers = load_teachers(blank, [client.state for client in clients], limits, device)
    if isinstance(teachers, PagedTeachers):
        inputs.observer.event("ensemble", teachers="read from disk for every pass: above inversion.teacher-memory-mb")
    num_examples = inputs.num_examples.double()
    shared = [client.histogram for client in clients if client.histogram is not None]
    histograms = torch.tensor(shared, dtype=torch.float64) if len(shared) == len(clients) else None
    head_updates = torch.stack([client.state["head.weight"] - inputs.initial["head.weight"] for client in clients])
    known_of = evidence(settings.ensemble.weighting, num_examples, histograms, head_updates)
    heard = None
    if settings.ensemble.outlier_guard:
        grid = PatchGrid.of(blank, inputs.spec)
        heard = trust(known_of, teachers, inputs.initial, grid, settings, inputs.observer)
    weights = class_weights(known_of, settings.ensemble.power, heard)
    inputs.observer.snapshot("ensemble", evidence=known_of, weights=weights)
    known = (known_of.sum(0) > 0).nonzero().squeeze(1)
    return Ensemble(teachers, weights.to(device), limits), known.to(device)


def invert_all(ensemble: Ensemble, classes: Tensor, grid: PatchGrid, inputs: PipelineInputs) -> SyntheticImages:
    """Stage 1 in batches; labels run through `classes` in turn, each batch has its own seed."""
    settings, observer, checkpoints = inputs.settings.inversion, inputs.observer, inputs.checkpoints
    labels = classes[torch.arange(settings.runs, device=classes.device) % len(classes)]
    parts = []
    progress = InversionProgress(observer, settings, len(classes)) if observer.watched else None
    for number, batch in enumerate(labels.split(settings.batch_size)):
        watch = progress.of_batch(number) if progress else NOBODY
        make = partial(invert_batch, ensemble, batch, grid, settings, number=number, seed=inputs.seed, watch=watch)
        parts.append(make() if checkpoints is None else checkpoints.batch(number, make, inputs.device))
        done = sum(len(part.labels) for part in parts)
        observer.event(
            "invert", images=f"{done}/{settings.runs * settings.images_per_run}", loss=float(parts[-1].loss.mean())
        )
    synthetic = SyntheticImages.join(parts)
    shown = synthetic.labels.argsort(stable=True)[:FINISHED_SHOWN]
    observer.snapshot("finished", images=synthetic.images[shown], labels=synthetic.labels[shown])
    return synthetic


def student_start(inputs: PipelineInputs, ensemble: Ensemble, average: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Choose the student's first weights, by `distill.start`."""
    chosen = inputs.settings.distill
    if chosen.start == "initial":
        return dict(inputs.initial)
    if chosen.start == "merged":
        states = [client.state for client in inputs.clients]
        return merged(inputs.initial, states, ensemble.weights.cpu(), chosen.merge_scale)
    return dict(average)


def distilled(
    inputs: PipelineInputs,
    ensemble: Ensemble,
    student: VisionTransformer,
    pool: Pool,
    settings: DistillSettings,
    generator: torch.Generator,
    grow: Callable[[int], Pool | None] | None = None,
) -> dict[str, Tensor]:
    """Stage 4, watched and kept from time to time; returns the student's state dict on the CPU.

    With `grow` (see `distill.distill`) nothing is kept: a run that is cut off distils anew.
    """
    student.to(inputs.device)
    report = DistillProgress(inputs.observer, settings.steps, student, pool)
    progress = inputs.checkpoints.progress() if inputs.checkpoints is not None and grow is None else None
    features = pool.targets.features
    branches = None if features is None else Branches.of(ensemble, features)
    distill(
        student,
        pool,
        settings,
        generator=generator,
        branches=branches,
        on_step=report,
        progress=progress,
        grow=grow,
    )
    return cpu_state(student)


def cpu_state(model: VisionTransformer) -> dict[str, Tensor]:
    """A copy of a model's state dict on the CPU."""
    return {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
