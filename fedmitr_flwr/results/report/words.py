"""Numbers of a run in plain words: the verdict, intervals, what to be careful about."""

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
    """95 % interval of a rate measured on `count` images (Wilson 1927): only for the choice of test images."""
    if count <= 0:
        return 0.0, 1.0
    centre = (rate + _Z**2 / (2 * count)) / (1 + _Z**2 / count)
    half = _Z / (1 + _Z**2 / count) * math.sqrt(rate * (1 - rate) / count + _Z**2 / (4 * count**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def too_close(first: float, second: float, count: int) -> bool:
    """Whether two accuracies on the same number of images differ by less than chance explains (95 %)."""
    spread = math.sqrt((first * (1 - first) + second * (1 - second)) / max(count, 1))
    return abs(first - second) <= _Z * spread


def percent(rate: float | None, digits: int = 1) -> str:
    """``82.2 %``; a dash for what was not measured."""
    return "–" if rate is None else f"{100 * rate:.{digits}f} %"


def duration(seconds: float) -> str:
    """``45 s``, ``5 min 30 s``, ``2 h 05 min``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def quantity(value: float, unit: str = "") -> str:
    """``1.2 T``: three figures and an SI prefix."""
    for factor, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {prefix}{unit}".rstrip()
    return f"{value:.3g} {unit}".rstrip()


def verdict(counts: Mapping[str, int], evaluation: Mapping[str, Any] | None, rounds: int) -> str:
    """Say in a sentence what came out."""
    accepted, asked = counts.get("accepted", 0), counts.get("asked", 0)
    exchange = "one exchange" if rounds == 1 else f"{rounds} exchanges"
    start = f"From {accepted} of {asked} clients in {exchange}"
    if evaluation is None:
        return f"{start}: a global model, not evaluated, because the server held no images (run.evaluate-on = none)."
    rate, count = evaluation["accuracy"], evaluation["num_images"]
    gain = rate["global"] - rate["fedavg"]
    if too_close(rate["global"], rate["fedavg"], count):
        against = f"too close to one-shot FedAvg ({percent(rate['fedavg'])}) to call on so few images"
    else:
        side = "above" if gain > 0 else "below"
        against = f"{abs(100 * gain):.1f} points {side} one-shot FedAvg"
    gap = 100 * (rate["ensemble"] - rate["global"])
    if too_close(rate["global"], rate["ensemble"], count):
        ensemble = f"level with the ensemble of all uploads ({percent(rate['ensemble'])})"
    else:
        ensemble = f"{abs(gap):.1f} points {'below' if gap >= 0 else 'above'} the ensemble of all uploads"
    what = f"{count:,} {evaluation['split']} images"
    return f"{start}: one model that gets {percent(rate['global'])} of {what} right, {against} and {ensemble}."


def cautions(
    counts: Mapping[str, int],
    evaluation: Mapping[str, Any] | None,
    class_names: Sequence[str],
    per_class: Sequence[int],
) -> list[str]:
    """Say what a reader should be careful about, from the outcome itself."""
    found = []
    lost = counts.get("refused", 0) + counts.get("failed", 0)
    if lost:
        found.append(
            f"{lost} of {counts.get('asked', 0)} clients are not in the model: {counts.get('refused', 0)} refused, "
            f"{counts.get('failed', 0)} failed or silent."
        )
    missing = [name for name, number in zip(class_names, per_class, strict=True) if number == 0]
    if missing:
        found.append(
            f"No client knows {listed(missing, 6)}: there are no synthetic images of it, and no model can learn it."
        )
    if evaluation is None:
        return [
            *found,
            "Nothing was measured: choose settings on data that you can check before you rely on this model.",
        ]
    rate, count = evaluation["accuracy"], evaluation["num_images"]
    if rate["global"] < rate["fedavg"] and not too_close(rate["global"], rate["fedavg"], count):
        found.append("The global model is worse than plain averaging: the settings do not suit these data.")
    if rate["ensemble"] < rate["fedavg"]:
        found.append(
            "The ensemble is worse than plain averaging, so distilling from it cannot help: check ensemble.weighting."
        )
    low, high = wilson(rate["global"], count)
    if high - low > 0.1:
        half = 100 * (high - low) / 2
        found.append(f"Only {count} images to measure on: the accuracy is certain to {half:.0f} points either way.")
    never = [
        name
        for name, value in zip(class_names, evaluation["per_class"]["global"], strict=True)
        if value is not None and value == 0.0 and name not in missing
    ]
    if never:
        found.append(f"The global model never recognises {listed(never, 6)}.")
    return found
