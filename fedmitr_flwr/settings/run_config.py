"""Parse the values of Flower's flat run-config, and describe invalid ones in error messages.

Flower passes an app a flat mapping from dotted kebab-case keys to int, float, bool or str, such as
``{"inversion.iterations": 200}``. Lists are strings with commas.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

RunConfigValue = bool | int | float | str


class SettingsError(ValueError):
    """One or more keys have invalid values; the message has a line for each, with key, value and what is allowed.

    Parameters
    ----------
    *problems
        Tuples of key, value and what is allowed.
    """

    def __init__(self, *problems: tuple[str, object, str]) -> None:
        self.problems = problems
        super().__init__("\n".join(f"{key} = {_shown(value)}: {allowed}" for key, value, allowed in problems))


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        value = ",".join(str(item) for item in value)
    return f'"{value}"' if isinstance(value, str) else str(value)


def _split(value: object) -> object:
    """Parse ``"50, 100"`` or ``"[50, 100]"`` into ``(50, 100)``, and a single number into a tuple of one."""
    if isinstance(value, bool):
        return value
    if isinstance(value, int | float):
        return (value,)
    if not isinstance(value, str):
        return value
    text = value.strip()
    if text.startswith("[") and text.endswith("]"):
        text = text[1:-1]
    items = [item.strip() for item in text.split(",") if item.strip()]
    return tuple(int(item) if item.lstrip("+-").isdigit() else _number(item) for item in items)


def _number(item: str) -> float | str:
    try:
        return float(item)
    except ValueError:
        return item


IntList = Annotated[tuple[int, ...], BeforeValidator(_split)]
FloatList = Annotated[tuple[float, ...], BeforeValidator(_split)]


def kebab(name: str) -> str:
    """Return a field name in kebab case, as in run-config keys."""
    return name.replace("_", "-")


class Stage(BaseModel):
    """Base class of the settings of a stage: frozen, strictly typed, kebab-case keys, no unknown keys."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        alias_generator=kebab,
        populate_by_name=True,
        allow_inf_nan=False,
    )


def allowed_values(field: FieldInfo) -> str:
    """Describe the values that a field accepts, for error messages and the settings table."""
    kind = field.annotation
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(f'"{choice}"' for choice in get_args(kind))
    if get_origin(kind) is tuple:
        item = "integers" if get_args(kind)[0] is int else "numbers"
        return f"{item} separated by commas, as a string"
    words = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}
    bounds = []
    for rule in field.metadata:
        for attribute, sign in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<")):
            if getattr(rule, attribute, None) is not None:
                bounds.append(f"{sign} {getattr(rule, attribute)}")
        if getattr(rule, "pattern", None) is not None:
            bounds.append(f"matching {rule.pattern}")
        if getattr(rule, "min_length", None):
            bounds.append("that is not empty")
    return " ".join([words[kind], " and ".join(bounds)]).strip() if isinstance(kind, type) else str(kind)


def unknown_hint(key: str, known: Mapping[str, Any]) -> str:
    """Return the error text for an unknown key, with the most similar known key if there is one."""
    close = get_close_matches(key, known, n=1, cutoff=0.6)
    return "unknown key; " + (f"did you mean {close[0]}?" if close else "see docs/settings.md for all keys")


def problems_of(error: ValidationError, known: Mapping[str, FieldInfo]) -> list[tuple[str, object, str]]:
    """Translate pydantic's errors into tuples of key, value and what is allowed."""
    problems: list[tuple[str, object, str]] = []
    for item in error.errors():
        cause = item.get("ctx", {}).get("error")
        if isinstance(cause, SettingsError):
            problems.extend(cause.problems)
            continue
        key = ".".join(kebab(str(part)) for part in item["loc"][:2])
        if item["type"] == "string_unicode":
            problems.append((key, item["input"], "must be valid UTF-8; rename the file or folder that it names"))
            continue
        problems.append((key, item["input"], f"must be {allowed_values(known[key])}"))
    return problems
