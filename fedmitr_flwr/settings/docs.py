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

from fedmitr_flwr.settings import RunConfigValue, Settings, flat_fields, recipes
from fedmitr_flwr.settings.run_config import allowed_values

CONFIG_TABLE = "[tool.flwr.app.config]"
_MARKER = """\
# The demo's settings, written by `make settings` and described in docs/settings.md. A key with the value "recipe" is
# not named: it gets the value of the recipe, or else its default (run.recipe)."""
_INTRO = """\
# Settings

`make settings` writes this page from the fields in `fedmitr_flwr/settings/`; do not edit it by hand.

A run reads its settings from a TOML file of dotted keys, such as the files in `conf/`. Keys that are left out have the
defaults below, or the values of a recipe ([Recipes](#recipes)). The defaults are the settings of `make demo`, except
that the demo distils on fewer images and for fewer steps. A value is an integer, a number, `true` or `false`, or a
string. A list is a string with commas, such as `"50,100,200"`. The same keys can be given in three ways:

    fedmitr simulate conf/cifar10_dir01.toml --set run.seed=7 --set inversion.stops=50,100
    flwr run . --stream --run-config conf/cifar10_dir01.toml
    flwr run . --stream --run-config "run.seed=7 inversion.stops='50,100'"

`flwr run` accepts either one file or `key=value` pairs; `fedmitr simulate` accepts both together. A run fails before
any client starts if a key is unknown, a value has the wrong type or is out of range, or settings contradict each other.

## Recipes

Good values differ between a small model that is trained from scratch and a pretrained one. A recipe is a set of values
for keys that are not named. With `run.recipe = "auto"`, the default, it follows the model:

| recipe | used for `model.init` | what it sets |
|---|---|---|
| `scratch` | `glyphs`, `seeded` | nothing: the defaults below apply |
| `pretrained` | `pretrained`, `file:PATH` | @KEYS@ |

- A key that is named in any way (settings file, `--set`, `--run-config`, `Settings.from_run_config`) keeps its value,
  even if the value equals the default. `--set run.recipe=scratch` turns the recipe off for all keys.
- The tables below give the recipe's value after the default, as in `1`; `pretrained`: `5`.
- The log names the recipe, the reason for it and how many keys it sets. `fedmitr settings CONF` lists the value of each
  key and where it comes from: the default, the recipe, the file or the command line. `config.json` of a run contains
  all values; the clients get these values, and a resumed run keeps them.
- Each key of a recipe also accepts the value `"recipe"`, which means that it is not named. `pyproject.toml` contains
  these keys with this value, because Flower does not tell an app which keys a user has named.
- Data and model are not part of a recipe. In particular, set `data.mean` and `data.std` to the normalisation of the
  pretrained weights.
"""


@dataclass(frozen=True)
class Entry:
    """One key of the run-config with the texts that describe it.

    Attributes
    ----------
    key, default, value
        The key, its default and its value in the settings that are shown.
    origin
        Where the value comes from: ``default``, ``recipe NAME``, a file or an option.
    recipes
        Values of the recipes that set the key, by name.
    allowed, description
        The allowed values, and what the key does.
    """

    key: str
    default: RunConfigValue
    value: RunConfigValue
    origin: str
    recipes: dict[str, RunConfigValue]
    allowed: str
    description: str

    @property
    def stage(self) -> str:
        """Name of the stage: the part of the key before the dot."""
        return self.key.split(".", 1)[0]


def entries(settings: Settings | None = None, origins: Mapping[str, str] | None = None) -> list[Entry]:
    """Return an entry for every key of the run-config in order.

    Parameters
    ----------
    settings
        Settings to show. None: the defaults.
    origins
        Where the value of each key comes from. None: from the default.
    """
    defaults = Settings().flat()
    values = defaults if settings is None else settings.flat()
    return [
        Entry(
            key=key,
            default=defaults[key],
            value=values[key],
            origin=(origins or {}).get(key, "default"),
            recipes={name: recipe[key] for name, recipe in recipes.RECIPES.items() if key in recipe},
            allowed=allowed_values(field),
            description=field.description or "",
        )
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
    keys = ", ".join(f"`{key}`" for key in flat_fields() if key in recipes.PRETRAINED)
    parts = [_INTRO.replace("@KEYS@", keys)]
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
    values = [f"`{toml_value(entry.default)}`"]
    values += [f"`{name}`: `{toml_value(value)}`" for name, value in entry.recipes.items() if value != entry.default]
    return f"\n| `{entry.key}` | {'; '.join(values)} | {allowed} | {description} |"


def to_table(settings: Settings | None = None, width: int = 100, origins: Mapping[str, str] | None = None) -> str:
    """Return all settings as plain text for a terminal.

    Parameters
    ----------
    settings
        Settings to show. A value that differs from its default is shown with the default. None: the defaults.
    width
        Width of the terminal in columns; descriptions are wrapped to it.
    origins
        Where the value of each key comes from; shown if given. Without `settings`, the values of the recipes are shown.
    """
    lines: list[str] = []
    for entry in entries(settings, origins):
        notes = [entry.allowed]
        if entry.value != entry.default:
            notes.append(f"default {toml_value(entry.default)}")
        if origins is not None:
            notes.append(f"from {entry.origin}" if entry.origin != "default" else "the default")
        if settings is None:
            notes += [f"recipe {name} {toml_value(value)}" for name, value in entry.recipes.items()]
        lines.append(f"{entry.key} = {toml_value(entry.value)}    [{'; '.join(notes)}]")
        lines += textwrap.wrap(entry.description, max(width, 40), initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines) + "\n"


def to_toml(config: Mapping[str, RunConfigValue] | None = None, origins: Mapping[str, str] | None = None) -> str:
    """Return a flat run-config as TOML for ``flwr run --run-config FILE``.

    Parameters
    ----------
    config
        The run-config. None: the defaults, with the keys of recipes not named.
    origins
        Where the value of each key comes from, for a comment beside each value that is not a default.
    """
    config = Settings().run_config() if config is None else config
    lines = []
    for key, value in config.items():
        origin = " ".join((origins or {}).get(key, "default").split())
        comment = "" if origin == "default" else f"  # {origin}"
        lines.append(f"{key} = {toml_value(value)}{comment}\n")
    return "".join(lines)


def to_json(settings: Settings | None = None, origins: Mapping[str, str] | None = None) -> str:
    """Return all settings as JSON: a list of objects with the attributes of `Entry`."""
    return json.dumps([vars(entry) for entry in entries(settings, origins)], indent=2) + "\n"


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
