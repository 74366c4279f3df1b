"""The command ``fedmitr settings``: list all settings, or check a settings file."""

from __future__ import annotations

import shutil
from enum import StrEnum
from typing import Annotated

import typer

from fedmitr_flwr.cli.common import AppOption, ConfArgument, SetOption, bad_input
from fedmitr_flwr.launch import settings_files
from fedmitr_flwr.settings import Settings, docs


class Format(StrEnum):
    """Output format of ``fedmitr settings``."""

    TABLE = "table"
    TOML = "toml"
    JSON = "json"


def settings(
    conf: ConfArgument = None,
    overrides: SetOption = None,
    app_dir: AppOption = None,
    style: Annotated[Format, typer.Option("--format", "-f", help="Output format.")] = Format.TABLE,
) -> None:
    """List all settings, or check a settings file.

    For each setting the list has the key, the value, the allowed values and a description. With CONF or --set the
    command checks these settings as a run does and prints the values that a run would have, and where each comes
    from: the default, the recipe, the file or the command line. It names unknown keys, which `flwr run` does not.

    Exit code: 0 printed, 2 invalid input.
    """
    checked, origins, about = None, None, ""
    if conf is not None or overrides:
        with bad_input():
            directory = settings_files.app_directory(app_dir)
            checked, origins = settings_files.given_settings(directory, conf, overrides or [], absolute=False)
            _check_trained_part(checked)
            about = f"{checked.applied_recipe()}\n"
    if style is Format.TABLE:
        text = about + docs.to_table(checked, shutil.get_terminal_size((100, 24)).columns, origins)
    elif style is Format.JSON:
        text = docs.to_json(checked, origins)
    elif checked is None:
        text = docs.to_toml()
    else:
        text = f"# {about}# This file names all keys, so a recipe has no effect on it.\n"
        text += docs.to_toml(checked.flat(), origins)
    typer.echo(text, nl=False)


def _check_trained_part(checked: Settings) -> None:
    """Check `train.trainable` against the blocks of the model."""
    if checked.train.trainable == "all":
        return
    # These imports take seconds, and most settings do not need them.
    from fedmitr_flwr.models.build import outline
    from fedmitr_flwr.models.trainable import trained_part

    model = outline(checked.model)
    if model is not None:
        trained_part(checked.train, model.state_dict())
