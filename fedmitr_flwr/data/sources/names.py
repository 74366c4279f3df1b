"""Names of folders and classes: which names are the same class, and which name a split."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from fedmitr_flwr.data.sources.raw import TEST, TRAIN, VALIDATION

# Characters that no font shows: soft hyphen, zero-width space, word joiner, byte order mark, marks and controls of the
# writing direction, and the selectors between text and emoji. The zero-width joiners are not among them: they change
# the glyph in several scripts.
_INVISIBLE = dict.fromkeys([0xAD, 0x200B, 0x2060, 0xFEFF, 0x200E, 0x200F, 0xFE0E, 0xFE0F])
_INVISIBLE.update(dict.fromkeys([*range(0x202A, 0x202F), *range(0x2066, 0x206A)]))

_TRAIN, _TEST, _EVAL, _VALID = "train", "test", "eval", "valid"
_WORDS = {
    **dict.fromkeys(("train", "training", "trn", "trainval", "entrenamiento", "entrainement", "apprentissage"), _TRAIN),
    **dict.fromkeys(("addestramento", "treino", "treinamento", "trainings", "训练", "訓練", "学習"), _TRAIN),
    **dict.fromkeys(
        ("test", "testing", "tst", "holdout", "prueba", "pruebas", "teste", "测试", "測試", "テスト"), _TEST
    ),
    **dict.fromkeys(("eval", "evaluation", "evaluate"), _EVAL),
    **dict.fromkeys(("val", "valid", "validation", "validate", "dev", "devel", "development"), _VALID),
    **dict.fromkeys(("validacion", "validacao", "validazione", "validierung", "验证", "驗證", "検証"), _VALID),
}
_FILLERS = (
    *("dataset", "daten", "data", "subset", "set", "split", "folder", "files", "dir"),
    *("images", "image", "imgs", "img", "pictures", "photos", "samples", "sample", "集"),
)
# Words that number parts of a data set, as in "fold1".
_PARTS = ("batch", "chunk", "client", "cv", "fold", "node", "part", "set", "shard", "site", "split", "subset")
# Of several folders with one role, the first of these is the split, as in earlier versions.
_USUAL = ("train", "test", "val", "valid", "validation")


def same_name(name: str) -> str:
    """Return a name in composed form (NFC) with single blanks and none at its ends.

    This is the name of a class in the settings, in the model and in all messages.
    """
    return " ".join(unicodedata.normalize("NFC", name).split())


def name_key(name: str) -> str:
    """Return what is compared to decide whether two names are the same class: `same_name` without invisible characters.

    Upper and lower case are different names, because "a" and "A" may be classes of letters.
    """
    return same_name(name.translate(_INVISIBLE))


def alike(names: Iterable[str]) -> tuple[str, str] | None:
    """Return the first two different names that are the same class by `name_key`, or None."""
    seen: dict[str, str] = {}
    for name in names:
        if name_key(name) in seen:
            return seen[name_key(name)], name
        seen[name_key(name)] = name
    return None


def almost(name: str, names: Iterable[str]) -> str:
    """Return a clause that names the class that differs from `name` only in case or in its form in Unicode, or ""."""
    near = [other for other in names if other != name and _folded(other) == _folded(name)]
    if not near:
        return ""
    case = name_key(name).lower() == name_key(near[0]).lower()
    return f"; {spelt(name)} differs from {spelt(near[0])} only in " + (
        "upper and lower case" if case else "the form of its characters in Unicode"
    )


def spelt(name: str) -> str:
    """Return a name in quotes; a name with other characters than ASCII also with their numbers in Unicode."""
    return repr(name) if name.isascii() else f"{name!r} ({ascii(name)[1:-1]})"


def shown(path: Path | str) -> str:
    r"""Return a path as printable text; bytes that are not UTF-8 are written as ``\xe9``."""
    text = str(path).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


def unusable(name: str) -> str:
    """Return why a folder's name cannot be the name of a class, or ""."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return "its name is not valid UTF-8"
    if not name_key(name):
        return "its name has no visible character"
    if any(unicodedata.category(character) == "Cc" and not character.isspace() for character in name):
        return "its name has control characters"
    return ""


class SplitNamesError(ValueError):
    """The names of the folders cannot be told apart as splits or classes; the message says which and why."""


