"""Accuracies on held-out images: local models, one-shot FedAvg, ensemble and global model.

Letters: B images, K teachers, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedmitr_flwr.data import ImageSet, ImageSpec
from fedmitr_flwr.models.build import build_model
from fedmitr_flwr.models.patch_grid import PatchGrid
from fedmitr_flwr.models.vit import forward_images
from fedmitr_flwr.pipeline.inputs import PipelineResult
from fedmitr_flwr.results.metrics import MODELS, computed
from fedmitr_flwr.settings import ModelSettings


@dataclass(frozen=True)
class Evaluation:
    """Accuracies in 0..1 on one image set.

    Attributes
    ----------
    local
        One for each of the K local models.
    fedavg, ensemble, global_model
        Of the one-shot average, the weighted ensemble and the distilled global model.
    per_class
        C accuracies for each of ``fedavg``, ``ensemble`` and ``global``; None for a class without images.
    confusion
        ``C x C`` counts of the global model, rows the true class.
    num_images
        Images evaluated on.
    metrics
        For ``fedavg``, ``ensemble`` and ``global`` the metrics of `metrics.METRICS` by name.
    """

    local: tuple[float, ...]
    fedavg: float
    ensemble: float
    global_model: float
    per_class: Mapping[str, tuple[float | None, ...]]
    confusion: tuple[tuple[int, ...], ...]
    num_images: int
    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @property
    def local_mean(self) -> float:
        """Mean accuracy of the local models."""
        return sum(self.local) / len(self.local)

    def accuracy(self) -> dict[str, float]:
        """The four totals under the names of ``metrics.json``."""
        return dict(zip(MODELS, (self.local_mean, self.fedavg, self.ensemble, self.global_model), strict=True))


@torch.no_grad()
def evaluate(
    result: PipelineResult,
    images: ImageSet,
    spec: ImageSpec,
    settings: ModelSettings,
    device: torch.device,
    batch_size: int = 250,
) -> Evaluation:
    """Evaluate everything that a run produced.

    Parameters
    ----------
    result
        Of the pipeline.
    images
        Held-out images that no client saw, at least one.
    spec, settings
        To build the models.
    device
        Where to run.

    Raises
    ------
    ValueError
        If there are no images.
    """
    # Brings in SciPy and matplotlib, 100 MB that the server's process has no use for while it collects uploads.
    from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

    if len(images) == 0:
        raise ValueError("no images to evaluate on")
    models = {}
    for name, state in (("fedavg", result.fedavg), ("global", result.state)):
        models[name] = build_model(settings, spec)
        models[name].load_state_dict(state)
        models[name].to(device).eval()
    grid = PatchGrid.of(models["global"], spec)
    C = spec.num_classes
    local = [MulticlassAccuracy(C, average="micro").to(device) for _ in range(len(result.ensemble.teachers))]
    confusion = {name: MulticlassConfusionMatrix(C).to(device) for name in ("fedavg", "ensemble", "global")}
    said: dict[str, list[Tensor]] = {name: [] for name in confusion}
    for x, y in batches(images, spec, batch_size, device):
        patches = grid.to_patches(x)
        seen = result.ensemble.see(patches).logits
        for metric, logits in zip(local, seen, strict=True):
            metric.update(logits, y)
        said["ensemble"].append(result.ensemble.combine(seen))
        for name, model in models.items():
            said[name].append(forward_images(model, x).logits.float().softmax(-1))
        for name, table in confusion.items():
            table.update(said[name][-1], y)
            said[name][-1] = said[name][-1].cpu()
    labels = torch.from_numpy(images.labels)
    tables = {name: metric.compute().cpu() for name, metric in confusion.items()}
    total = {name: float(table.diagonal().sum() / table.sum()) for name, table in tables.items()}
    return Evaluation(
        local=tuple(float(metric.compute()) for metric in local),
        fedavg=total["fedavg"],
        ensemble=total["ensemble"],
        global_model=total["global"],
        per_class={name: _per_class(table) for name, table in tables.items()},
        confusion=tuple(tuple(int(n) for n in row) for row in tables["global"]),
        num_images=len(images),
        metrics={name: computed(labels, torch.cat(parts)) for name, parts in said.items()},
    )


def batches(
    images: ImageSet, spec: ImageSpec, batch_size: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Normalised images ``(B, ch, S, S)`` and labels ``(B,)``, in order."""
    labels = torch.from_numpy(images.labels)
    for rows in torch.arange(len(images)).split(batch_size):
        yield spec.normalise(images.images(rows)).to(device), labels[rows].to(device)


def _per_class(table: Tensor) -> tuple[float | None, ...]:
    return tuple(
        float(hits / count) if count > 0 else None for hits, count in zip(table.diagonal(), table.sum(1), strict=True)
    )
