"""What a run is going to need of the server's machine, compared with what there is before any client is asked."""

from __future__ import annotations

import shutil
from pathlib import Path

from fedmitr_flwr.data import ImageSpec
from fedmitr_flwr.models import build_model
from fedmitr_flwr.settings import Settings, SettingsError


def upload_bytes(settings: Settings, spec: ImageSpec) -> int:
    """Size of one upload's weights."""
    return _parameters(settings, spec) * (4 if settings.train.upload_dtype == "fp32" else 2)


def disk_bytes(settings: Settings, spec: ImageSpec, clients: int) -> int:
    """What a run writes, at most: everything that may lie on the disk at one time.

    Parameters
    ----------
    settings, spec
        Of the run.
    clients
        Number of clients that may upload.
    """
    rounds = settings.run.rounds
    # Initialisation, and for each round the model; at the end the exported one and two states of model and optimiser.
    models = 4 * _parameters(settings, spec) * (1 + rounds + 1 + 2 * 3)
    if settings.distill.learns_teachers:  # their maps, with the optimiser's moments, and heads are in both states
        width, classes = build_model(settings.model, spec).embed_dim, spec.num_classes
        models += 2 * 4 * clients * (3 * width * (width + 1) + classes * (width + 1) + 2)
    images = 4 * settings.inversion.images * spec.channels * spec.image_size**2
    return rounds * (clients * upload_bytes(settings, spec) + images) + models


def check_disk(settings: Settings, spec: ImageSpec, clients: int) -> None:
    """Compare what a run is going to write with the space there is.

    Parameters
    ----------
    settings, spec, clients
        As for `disk_bytes`.

    Raises
    ------
    SettingsError
        If it does not fit, with both figures.
    """
    run = settings.run
    place = Path(run.output).expanduser().absolute()
    there = 0
    if run.resume:
        there = sum(file.stat().st_size for file in Path(run.resume).rglob("*") if file.is_file())
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    missing = disk_bytes(settings, spec, clients) - there
    if missing > free:
        allowed = (
            f"{place} has {free / 1e6:,.0f} MB free, the run needs about {missing / 1e6:,.0f} MB: "
            f"{clients} uploads of {upload_bytes(settings, spec) / 1e6:,.1f} MB and its own checkpoints"
        )
        raise SettingsError(("run.output", run.output, allowed))


def _parameters(settings: Settings, spec: ImageSpec) -> int:
    return sum(value.numel() for value in build_model(settings.model, spec).state_dict().values())