def split_folders(names: Sequence[str]) -> dict[int, str]:
    """Find the folders that are splits: one for training, and one or two others with the same rest of the name.

    A name is divided at digits, capitals and signs. It names a split if one of its words does, such as "training" in
    "Training_Set" or "train" in "seg_train". Numbers and words such as "set" and "images" are not part of the rest.

    Parameters
    ----------
    names
        Names of all folders in one place.

    Returns
    -------
    dict
        Name of the folder of TRAIN, TEST and VALIDATION; empty if the folders are classes. Of the folders for testing,
        evaluation and validation, the first in this order is TEST and the second is VALIDATION.

    Raises
    ------
    SplitNamesError
        If two folders have the same role, if several groups of folders look like splits, or if the names look like
        splits but none is for training.
    """
    groups: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in names:
        role, rest = _role(name)
        if role:
            groups[rest][role].append(name)
    complete = [rest for rest, roles in groups.items() if _TRAIN in roles and len(roles) > 1]
    if len(complete) > 1 and "" not in complete:
        listed = ", ".join(repr(name) for rest in complete for found in groups[rest].values() for name in found)
        raise SplitNamesError(f"the folders {listed} look like splits of single classes; put them in train/CLASS")
    if complete:
        roles = groups["" if "" in complete else complete[0]]
        order = [_TRAIN, *(role for role in (_TEST, _EVAL, _VALID) if role in roles)]
        return dict(zip((TRAIN, TEST, VALIDATION), (_only(roles[role]) for role in order), strict=False))
    for roles in groups.values():
        if len(roles) > 1:
            listed = ", ".join(repr(name) for found in roles.values() for name in found)
            raise SplitNamesError(f"the folders {listed} look like splits, but there is no folder for training")
    return {}


def is_training(name: str) -> bool:
    """Return whether a name is that of a folder with training images and nothing else."""
    return _role(name) == (_TRAIN, "")


def same_split(name: str, other: str) -> bool:
    """Return whether two names name the same split, such as "seg_train" and "train"."""
    return _role(name)[0] == _role(other)[0] != ""


def held_out_only(name: str) -> bool:
    """Return whether a name is that of a split for testing or validation, as "test" and "Validation" are.

    "valid" alone is not: it may be the class beside "invalid".
    """
    role, rest = _role(name)
    return role not in ("", _TRAIN) and not rest and name.casefold() != "valid"


def says_split(name: str) -> bool:
    """Return whether a name is that of a split or of a column of splits, as "x_test", "is_train" and "Split" are."""
    return _role(name)[0] != "" or name.casefold() in ("split", "splits", "subset", "phase")


def is_held_out(name: str) -> bool:
    """Return whether a word of a name names a split for testing or validation, as in "seg_test-00000" and "HOLDOUT"."""
    return _role(name)[0] not in ("", _TRAIN)


def are_parts(names: Iterable[str]) -> bool:
    """Return whether names number the parts of a data set, as "fold1" and "fold2" do."""
    words = {re.sub(r"[\W\d_]+", "", name.casefold()) for name in names}
    return len(words) == 1 and words <= set(_PARTS)


def _only(names: list[str]) -> str:
    usual = [name for name in _USUAL if name in names]
    if not usual and len(names) > 1:
        raise SplitNamesError(f"the folders {', '.join(map(repr, names))} look like one split; keep one of them")
    return usual[0] if usual else names[0]


def _role(name: str) -> tuple[str, str]:
    """Return the role of a name and the rest of it; the role is empty if not exactly one word names a split."""
    joined = re.sub(r"h[eo]ld[\W_]?out", "holdout", same_name(name), flags=re.IGNORECASE)
    joined = re.sub(r"train[\W_]?val(?![a-z])", "trainval", joined, flags=re.IGNORECASE)
    roles, rest = [], []
    for chunk in re.findall(r"[^\W\d_]+", joined):
        for word in [chunk] if _word_role(chunk) else re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[^A-Z]+", chunk):
            if _word_role(word):
                roles.append(_word_role(word))
            elif word.casefold() not in _FILLERS:
                rest.append(word.casefold())
    return (roles[0], " ".join(rest)) if len(roles) == 1 else ("", "")


def _word_role(word: str) -> str:
    plain = (letter for letter in unicodedata.normalize("NFD", word.casefold()) if unicodedata.category(letter) != "Mn")
    word = unicodedata.normalize("NFC", "".join(plain))
    stems = [word, *(word.removesuffix(end) for end in _FILLERS)]
    return next((_WORDS[stem] for stem in stems if stem in _WORDS), "")


def _folded(name: str) -> str:
    return same_name(unicodedata.normalize("NFKC", name.translate(_INVISIBLE)).casefold())


def positions(names: Sequence[str], among: Sequence[str]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Return the position of each name in another list, ``(len(names),)`` int64; -1 for a name that is not there."""
    place = {name_key(name): position for position, name in enumerate(among)}
    return np.array([place.get(name_key(name), -1) for name in names], np.int64)
