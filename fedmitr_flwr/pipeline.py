"""The four stages in order: from uploads to one global ViT, without any data.

Letters: B images, K teachers, C classes, D embedding.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from fedmitr_flwr.averaging import fedavg, merged
from fedmitr_flwr.checkpoints import Checkpoints
from fedmitr_flwr.data import ImageSpec
from fedmitr_flwr.density import PatchSplit, split_patches
from fedmitr_flwr.diagnostics import Diagnostics, diagnose
from fedmitr_flwr.distill import distill, make_pool
from fedmitr_flwr.ensemble import Ensemble, MemoryLimits
from fedmitr_flwr.grid import PatchGrid
from fedmitr_flwr.inversion import SyntheticImages, invert
from fedmitr_flwr.models import build_model
from fedmitr_flwr.observe import Observer
from fedmitr_flwr.outliers import trust
from fedmitr_flwr.progress import FINISHED_SHOWN, DistillProgress, InversionProgress
from fedmitr_flwr.relabel import LowTargets, relabel
from fedmitr_flwr.settings import InversionSettings, Settings
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
    """What turns uploads into a global model: `run_pipeline` or a baseline with its signature."""

    def __call__(
        self,
        settings: Settings,
        spec: ImageSpec,
        clients: Sequence[ClientModel],
        initial: Mapping[str, Tensor],
        *,
        seed: int,
        device: torch.device,
        observer: Observer,
        checkpoints: Checkpoints | None = None,
    ) -> PipelineResult:
        """Run it; see `run_pipeline`."""


def run_pipeline(
    settings: Settings,
    spec: ImageSpec,
    clients: Sequence[ClientModel],
    initial: Mapping[str, Tensor],
    *,
    seed: int,
    device: torch.device,
    observer: Observer,
    checkpoints: Checkpoints | None = None,
) -> PipelineResult:
    """Run FedMITR on validated uploads.

    Parameters
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

    Raises
    ------
    SettingsError, ValueError
        If the weighting needs histograms that clients withheld.
    InversionDivergedError, RuntimeError
        If a loss stops being finite.
    """
    ensemble, known = make_ensemble(settings, spec, clients, initial, device, observer)
    model = build_model(settings.model, spec)
    grid = PatchGrid.of(model, spec)
    with observer.stage("invert"):
        synthetic = invert_all(
            ensemble,
            known,
            grid,
            settings.inversion,
            seed=seed,
            device=device,
            observer=observer,
            checkpoints=checkpoints,
        )
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
    average = fedavg([client.state for client in clients], torch.tensor([client.num_examples for client in clients]))
    state = checkpoints.model() if checkpoints is not None else None
    if state is None:
        with observer.stage("distill"):
            model.load_state_dict(student_start(settings, clients, initial, ensemble, average))
            generator = torch.Generator().manual_seed(seed)
            pool = make_pool(ensemble, synthetic, split, targets, grid, settings.distill, generator=generator)
            observer.event("distill", labelled_images=len(pool.labels))
            model.to(device)
            report = DistillProgress(observer, settings.distill.steps, model, pool)
            progress = checkpoints.progress() if checkpoints is not None else None
            distill(model, pool, settings.distill, generator=generator, on_step=report, progress=progress)
        state = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
        if checkpoints is not None:
            checkpoints.save_model(state)
    return PipelineResult(state, average, ensemble, synthetic, split, found, dict(observer.seconds))


def make_ensemble(
    settings: Settings,
    spec: ImageSpec,
    clients: Sequence[ClientModel],
    initial: Mapping[str, Tensor],
    device: torch.device,
    observer: Observer | None = None,
) -> tuple[Ensemble, Tensor]:
    """Load the uploads as teachers and weight them.

    Returns
    -------
    ensemble
        On `device`.
    known
        ``(C',)`` int64 classes that at least one client knows something of.
    """
    limits = MemoryLimits(settings.inversion.activation_memory_mb, settings.inversion.teacher_memory_mb)
    blank = build_model(settings.model, spec)
    teachers: list[VisionTransformer] = []
    for client in clients:
        teacher = copy.deepcopy(blank)
        teacher.load_state_dict(client.state)
        limits.shrink(teacher, len(clients))
        teachers.append(teacher.to(device))
    num_examples = torch.tensor([client.num_examples for client in clients], dtype=torch.float64)
    shared = [client.histogram for client in clients if client.histogram is not None]
    histograms = torch.tensor(shared, dtype=torch.float64) if len(shared) == len(clients) else None
    head_updates = torch.stack([client.state["head.weight"] - initial["head.weight"] for client in clients])
    known_of = evidence(settings.ensemble.weighting, num_examples, histograms, head_updates)
    heard = None
    if settings.ensemble.outlier_guard:
        heard = trust(known_of, teachers, initial, PatchGrid.of(blank, spec), settings, observer or Observer())
    weights = class_weights(known_of, settings.ensemble.power, heard)
    if observer is not None:
        observer.snapshot("ensemble", evidence=known_of, weights=weights)
    known = (known_of.sum(0) > 0).nonzero().squeeze(1)
    return Ensemble(teachers, weights.to(device), limits), known.to(device)


def invert_all(
    ensemble: Ensemble,
    classes: Tensor,
    grid: PatchGrid,
    settings: InversionSettings,
    *,
    seed: int,
    device: torch.device,
    observer: Observer,
    checkpoints: Checkpoints | None = None,
) -> SyntheticImages:
    """Stage 1 in batches; labels run through `classes` in turn, each batch has its own seed."""
    labels = classes[torch.arange(settings.images, device=device) % len(classes)]
    parts = []
    progress = InversionProgress(observer, settings, len(classes)) if observer.watched else None
    for number, batch in enumerate(labels.split(settings.batch_size)):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        few = ensemble.draw(settings.teachers_per_batch, batch, generator)
        watch = progress.of_batch(number) if progress else {}
        make = partial(invert, few, batch, grid, settings, generator=generator, **watch)
        parts.append(make() if checkpoints is None else checkpoints.batch(number, make, device))
        done = min((number + 1) * settings.batch_size, settings.images)
        observer.event("invert", images=f"{done}/{settings.images}", loss=float(parts[-1].loss.mean()))
    synthetic = SyntheticImages(
        torch.cat([part.images for part in parts]),
        labels,
        torch.cat([part.kept for part in parts]),
        torch.cat([part.loss for part in parts]),
    )
    shown = labels.argsort(stable=True)[:FINISHED_SHOWN]
    observer.snapshot("finished", images=synthetic.images[shown], labels=labels[shown])
    return synthetic


@torch.no_grad()
def split_and_relabel(
    ensemble: Ensemble,
    synthetic: SyntheticImages,
    grid: PatchGrid,
    settings: Settings,
    observer: Observer | None = None,
) -> tuple[PatchSplit, LowTargets]:
    """Stages 2 and 3. The attention over the full grid is taken anew on the finished images."""
    patches = grid.to_patches(synthetic.images)
    attention, seen = [], []
    for part, labels in zip(patches.split(256), synthetic.labels.split(256), strict=True):
        out = ensemble(part, attention=True, labels=labels)
        assert out.attention is not None
        attention.append(out.attention)
        seen.append(out.probabilities)
    split = split_patches(synthetic.kept, torch.cat(attention), settings.density)
    if observer is not None:
        observer.snapshot("density", attention=torch.cat(attention), probabilities=torch.cat(seen))
    return split, relabel(ensemble, patches, split, settings.relabel)


def student_start(
    settings: Settings,
    clients: Sequence[ClientModel],
    initial: Mapping[str, Tensor],
    ensemble: Ensemble,
    average: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Choose the student's first weights, by `distill.start`."""
    if settings.distill.start == "initial":
        return dict(initial)
    if settings.distill.start == "merged":
        states = [client.state for client in clients]
        return merged(initial, states, ensemble.weights.cpu(), settings.distill.merge_scale)
    return dict(average)
