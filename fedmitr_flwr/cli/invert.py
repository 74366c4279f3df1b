"""The command ``fedmitr invert``: invert a timm ViT into images, without a federation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedmitr_flwr.cli.common import FAILED, bad_input, show_error
from fedmitr_flwr.settings import InversionSettings, SettingsError
from fedmitr_flwr.settings.home import expand


def invert(
    labels: Annotated[
        str, typer.Option("--labels", metavar="LIST", help="Class of each image, as numbers and ranges: 0-9,3,3.")
    ],
    name: Annotated[
        str, typer.Option("--model", metavar="NAME", help="Name of a timm ViT, such as deit_tiny_patch16_224.")
    ],
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            "--checkpoint", metavar="FILE", help="Weights: a .safetensors file or a folder such as RUN/model."
        ),
    ] = None,
    options: Annotated[
        str,
        typer.Option("--options", metavar="LIST", help="Arguments for timm: img_size=28,patch_size=4,num_classes=10."),
    ] = "",
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for the images.")] = Path(
        "inverted"
    ),
    iterations: Annotated[int, typer.Option("--iterations", help="Number of optimisation steps.")] = 4000,
    stops: Annotated[
        str,
        typer.Option("--stops", metavar="LIST", help='Iterations at which patches are stopped. "": dense inversion.'),
    ] = "50,100,200,300",
    fraction: Annotated[
        float, typer.Option("--fraction", help="Fraction of the remaining patches that each stop excludes.")
    ] = 0.3,
    rate: Annotated[float, typer.Option("--learning-rate", help="Adam's learning rate, in normalised pixels.")] = 0.25,
    tv: Annotated[float, typer.Option("--tv-weight", help="Weight of the total variation.")] = 0.05,
    batch: Annotated[int, typer.Option("--batch-size", help="Number of images inverted together.")] = 32,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the starting noise.")] = 0,
    device: Annotated[str, typer.Option("--device", help="Device: auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Invert a timm ViT into images, without a federation.

    The method is sparse model inversion (SMI) with SMI's schedule as default. The command writes one PNG for each label
    and inverted.safetensors with images, labels, kept patches and losses. Without --checkpoint it uses timm's
    pretrained weights, from the local cache or the Hugging Face Hub. The last line printed is the folder.

    Exit code: 0 written, 1 the loss is not finite, 2 invalid input.
    """
    with bad_input():
        wanted = parse_labels(labels)
        settings = _settings(iterations, stops, fraction, rate, tv, batch)
        import torch

        from fedmitr_flwr.cli.invert_files import load_timm, save_images
        from fedmitr_flwr.federation.prepare import choose_device
        from fedmitr_flwr.runs.log import console_log
        from fedmitr_flwr.stages.inversion.batch import InversionDivergedError
        from fedmitr_flwr.stages.inversion.single import invert_model, spec_of

        where = choose_device(device)
        with console_log():
            model = load_timm(name, options, checkpoint)
        folder = _folder(output)

        def report(iteration: int, loss: torch.Tensor) -> None:
            if (iteration + 1) % max(1, iterations // 10) == 0:
                typer.echo(f"iteration {iteration + 1}: loss {float(loss.mean()):.4g}", err=True)

        try:
            found = invert_model(model, wanted, settings, seed=seed, device=where, on_iteration=report)
        except InversionDivergedError as error:
            show_error(f"fedmitr: {error}; try a lower --learning-rate")
            raise typer.Exit(FAILED) from None
        save_images(found, spec_of(model), folder)
    typer.echo(folder)


def parse_labels(text: str) -> list[int]:
    """Parse numbers and ranges such as ``0-9,3,3`` into a list of labels.

    Raises
    ------
    SettingsError
        If the text has another form.
    """
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise SettingsError(("--labels", text, "must be numbers and ranges separated by commas, such as 0-9,3,3"))
        found += range(int(first), int(last or first) + 1)
    return found


def _settings(iterations: int, stops: str, fraction: float, rate: float, tv: float, batch: int) -> InversionSettings:
    from fedmitr_flwr.settings import Settings

    number = len([stop for stop in stops.split(",") if stop.strip()])
    values: dict[str, int | float | str] = {
        "inversion.iterations": iterations,
        "inversion.stops": stops,
        "inversion.fractions": ",".join([str(fraction)] * number),
        "inversion.learning-rate": rate,
        "inversion.tv-weight": tv,
        "inversion.batch-size": batch,
        "inversion.start": "white",
        "inversion.start-std": 1.0,
        "density.rule": "otsu",
    }
    return Settings.from_run_config(values).inversion


def _folder(output: Path) -> Path:
    folder = expand(output, "--output").absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(("--output", str(output), f"cannot be created: {error.strerror or error}")) from None
    return folder
