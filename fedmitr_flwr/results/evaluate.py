"""Measure the accuracy of the local models, one-shot FedAvg, the ensemble and the global model on held-out images.

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
from fedmitr_flwr.models.vit import forward_images, forward_tokens
from fedmitr_flwr.pipeline.inputs import PipelineResult
from fedmitr_flwr.results.metrics import MODELS, computed
from fedmitr_flwr.settings import ModelSettings


@dataclass(frozen=True)
class Evaluation:
    """Accuracies in 0..1 on one image set.

    Attributes
    ----------
    local
        Accuracy of each of the K local models.
    fedavg, ensemble, global_model
        Accuracy of one-shot FedAvg, of the weighted ensemble and of the distilled global model.
    per_class
        C accuracies for each of ``fedavg``, ``ensemble`` and ``global``; None for a class without images.
    confusion
        ``C x C`` numbers of images by true class (row) and class predicted by the global model (column).
    num_images
        Number of images in the set.
    metrics
        Values of the metrics in `metrics.METRICS` by name, for each of ``fedavg``, ``ensemble`` and ``global``.
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
        """Return the mean accuracy of the local models."""
        return sum(self.local) / len(self.local)

    def accuracy(self) -> dict[str, float]:
        """Return the four accuracies by their names in ``metrics.json``."""
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
    """Evaluate all models of a run.

    Blocks that no client trained run once for the local models, the ensemble, and those of FedAvg's model and the
    global model that have them too.

    Parameters
    ----------
    result
        Result of the pipeline.
    images
        At least one image. No client trained on these images.
    spec, settings
        Image specification and model settings of the run.
    device
        Device of the evaluation.
    batch_size
        Number of images in one forward pass.

    Raises
    ------
    ValueError
        If there are no images.
    """
    # This import loads SciPy and matplotlib (100 MB), which the server does not need while it collects uploads.
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
    ensemble = result.ensemble
    sharing = {name for name, model in models.items() if ensemble.has_trunk_of(model)}
    for x, y in batches(images, spec, batch_size, device):
        seen = ensemble.see(grid.to_patches(x), tokens=bool(sharing))
        for metric, logits in zip(local, seen.logits[: len(local)], strict=True):
            metric.update(logits, y)
        said["ensemble"].append(ensemble.combine(seen.logits))
        for name, model in models.items():
            if seen.tokens is not None and name in sharing:
                out = forward_tokens(model, seen.tokens, ensemble.shared_blocks)
            else:
                out = forward_images(model, x)
            said[name].append(out.logits.float().softmax(-1))
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
    """Yield normalised images ``(B, ch, S, S)`` and labels ``(B,)`` in the order of the set."""
    labels = torch.from_numpy(images.labels)
    for rows in torch.arange(len(images)).split(batch_size):
        yield spec.normalise(images.images(rows)).to(device), labels[rows].to(device)


def _per_class(table: Tensor) -> tuple[float | None, ...]:
    return tuple(
        float(hits / count) if count > 0 else None for hits, count in zip(table.diagonal(), table.sum(1), strict=True)
    )
