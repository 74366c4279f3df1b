"""Sentences and numbers of the report: the verdict, the warnings, confidence intervals and formatted values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fedmitr_flwr.data.classes import listed

_Z = 1.959964  # two-sided 95 %


def sentence_case(name: str) -> str:
    """Return a name with a capital first letter, for labels."""
    return name[:1].upper() + name[1:]


def wilson(rate: float, count: int) -> tuple[float, float]:
    """Return the 95 % confidence interval of a rate measured on `count` images (Wilson 1927), both in 0..1.

    The interval covers the sampling of the images only, not other seeds, partitions or clients.
    """
    if count <= 0:
        return 0.0, 1.0
    centre = (rate + _Z**2 / (2 * count)) / (1 + _Z**2 / count)
    half = _Z / (1 + _Z**2 / count) * math.sqrt(rate * (1 - rate) / count + _Z**2 / (4 * count**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def too_close(first: float, second: float, count: int) -> bool:
    """Return whether two accuracies on `count` images each do not differ significantly (two-sided, 95 %)."""
    spread = math.sqrt((first * (1 - first) + second * (1 - second)) / max(count, 1))
    return abs(first - second) <= _Z * spread


def percent(rate: float | None, digits: int = 1) -> str:
    """Format a rate in 0..1 as ``82.2 %``; None as a dash."""
    return "–" if rate is None else f"{100 * rate:.{digits}f} %"


def duration(seconds: float) -> str:
    """Format a duration as ``4.5 s``, ``45 s``, ``5 min 30 s`` or ``2 h 05 min``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def quantity(value: float, unit: str = "") -> str:
    """Format a value with three significant digits and an SI prefix, as ``1.2 T``."""
    for factor, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {prefix}{unit}".rstrip()
    return f"{value:.3g} {unit}".rstrip()


def verdict(counts: Mapping[str, int], evaluation: Mapping[str, Any] | None, rounds: int) -> str:
    """Return the accuracy of the global model and its comparison with FedAvg and the ensemble, as sentences."""
    accepted, asked = counts.get("accepted", 0), counts.get("asked", 0)
    exchange = "one round" if rounds == 1 else f"{rounds} rounds"
    start = f"From the uploads of {accepted} of {asked} clients in {exchange}, the server made a global model"
    if evaluation is None:
        return f"{start}. Its accuracy is unknown, because the server evaluated nothing (run.evaluate-on = none)."
    rate, images = evaluation["accuracy"], f"{evaluation['num_images']:,} {evaluation['split']} images"
    others = {"fedavg": "one-shot FedAvg", "ensemble": "the ensemble of all uploads"}
    apart, close = [], []
    for key, name in others.items():
        shown, difference = f"{name} ({percent(rate[key])})", 100 * (rate["global"] - rate[key])
        if too_close(rate["global"], rate[key], evaluation["num_images"]):
            close.append(shown)
        else:
            apart.append(f"{abs(difference):.1f} points {'above' if difference > 0 else 'below'} {shown}")
    compared = apart + ([f"not significantly different from {' or '.join(close)}"] if close else [])
    return f"{start} with {percent(rate['global'])} accuracy on {images}. This is {' and '.join(compared)}."


def cautions(
    counts: Mapping[str, int],
    evaluation: Mapping[str, Any] | None,
    class_names: Sequence[str],
    per_class: Sequence[int],
) -> list[str]:
    """Return warnings about the outcome, each as one text.

    Parameters
    ----------
    counts
        Number of clients by outcome.
    evaluation
        ``evaluation`` of ``report.json``; None: nothing was evaluated.
    class_names
        C class names.
    per_class
        Number of synthetic images of each class.
    """
    found = []
    lost = counts.get("refused", 0) + counts.get("failed", 0)
    if lost:
        found.append(
            f"{lost} of {counts.get('asked', 0)} clients did not contribute to the model (uploads refused: "
            f"{counts.get('refused', 0)}; clients that failed or did not answer: {counts.get('failed', 0)})."
        )
    missing = [name for name, number in zip(class_names, per_class, strict=True) if number == 0]
    if missing:
        found.append(
            f"There are no synthetic images of these classes: {listed(missing, 6)}. Either no client has images of "
            "them, or the server made too few synthetic images. The global model cannot learn these classes."
        )
    if evaluation is None:
        return [
            *found,
            "No accuracy was measured. Before you rely on this model, evaluate it on labelled images, and choose the "
            "settings on data for which accuracy can be measured.",
        ]
    rate, count = evaluation["accuracy"], evaluation["num_images"]
    if rate["global"] < rate["fedavg"] and not too_close(rate["global"], rate["fedavg"], count):
        found.append("The global model is less accurate than one-shot FedAvg. The settings do not suit these data.")
    if rate["ensemble"] < rate["fedavg"]:
        found.append(
            "The ensemble is less accurate than one-shot FedAvg, so distillation from it cannot improve on FedAvg. "
            "Check the setting ensemble.weighting."
        )
    low, high = wilson(rate["global"], count)
    if high - low > 0.1:
        half = 100 * (high - low) / 2
        found.append(
            f"The accuracy was measured on only {count} images, so it is uncertain by {half:.0f} percentage points in "
            "either direction (95 % interval)."
        )
    never = [
        name
        for name, value in zip(class_names, evaluation["per_class"]["global"], strict=True)
        if value is not None and value == 0.0 and name not in missing
    ]
    if never:
        found.append(f"The global model classifies no image of these classes correctly: {listed(never, 6)}.")
    return found
