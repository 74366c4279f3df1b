"""Render the settings as a Markdown page, a table for the terminal, TOML and JSON.

``python -m fedmitr_flwr.settings.docs`` writes ``docs/settings.md`` and the ``[tool.flwr.app.config]`` table of
``pyproject.toml`` from the fields in `fedmitr_flwr.settings`. A test compares both files with the fields.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

from fedmitr_flwr.settings import RunConfigValue, Settings, flat_fields
from fedmitr_flwr.settings.run_config import allowed_values

CONFIG_TABLE = "[tool.flwr.app.config]"
_MARKER = "# The demo's settings, written by `make settings` and described in docs/settings.md."
_INTRO = """\
# Settings

`make settings` writes this page from the fields in `fedmitr_flwr/settings/`; do not edit it by hand.

A run reads its settings from a TOML file of dotted keys, such as the files in `conf/`. Keys that are left out have the
defaults below. These are the settings of `make demo`, except that the demo distils on fewer images and for fewer
steps. A value is an integer, a number, `true` or `false`, or a string. A list is a string with commas, such as
`"50,100,200"`. The same keys can be given in three ways:

    fedmitr simulate conf/cifar10_dir01.toml --set run.seed=7 --set inversion.stops=50,100
    flwr run . --stream --run-config conf/cifar10_dir01.toml
    flwr run . --stream --run-config "run.seed=7 inversion.stops='50,100'"

`flwr run` accepts either one file or `key=value` pairs; `fedmitr simulate` accepts both together. A run fails before
any client starts if a key is unknown, a value has the wrong type or is out of range, or settings contradict each other.
"""


@dataclass(frozen=True)
class Entry:
    """One key of the run-config with the texts that describe it."""

    key: str
    default: RunConfigValue
    value: RunConfigValue
    allowed: str
    description: str

    @property
    def stage(self) -> str:
        """Name of the stage: the part of the key before the dot."""
        return self.key.split(".", 1)[0]


def entries(settings: Settings | None = None) -> list[Entry]:
    """Return an entry for every key of the run-config in order; without `settings`, values are the defaults."""
    defaults = Settings().flat()
    values = defaults if settings is None else settings.flat()
    return [
        Entry(key, defaults[key], values[key], allowed_values(field), field.description or "")
        for key, field in flat_fields().items()
    ]


def takes_text(key: str) -> bool:
    """Return whether the values of a key are strings in the run-config: text, a choice or a list of numbers."""
    kind = flat_fields()[key].annotation
    if get_origin(kind) is tuple:
        return True
    return kind is str or any(isinstance(choice, str) for choice in get_args(kind))


def to_markdown() -> str:
    """Return the text of ``docs/settings.md``, with a table of keys and defaults for each stage."""
    parts = [_INTRO]
    for stage, field in Settings.model_fields.items():
        purpose = (getattr(field.annotation, "__doc__", None) or "").strip().splitlines()[0]
        parts.append(f"## {stage}\n\n{purpose}\n\n| key | default | allowed | what it does |\n|---|---|---|---|")
        parts[-1] += "".join(_markdown_row(entry) for entry in entries() if entry.stage == stage) + "\n"
    return "\n".join(parts)


def _markdown_row(entry: Entry) -> str:
    allowed = entry.allowed.replace("|", "\\|")
    if "matching " in allowed:
        words, pattern = allowed.split("matching ", 1)
        allowed = f"{words}matching `{pattern}`"
    description = entry.description.replace("|", "\\|")
    return f"\n| `{entry.key}` | `{toml_value(entry.default)}` | {allowed} | {description} |"


def to_table(settings: Settings | None = None, width: int = 100) -> str:
    """Return all settings as plain text for a terminal.

    Parameters
    ----------
    settings
        Settings to show. A value that differs from its default is shown with the default. None: the defaults.
    width
        Width of the terminal in columns; descriptions are wrapped to it.
    """
    lines: list[str] = []
    for entry in entries(settings):
        changed = "" if entry.value == entry.default else f"; default {toml_value(entry.default)}"
        lines.append(f"{entry.key} = {toml_value(entry.value)}    [{entry.allowed}{changed}]")
        lines += textwrap.wrap(entry.description, max(width, 40), initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines) + "\n"


def to_toml(config: Mapping[str, RunConfigValue] | None = None) -> str:
    """Return a flat run-config as TOML for ``flwr run --run-config FILE``; None: the defaults."""
    config = Settings().flat() if config is None else config
    return "".join(f"{key} = {toml_value(value)}\n" for key, value in config.items())


def to_json(settings: Settings | None = None) -> str:
    """Return all settings as JSON: a list of objects with key, default, value, allowed and description."""
    return json.dumps([vars(entry) for entry in entries(settings)], indent=2) + "\n"


def toml_value(value: RunConfigValue) -> str:
    """Return one value in TOML."""
    if isinstance(value, bool):
        return str(value).lower()
    # TOML accepts JSON's escapes in strings if characters beyond ASCII are not escaped.
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def pyproject_block() -> str:
    """Return the table in which ``pyproject.toml`` declares the keys and their defaults to Flower."""
    return f"{CONFIG_TABLE}\n{_MARKER}\n{to_toml()}"


def with_config(pyproject: str) -> str:
    """Return the text of a ``pyproject.toml`` with its run-config table replaced, or added if it has none."""
    block = pyproject_block()
    found = re.search(rf"^{re.escape(CONFIG_TABLE)}\n.*?(?=^\[|\Z)", pyproject, flags=re.M | re.S)
    if found:
        return pyproject[: found.start()] + block + "\n" + pyproject[found.end() :]
    end = re.search(r"^\[tool\.flwr\.app\.components\]\n.*?(?=^\[|\Z)", pyproject, flags=re.M | re.S)
    at = end.end() if end else len(pyproject)
    return pyproject[:at] + block + "\n" + pyproject[at:]


def flatten(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield the dotted keys and values of nested TOML tables, as Flower flattens them."""
    for name, value in table.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def write(root: Path) -> list[Path]:
    """Update the settings page and ``pyproject.toml`` of a checkout, and return the files that changed."""
    pyproject, page = root / "pyproject.toml", root / "docs" / "settings.md"
    wanted = {pyproject: with_config(pyproject.read_text("utf-8")), page: to_markdown()}
    changed = [path for path, text in wanted.items() if not path.is_file() or path.read_text("utf-8") != text]
    for path in changed:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(wanted[path], "utf-8")
    return changed


if __name__ == "__main__":
    write(Path(__file__).resolve().parents[2])
