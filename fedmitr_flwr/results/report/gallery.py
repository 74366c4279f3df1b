"""Synthetic images in the report: by class, with overlays, and at each stop of inversion."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fedmitr_flwr.results.finished_run import FinishedRun
from fedmitr_flwr.results.report.images import density_overlay, picture, stopped_overlay

_EVOLVING_CLASSES = 6


def gallery_of(run: FinishedRun, class_names: Sequence[str]) -> dict[str, object] | None:
    """Return rows of pictures as data URIs; None if the run has no synthetic images."""
    shots, image = run.pictures, run.report.get("image")
    if not image or "images" not in shots:
        return None
    rows, columns = image["grid"]
    grid = (int(rows), int(columns))
    labels = shots["labels"].tolist()
    by_class: dict[int, list[dict[str, str]]] = {}
    for number, label in enumerate(labels):
        cell = {"uri": picture(shots["images"][number]), "stopped": stopped_overlay(shots["kept"][number], grid)}
        if "density" in shots:
            cell["density"] = density_overlay(shots["density"][number], grid)
        by_class.setdefault(label, []).append(cell)
    synthetic = run.report.get("synthetic", {})
    return {
        "count": f"{synthetic.get('count', len(labels)):,}",
        "kept": f"{100 * synthetic.get('kept_fraction', 1.0):.0f} %",
        "density": "density" in shots,
        "rows": [{"name": class_names[label], "images": cells} for label, cells in sorted(by_class.items())],
        "evolution": _evolution(shots, grid, class_names),
    }


def _evolution(shots: dict[str, Tensor], grid: tuple[int, int], class_names: Sequence[str]) -> list[dict[str, object]]:
    """Return the first image of each class at each stop and at the end."""
    stops = sorted(name.split(".")[1] for name in shots if name.startswith("stop.") and name.endswith(".images"))
    if not stops:
        return []
    labels = shots["labels"].tolist()
    known = sorted(set(labels))  # the labels of the first images are the classes in this order
    out = []
    for place, label in enumerate(known[: min(_EVOLVING_CLASSES, len(shots[f"stop.{stops[0]}.images"]))]):
        steps = [
            {
                "uri": picture(shots[f"stop.{stop}.images"][place]),
                "stopped": stopped_overlay(shots[f"stop.{stop}.kept"][place], grid),
                "caption": f"iteration {int(stop)}",
            }
            for stop in stops
        ]
        last = labels.index(label)
        steps.append({"uri": picture(shots["images"][last]), "stopped": "", "caption": "finished"})
        out.append({"name": class_names[label], "steps": steps})
    return out
