"""Images in one NumPy archive: `npz:PATH`.

Required arrays: `images` ``(N, S, S)`` or ``(N, S, S, ch)``, and `label` ``(N,)``. Optional arrays: `class_names`
``(C,)`` texts, `domain` ``(N,)`` integers or texts, `domain_names` texts, and `test` ``(N,)`` bool. Arrays of objects
are refused, because unpickling them can run code.

Other arrays are not used. They are refused if their name is that of a split, such as `x_test`, or differs from a name
above only in capitals and signs: the images of a split would be in another one.

Pixels are uint8. Other types are converted by the rule of `_as_uint8`. `labels` describes the accepted labels. With
`class_names`, numbers are positions in it.
"""

from __future__ import annotations

import logging
import zipfile
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedmitr_flwr.data.images import ArrayReader, Column
from fedmitr_flwr.data.presets import default_geometry
from fedmitr_flwr.data.sources.labels import LabelColumn, LabelError, read_array
from fedmitr_flwr.data.sources.names import says_split
from fedmitr_flwr.data.sources.raw import TEST, TRAIN, Header, Origin, RawSource
from fedmitr_flwr.settings import SettingsError

log = logging.getLogger("fedmitr.data")

Arrays = dict[str, NDArray[np.generic]]
KNOWN = ("images", "label", "class_names", "domain", "domain_names", "test")
# Exceptions of NumPy and zipfile for damaged or encrypted archives and for impossible headers.
READ_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    OSError,
    ValueError,
    EOFError,
    SyntaxError,
    RuntimeError,
    MemoryError,
    TypeError,
)
# Pairs of numbers: a source whose largest pixel is above the first and at most the second has the second as white.
_INTEGER_WHITES = ((127.0, 255.0), (32767.0, 65535.0))
# Images that are converted to uint8 in one step; limits the memory of the conversion.
_STEP = 1024


def npz_header(path: Path, origin: Origin) -> Header:
    """Read the classes and the image shape without decompressing the images.

    Raises
    ------
    SettingsError
        If the file does not exist, is not an archive, or has invalid arrays.
    """
    shape, dtype, _ = _contents(path, origin)
    return _checked(shape, dtype, _read(path, origin, [name for name in KNOWN if name != "images"]), origin)[0]


def load_npz(path: Path, origin: Origin) -> RawSource:
    """Load an archive into memory.

    Raises
    ------
    SettingsError
        If the file does not exist, is not an archive, or has invalid arrays.
    """
    shape, dtype, others = _contents(path, origin)
    arrays = _read(path, origin, KNOWN)
    header, labels = _checked(shape, dtype, arrays, origin)
    images = _as_uint8(arrays.pop("images"), origin)
    images = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
    test = arrays.get("test", np.zeros(len(images), np.bool_)).astype(np.bool_)
    domain = _domain(arrays, origin)
    return RawSource(
        header,
        ArrayReader(images),
        labels.rows,
        np.where(test, TEST, TRAIN).astype(np.int8),
        {} if domain is None else {"domain": domain},
        (f"the arrays {', '.join(others)}, whose names have no meaning here",) if others else (),
    )


def _contents(path: Path, origin: Origin) -> tuple[tuple[int, ...], np.dtype[np.generic], list[str]]:
    """Return shape and dtype of the images, and the names of the arrays that are not used."""
    if not path.is_file():
        raise origin.error(f"the file {path} does not exist")
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist()]
            if not {"images", "label"} <= set(names):
                missing = " and ".join(f"`{name}`" for name in ("images", "label") if name not in names)
                raise origin.error(
                    f"{path} has no array {missing}; `images` and `label` are required; "
                    f"its arrays are: {', '.join(names) or 'none'}"
                )
            with archive.open("images.npy") as member:
                version = np.lib.format.read_magic(member)
                one = version == (1, 0)
                reader = np.lib.format.read_array_header_1_0 if one else np.lib.format.read_array_header_2_0
                shape, _, dtype = reader(member)
                others = [name for name in names if name not in KNOWN]
                _check_others(others, path, origin)
                return shape, dtype, others
    except SettingsError:
        raise
    except READ_ERRORS as error:
        raise origin.error(f"{path} is not a readable .npz archive: {error}") from None


def _check_others(names: list[str], path: Path, origin: Origin) -> None:
    """Refuse arrays that are not used although they seem to be a split or one of the known arrays."""
    for name in names:
        plain = "".join(letter for letter in name.casefold() if letter.isalnum())
        meant = next((known for known in KNOWN if plain in (known.replace("_", ""), known + "s")), "")
        if meant or says_split(name):
            hint = f"; rename it to `{meant}`" if meant else ""
            raise origin.error(
                f"{path} has the array `{name}`, which would not be used{hint}; all images belong into `images`, and "
                "`test` (booleans, one for each image) marks the test images"
            )


def _read(path: Path, origin: Origin, names: list[str] | tuple[str, ...]) -> Arrays:
    arrays: Arrays = {}
    try:
        with np.load(path, allow_pickle=False) as archive:
            for name in names:
                if name in archive.files:
                    arrays[name] = archive[name]
    except READ_ERRORS as error:
        if "allow_pickle" in str(error):
            raise origin.error(
                f"array `{name}` holds Python objects; arrays of objects are refused, because unpickling can run code; "
                "save numbers, or texts with numpy.array(names, dtype=str)"
            ) from None
        raise origin.error(f"{path} cannot be read: {error}") from None
    # NumPy returns the bytes of a member that is not in its format, such as a pickle.
    foreign = [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]
    if foreign:
        raise origin.error(f"`{foreign[0]}` in {path} is not an array in NumPy's format")
    return arrays


