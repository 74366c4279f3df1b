"""The command ``fedmitr predict``: classify images with a run's global model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fedmitr_flwr.cli.common import JsonOption, RunArgument, bad_input
from fedmitr_flwr.settings.home import expand


def predict(
    run: RunArgument,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files (PNG, JPEG, ...).")],
    count: Annotated[int, typer.Option("--top", "-k", min=1, help="Number of classes to print for each image.")] = 3,
    as_json: JsonOption = False,
) -> None:
    """Classify images with a run's global model.

    The command prints the most probable classes of each image with their probabilities. An image is turned
    as its EXIF data says, cropped to its central square and resized to the model's input size.

    Exit code: 0 classified, 2 invalid input and nothing classified.
    """
    with bad_input():
        from fedmitr_flwr.data.sources.names import shown
        from fedmitr_flwr.results.finished_model import load_run_model, read_images, top
        from fedmitr_flwr.results.finished_run import load_run
        from fedmitr_flwr.runs.log import console_log

        model = load_run_model(load_run(run))
        with console_log():
            pixels = read_images([expand(path, "IMAGE") for path in images], model.spec)
    names = model.spec.class_names
    found = [
        top(row, names, len(names) if as_json else count)
        for part in pixels.split(64)
        for row in model.probabilities(part)
    ]
    if as_json:
        answer = [
            {"image": str(path), "classes": [{"name": name, "probability": round(rate, 6)} for name, rate in ranks]}
            for path, ranks in zip(images, found, strict=True)
        ]
        typer.echo(json.dumps(answer, indent=2))
        return
    for path, ranks in zip(images, found, strict=True):
        typer.echo(f"{shown(path)}: " + ", ".join(f"{name} {100 * rate:.1f} %" for name, rate in ranks))
