"""Write the files from which a report is rendered: ``report.json`` with numbers, ``report.safetensors`` with pictures.

A report is rendered from the files of a run alone (`finished_run.py`). A later version can therefore render it again.
Letters: B images, K teachers, C classes, P patches.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F

from fedmitr_flwr.data import ImageSpec
from fedmitr_flwr.models.patch_grid import PatchGrid
from fedmitr_flwr.pipeline.inputs import PipelineResult
from fedmitr_flwr.pipeline.methods import method_of
from fedmitr_flwr.results.evaluate import Evaluation
from fedmitr_flwr.results.finished_run import FORMAT
from fedmitr_flwr.results.flops import stage_flops
from fedmitr_flwr.runs.atomic import Json, atomic_path, write_json
from fedmitr_flwr.runs.directory import REPORT_DATA, REPORT_PICTURES
from fedmitr_flwr.runs.snapshots import Keeper
from fedmitr_flwr.settings import Settings
from fedmitr_flwr.stages.synthetic import SyntheticImages

MOST_PICTURES = 240
PICTURES_OF_A_CLASS = 8
LARGEST_PICTURE = 112  # pixels a side; the page shows no more, and 224 pixels would make the file four times as large


def write_report_data(
    directory: Path,
    settings: Settings,
    spec: ImageSpec,
    result: PipelineResult,
    evaluation: Evaluation | None,
    keeper: Keeper | None,
) -> None:
    """Write both files.

    Parameters
    ----------
    directory
        Directory of the run.
    settings, spec
        Settings and image specification of the run.
    result
        Result of the last round.
    evaluation
        Evaluation of the last round; None for `run.evaluate-on = none`.
    keeper
        Snapshots of the stages; None: the report shows no density maps and no images at the stops.
    """
    shots = keeper.shots if keeper else {}
    grid = PatchGrid.of(result.ensemble.teachers[0], spec)
    density = shots.get("density", [{}])[-1]
    evidence = shots.get("ensemble", [{}])[-1].get("evidence")
    data: dict[str, Json] = {
        "format": FORMAT,
        "server_part": method_of(settings).server_part(settings),
        "class_names": list(spec.class_names),
        "image": {"channels": spec.channels, "size": spec.image_size, "grid": list(grid.shape)},
        "evaluation": _evaluation(evaluation, settings.run.evaluate_on),
        "ensemble": {
            "weights": _rows(result.ensemble.weights),
            "evidence": None if evidence is None else _rows(evidence),
        },
        "flops": dict(_flops(settings, result, grid)),
        "synthetic": _synthetic(result, spec, grid, settings),
        "diagnostics": None if result.diagnostics is None else {**result.diagnostics.as_dict()},
        "warnings": [*result.warnings, *(result.diagnostics.warnings() if result.diagnostics else ())],
    }
    stops = shots.get("stop", [])
    tensors = (
        {} if result.synthetic is None else pictures(result.synthetic, spec, grid, density.get("attention"), stops)
    )
    with atomic_path(directory / REPORT_PICTURES) as temporary:
        temporary.write_bytes(save(tensors))
    write_json(directory / REPORT_DATA, data)


def pictures(
    synthetic: SyntheticImages,
    spec: ImageSpec,
    grid: PatchGrid,
    attention: Tensor | None,
    stops: list[dict[str, Tensor]],
) -> dict[str, Tensor]:
    """Choose the synthetic images that the report shows, and convert them to pixels.

    Parameters
    ----------
    attention
        ``(B, P)`` attention of the ensemble to the finished images; None: not known.
    stops
        Snapshots of the images at the stops.

    Returns
    -------
    dict
        ``images`` ``(b, ch, S, S)`` uint8, S at most 112; ``labels`` ``(b,)``; ``kept`` ``(b, P)`` bool; ``loss``
        ``(b,)``; ``density`` ``(b, P)`` if `attention` is given. For each stop ``stop.ITERATION.images`` and
        ``stop.ITERATION.kept``, with the first image of each class.
    """
    labels = synthetic.labels.cpu()
    known = labels.unique().tolist()
    each = max(1, min(PICTURES_OF_A_CLASS, MOST_PICTURES // len(known)))
    rows = torch.cat([(labels == label).nonzero().squeeze(1)[:each] for label in known[:MOST_PICTURES]])
    out = {
        "images": _pixels(synthetic.images.cpu()[rows], spec),
        "labels": labels[rows],
        "kept": _mask(synthetic.kept.cpu()[rows], grid.num_patches),
        "loss": synthetic.loss.cpu().float()[rows],
    }
    if attention is not None:
        out["density"] = attention.float()[rows]
    for iteration in sorted({int(shot["iteration"]) for shot in stops}):
        parts = sorted((s for s in stops if int(s["iteration"]) == iteration), key=lambda shot: int(shot["row"][0]))
        out[f"stop.{iteration:07d}.images"] = _pixels(torch.cat([part["images"] for part in parts]), spec)
        out[f"stop.{iteration:07d}.kept"] = _mask(torch.cat([part["kept"] for part in parts]), grid.num_patches)
    return {name: value.contiguous() for name, value in out.items()}


def _flops(settings: Settings, result: PipelineResult, grid: PatchGrid) -> dict[str, float]:
    """Return the FLOPs of the method's stages; empty for methods that train a generator, which are not counted."""
    if method_of(settings).generates:
        return {}
    if result.synthetic is None:  # and so no hard images either
        settings = settings.replace(**{"distill.adversarial-rounds": 0})
    ensemble = result.ensemble
    found = stage_flops(settings, ensemble.teachers[0], grid, ensemble.num_models, ensemble.shared_blocks)
    left_out = set() if method_of(settings).distils else {"distill"}
    if result.synthetic is None:
        left_out |= {"invert", "invert_dense", "relabel"}
    return {stage: value for stage, value in found.items() if stage not in left_out}


def _synthetic(result: PipelineResult, spec: ImageSpec, grid: PatchGrid, settings: Settings) -> Mapping[str, Json]:
    if result.synthetic is None or result.split is None:
        return {}
    return {
        "count": len(result.synthetic.labels),
        "per_class": result.synthetic.labels.bincount(minlength=spec.num_classes).tolist(),
        "kept_fraction": result.synthetic.kept.shape[1] / grid.num_patches,
        "high_density": float(result.split.high.float().mean()),
        "stops": [] if method_of(settings).generates else list(settings.inversion.stops),
    }


def _evaluation(evaluation: Evaluation | None, split: str) -> Mapping[str, Json] | None:
    if evaluation is None:
        return None
    return {
        "split": split,
        "num_images": evaluation.num_images,
        "accuracy": evaluation.accuracy(),
        "metrics": {name: dict(values) for name, values in evaluation.metrics.items()},
        "local": evaluation.local,
        "per_class": evaluation.per_class,
        "confusion": evaluation.confusion,
    }


def _rows(values: Tensor) -> list[list[float]]:
    return [[float(f"{value:.5g}") for value in row] for row in values.tolist()]


def _pixels(images: Tensor, spec: ImageSpec) -> Tensor:
    pixels = spec.denormalise(images)
    if pixels.shape[-1] <= LARGEST_PICTURE:
        return pixels
    small = F.interpolate(pixels.float(), (LARGEST_PICTURE, LARGEST_PICTURE), mode="bilinear", antialias=True)
    return small.round().clamp(0, 255).to(torch.uint8)


def _mask(kept: Tensor, patches: int) -> Tensor:
    return torch.zeros(len(kept), patches, dtype=torch.bool).scatter(1, kept.cpu(), True)