def _checked(
    shape: tuple[int, ...], dtype: np.dtype[np.generic], arrays: Arrays, origin: Origin
) -> tuple[Header, LabelColumn]:
    """Return the header and the labels; check the shape of every array."""
    if dtype.kind not in "biuf" or len(shape) not in (3, 4) or shape[1] != shape[2] or 0 in shape:
        allowed = "array `images` must be uint8 or other numbers, of shape (N, S, S) or (N, S, S, channels)"
        first = len(shape) == 4 and shape[2] == shape[3] and shape[1] != shape[2]
        hint = "; the channels must be the last axis: images.transpose(0, 2, 3, 1)" if first else ""
        raise origin.error(f"{allowed}, but is {dtype} of shape {shape}{hint}")
    for name, kinds in (("domain", "iuUS"), ("test", "b")):
        column = arrays.get(name)
        if column is not None and (column.shape != shape[:1] or column.dtype.kind not in kinds):
            words = {"iuUS": "integers or texts", "b": "booleans"}[kinds]
            allowed = f"array `{name}` must be {words} of shape ({shape[0]},)"
            raise origin.error(f"{allowed}, but is {column.dtype} of shape {column.shape}")
    labels = _labels(arrays, shape[0], origin)
    named = labels.listed or not labels.numbers
    names = tuple(str(value) for value in labels.values)
    geometry = default_geometry(shape[3] if len(shape) == 4 else 1, shape[1])
    return Header(origin, names, named, geometry, labels.listed), labels


def _labels(arrays: Arrays, count: int, origin: Origin) -> LabelColumn:
    array = arrays["label"]
    if array.shape[:1] != (count,):
        allowed = f"array `label` must have one label for each of the {count} images"
        raise origin.error(f"{allowed}, but is {array.dtype} of shape {array.shape}")
    try:
        labels = read_array(array)
        labels.check_complete()
        if "class_names" not in arrays:
            return labels
        names = _texts(arrays, "class_names", origin)
        columns = array.shape[1] if array.ndim == 2 else 1
        if columns not in (1, len(names)):
            raise LabelError(f"has one-hot rows of {columns} entries, but array `class_names` has {len(names)} names")
        return labels.with_names(names)
    except LabelError as error:
        raise origin.error(f"array `label` {error}") from None


def _texts(arrays: Arrays, name: str, origin: Origin) -> tuple[str, ...]:
    """Return the names in an array of texts, bytes or integers; a row or a column counts as a list."""
    array = arrays[name]
    if array.dtype.kind not in "USiu" or array.size == 0 or array.ndim == 0 or array.size != max(array.shape):
        allowed = f"array `{name}` must be a list of texts, such as numpy.array(['cat', 'dog'])"
        raise origin.error(f"{allowed}, but is {array.dtype} of shape {array.shape}")
    texts = []
    for number, value in enumerate(array.ravel().tolist()):
        try:
            text = (value.decode("utf-8") if isinstance(value, bytes) else str(value)).strip()
        except UnicodeDecodeError:
            raise origin.error(f"array `{name}` has bytes that are no UTF-8 text: {value[:20]!r}") from None
        if not text:
            raise origin.error(f"array `{name}` has an empty name at position {number}")
        texts.append(text)
    return tuple(texts)


def _domain(arrays: Arrays, origin: Origin) -> Column | None:
    domain = arrays.get("domain")
    if domain is None:
        return None
    names = _texts(arrays, "domain_names", origin) if "domain_names" in arrays else None
    try:
        column = read_array(domain)
        if names or column.numbers:
            column.check_complete()
        found = column.with_names(names) if names else column
    except LabelError as error:
        raise origin.error(f"array `domain` {error}") from None
    if names is None:
        return np.char.decode(domain.astype(np.bytes_), "utf-8") if domain.dtype.kind == "S" else domain
    return np.asarray(found.values)[found.rows]


def _as_uint8(images: NDArray[np.generic], origin: Origin) -> NDArray[np.uint8]:
    """Convert pixels to uint8 if the largest value of the archive tells which value is white.

    ==================  ====================================  =====
    type                largest value                         white
    ==================  ====================================  =====
    uint8               any                                   255
    bool                any                                   1
    other integers      above 127, at most 255                255
    other integers      above 32767, at most 65535            65535
    floating point      above 0.5, at most 1                  1
    floating point      above 127.5, at most 255              255
    floating point      above 32767, at most 65535            65535
    ==================  ====================================  =====

    Black is 0. Values between are scaled linearly and rounded.

    Raises
    ------
    SettingsError
        For any other largest value, and for values below 0 or not finite.
    """
    if images.dtype == np.uint8:
        if images.max() == 1:
            said = "the largest pixel of array `images` is 1 of 255, so all images are nearly black"
            log.warning("%s = %s: %s", origin.key, origin.value, said)
        return images.astype(np.uint8, copy=False)
    # NaN is carried to minimum and maximum.
    low, high = float(images.min()), float(images.max())
    whites = {"b": ((-1.0, 1.0),), "f": ((0.5, 1.0), (127.5, 255.0), (32767.0, 65535.0))}
    fitting = [white for above, white in whites.get(images.dtype.kind, _INTEGER_WHITES) if above < high <= white]
    if not (low >= 0.0 and fitting):
        raise origin.error(
            f"array `images` is {images.dtype} with values from {low:g} to {high:g}, which do not tell the value of "
            "white; convert the pixels to uint8 (0 is black, 255 is white), all with the same factor"
        )
    out = np.empty(images.shape, np.uint8)
    for first in range(0, len(images), _STEP):
        part = images[first : first + _STEP].astype(np.float64)
        out[first : first + _STEP] = np.rint(part * (255.0 / fitting[0]))
    return out
