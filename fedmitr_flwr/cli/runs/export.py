"""The command ``fedmitr export``: write a run's global model as an ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedmitr_flwr.cli.common import FAILED, RunArgument, bad_input, show_error
from fedmitr_flwr.settings.home import expand


def export(
    run: RunArgument,
    onnx: Annotated[Path, typer.Option("--onnx", metavar="FILE", help="File to write, such as model.onnx.")],
) -> None:
    """Write a run's global model as an ONNX file.

    The command runs the exported model in ONNX Runtime and compares its logits with those of PyTorch. For timm no
    export is needed: RUN/model is a timm checkpoint with a model card.

    Exit code: 0 written, 1 a logit of the exported model differs by more than 1e-4, 2 invalid input.
    """
    with bad_input():
        from fedmitr_flwr.results.finished_model import load_run_model
        from fedmitr_flwr.results.finished_run import load_run
        from fedmitr_flwr.results.onnx_export import export_onnx

        file = expand(onnx, "--onnx").absolute()
        try:
            difference = export_onnx(load_run_model(load_run(run)), file)
        except RuntimeError as error:
            show_error(f"fedmitr: {error}")
            raise typer.Exit(FAILED) from None
    typer.echo(f"largest difference of a logit from PyTorch: {difference:.2g}", err=True)
    typer.echo(file)
