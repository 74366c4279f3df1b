"""What a client says about itself and its upload: of any type until it was checked, and refused with the reason."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence

# No honest site holds more images; it keeps sums of counts far inside int64 and float64.
MAX_EXAMPLES = 10**9


class UploadRefused(ValueError):  # noqa: N818 - a verdict on one upload, not an error of the run
    """An upload that will not be used; the message is the reason."""


def natural_key(text: str) -> tuple[tuple[tuple[int, int, str], ...], str]:
    """Sort key under which ``partition-2`` comes before ``partition-10``."""
    parts = re.findall(r"[0-9]+|[^0-9]+", text)
    numbered = tuple((0, int(part), "") if part[0] in "0123456789" else (1, 0, part) for part in parts)
    return numbered, text


def file_stem(client: str) -> str:
    """Turn a name into a file name that no other name gets.

    A name that had to change ends in an underscore and a hash; names that stay have no underscore.
    """
    plain = re.sub(r"[^a-z0-9-]+", "-", client.lower()).strip("-")[:64]
    return plain if plain == client else f"{plain}_{hashlib.sha256(client.encode()).hexdigest()[:16]}"


def check_name(client: object) -> str:
    """Return a client's name: 1 to 128 printable characters."""
    if not isinstance(client, str) or not 1 <= len(client) <= 128 or not client.isprintable():
        raise UploadRefused(f"client name {brief(client)} is not 1 to 128 printable characters")
    return client


def check_count(what: str, value: object, least: int) -> int:
    """Return a believable number of images."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= MAX_EXAMPLES:
        raise UploadRefused(f"{what} {brief(value)} is not an integer between {least} and {MAX_EXAMPLES}")
    return value


def check_number(what: str, value: object, least: float = -math.inf, most: float = math.inf) -> float:
    """Return a finite number within a range."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise UploadRefused(f"{what} {brief(value)} is not a finite number")
    if not least <= value <= most:
        raise UploadRefused(f"{what} {float(value)} is not between {least:g} and {most:g}")
    return float(value)


def check_histogram(histogram: object, num_examples: int, num_classes: int, *, needed: bool) -> tuple[int, ...] | None:
    """Return the counts of all classes, which add up to the number of examples; None if withheld and not needed."""
    if histogram is None:
        if needed:
            raise UploadRefused("has no label histogram, and this run needs one")
        return None
    if not isinstance(histogram, Sequence) or isinstance(histogram, str) or len(histogram) != num_classes:
        raise UploadRefused(f"histogram {brief(histogram)} is not a list of {num_classes} counts")
    counts = tuple(check_count("histogram entry", entry, 0) for entry in histogram)
    if sum(counts) != num_examples:
        raise UploadRefused(f"histogram sums to {sum(counts)}, but num-examples is {num_examples}")
    return counts


def brief(value: object) -> str:
    """Return a value as text that fits into a line of the log, whatever a client sent."""
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."
