"""The command ``fedmitr evaluate``: measure a run's global model on labelled images."""

from __future__ import annotations

import json
from enum import StrEnum
from typing import Annotated

import typer

from fedmitr_flwr.cli.common import JsonOption, RunArgument, bad_input


class Split(StrEnum):
    """Parts of a source on which no client of the run trained."""

    TEST = "test"
    VALIDATION = "validation"


def evaluate(
    run: RunArgument,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="SOURCE",
            help="folder:PATH or npz:PATH for its images, or a value of data.source. Default: the run's data.",
        ),
    ] = None,
    split: Annotated[
        Split, typer.Option("--split", help="Part of the source to use; ignored for folder:PATH and npz:PATH.")
    ] = Split.TEST,
    as_json: JsonOption = False,
) -> None:
    """Measure a run's global model on labelled images.

    The class folders of a folder: source are matched to the model's classes by name; a folder with several splits is
    invalid, so name the folder of one split. Of an npz: source with an array `test`, only the images that it marks are
    used. The command prints the accuracy and the accuracy of each class.

    Exit code: 0 measured, 2 invalid input.
    """
    with bad_input():
        import torch

        from fedmitr_flwr.results.finished_model import evaluation_images, load_run_model, measure
        from fedmitr_flwr.results.finished_run import load_run
        from fedmitr_flwr.results.metrics import METRICS
        from fedmitr_flwr.results.report.words import percent, wilson
        from fedmitr_flwr.runs.log import console_log

        finished = load_run(run)
        model = load_run_model(finished)
        with console_log():
            images = evaluation_images(finished, model.spec, data, split.value)
        found = measure(model, images, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    names = model.spec.class_names
    if as_json:
        answer = {**vars(found), "class_names": names}
        typer.echo(json.dumps(answer, indent=2))
        return
    low, high = wilson(found.accuracy, found.num_images)
    typer.echo(
        f"accuracy {percent(found.accuracy)} on {found.num_images:,} images (95 %: {percent(low)} to {percent(high)})"
    )
    for metric in METRICS:
        typer.echo(f"{metric.title} {metric.text(found.metrics[metric.name])}")
    width = max(map(len, names))
    for name, rate in zip(names, found.per_class, strict=True):
        typer.echo(f"    {name:<{width}}  {percent(rate):>7}")
