"""Flower's flat run-config: how values are parsed, and how problems with them are put into words.

Flower hands an app a flat mapping of dotted kebab-case keys to int, float, bool or str
(``{"inversion.iterations": 200}``); lists are written as comma-separated strings.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

RunConfigValue = bool | int | float | str


class SettingsError(ValueError):
    """One or more run-config keys have values that cannot work.

    The message has one line for each problem: the key, the value and what is allowed.
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
    """Parse ``"50, 100"`` or ``"[50, 100]"`` into ``(50, 100)``; a single number is a list of one."""
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
    """Spell a field name as a run-config key."""
    return name.replace("_", "-")


class Stage(BaseModel):
    """Base of every stage's settings: frozen, strictly typed, kebab-case keys, no unknown keys."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        alias_generator=kebab,
        populate_by_name=True,
        allow_inf_nan=False,
    )


def allowed_values(field: FieldInfo) -> str:
    """Say in words which values a field takes, for error messages and the settings table."""
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
            bounds.append("not empty")
    return " ".join([words[kind], " and ".join(bounds)]).strip() if isinstance(kind, type) else str(kind)


def unknown_hint(key: str, known: Mapping[str, Any]) -> str:
    """Say that a key is unknown, and which one may have been meant."""
    close = get_close_matches(key, known, n=1, cutoff=0.6)
    return "unknown key; " + (f"did you mean {close[0]}?" if close else "see docs/settings.md for all keys")


def problems_of(error: ValidationError, known: Mapping[str, FieldInfo]) -> list[tuple[str, object, str]]:
    """Translate pydantic's errors into key, value and what is allowed."""
    problems: list[tuple[str, object, str]] = []
    for item in error.errors():
        cause = item.get("ctx", {}).get("error")
        if isinstance(cause, SettingsError):
            problems.extend(cause.problems)
            continue
        key = ".".join(kebab(str(part)) for part in item["loc"][:2])
        problems.append((key, item["input"], f"must be {allowed_values(known[key])}"))
    return problems
