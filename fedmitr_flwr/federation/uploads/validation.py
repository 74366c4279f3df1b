"""Checks of the name and numbers that a client reports; the values may have any type before they are checked."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence

# Largest accepted number of images: above any real site, and sums of counts stay exact in int64 and float64.
MAX_EXAMPLES = 10**9


class UploadRefused(ValueError):  # noqa: N818 - it concerns one upload and does not stop the run
    """The upload is not used; the message is the reason."""


def natural_key(text: str) -> tuple[tuple[tuple[int, int, str], ...], str]:
    """Return a sort key that puts ``partition-2`` before ``partition-10``."""
    parts = re.findall(r"[0-9]+|[^0-9]+", text)
    numbered = tuple((0, int(part), "") if part[0] in "0123456789" else (1, 0, part) for part in parts)
    return numbered, text


def file_stem(client: str) -> str:
    """Convert a client name into a file name that is unique to it.

    Names of up to 64 lower-case letters, digits and hyphens stay unchanged. Others are simplified and end in an
    underscore and a hash.
    """
    plain = re.sub(r"[^a-z0-9-]+", "-", client.lower()).strip("-")[:64]
    return plain if plain == client else f"{plain}_{hashlib.sha256(client.encode()).hexdigest()[:16]}"


def check_name(client: object) -> str:
    """Return the client's name if it is 1 to 128 printable characters; refuse it otherwise."""
    if not isinstance(client, str) or not 1 <= len(client) <= 128 or not client.isprintable():
        raise UploadRefused(f"client name {brief(client)} is not 1 to 128 printable characters")
    return client


def check_count(what: str, value: object, least: int) -> int:
    """Return the value if it is an integer from `least` to `MAX_EXAMPLES`; refuse it otherwise."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= MAX_EXAMPLES:
        raise UploadRefused(f"{what} {brief(value)} is not an integer between {least} and {MAX_EXAMPLES}")
    return value


def check_number(what: str, value: object, least: float = -math.inf, most: float = math.inf) -> float:
    """Return the value as float if it is a finite number from `least` to `most`; refuse it otherwise."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise UploadRefused(f"{what} {brief(value)} is not a finite number")
    if not least <= value <= most:
        raise UploadRefused(f"{what} {float(value)} is not between {least:g} and {most:g}")
    return float(value)


def check_histogram(histogram: object, num_examples: int, num_classes: int, *, needed: bool) -> tuple[int, ...] | None:
    """Return the class counts if they sum to the number of examples; None if there are none and none are needed."""
    if histogram is None:
        if needed:
            raise UploadRefused("has no label histogram, which this run needs")
        return None
    if not isinstance(histogram, Sequence) or isinstance(histogram, str) or len(histogram) != num_classes:
        raise UploadRefused(f"histogram {brief(histogram)} is not a list of {num_classes} counts")
    counts = tuple(check_count("histogram entry", entry, 0) for entry in histogram)
    if sum(counts) != num_examples:
        raise UploadRefused(f"histogram sums to {sum(counts)}, but num-examples is {num_examples}")
    return counts


def brief(value: object) -> str:
    """Return a value as text of at most 100 characters, so that it fits on a log line."""
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."
