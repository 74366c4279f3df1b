"""The common initialisation: the weights that every client and the server start from."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from fedmitr_flwr.data import ImageSpec
from fedmitr_flwr.models.build import build_model, create_timm, parse_options
from fedmitr_flwr.models.timm_checkpoint import load_checkpoint
from fedmitr_flwr.models.weights import seed_weights
from fedmitr_flwr.runs.atomic import DamagedFileError
from fedmitr_flwr.runs.tensors import read_tensors, write_tensors
from fedmitr_flwr.settings import ModelSettings, Settings, SettingsError

log = logging.getLogger("fedmitr.models")


def initial_state(settings: Settings, spec: ImageSpec) -> dict[str, Tensor]:
    """Make the common initialisation by ``model.init``.

    Parameters
    ----------
    settings
        ``model`` and ``run.seed`` are used.
    spec
        Image size, channels, classes.

    Returns
    -------
    dict
        State dict of `build_model`'s model, fp32 on the CPU.

    Raises
    ------
    SettingsError
        As `build_model`. It names ``model.init`` if the weights are not available or do not fit the model.
    """
    init = settings.model.init
    if init == "glyphs":
        from fedmitr_flwr.training.glyphs import glyph_state

        return glyph_state(settings, spec)
    model = build_model(settings.model, spec)
    seed_weights(model, settings.run.seed)
    if init == "pretrained":
        state = _pretrained(settings.model, spec, model.state_dict())
    elif init.startswith("file:"):
        state = load_checkpoint(init, model, spec)
    else:
        state = model.state_dict()
    return {key: value.detach().float().contiguous().clone() for key, value in state.items()}


def _pretrained(settings: ModelSettings, spec: ImageSpec, seeded: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return timm's pretrained weights; a head of another number of classes is taken from `seeded`."""
    try:
        model = create_timm(settings.name, parse_options(settings.options), spec, pretrained=True)
    except OSError as error:
        fetch = f"python -c \"import timm; timm.create_model('{settings.name}', pretrained=True)\""
        allowed = (
            f"the weights of {settings.name} are neither in the local cache nor available from the Hub ({error}). "
            f"On a machine with a network run {fetch} and copy the folder HF_HOME, or use model.init = file:PATH"
        )
        raise SettingsError(("model.init", "pretrained", allowed)) from error
    except RuntimeError as error:
        allowed = f"timm's weights do not fit {settings.name} with model.options = {settings.options!r}: {error}"
        raise SettingsError(("model.init", "pretrained", allowed)) from error
    source = cast(dict[str, Any], model.pretrained_cfg)
    if (tuple(source["mean"]), tuple(source["std"])) != (tuple(spec.mean), tuple(spec.std)):
        seen = ", ".join(f"data.{key} = {','.join(map(str, source[key]))}" for key in ("mean", "std"))
        log.warning("the pretrained weights expect images normalised with %s", seen)
    state = model.state_dict()
    if source["num_classes"] != spec.num_classes:
        state |= {key: value for key, value in seeded.items() if key.startswith("head")}
    return state


def initial_or_stored(path: Path, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the common initialisation of a run: from `path` if the file is intact, else from `make`, and store it.

    The uploads of a resumed run name the initialisation from which they were trained (`uploads.store`). If `make` gives
    another one in place of a damaged file, the run is refused there.
    """
    try:
        return read_tensors(path)[0]
    except FileNotFoundError:
        pass
    except DamagedFileError as error:
        log.warning("%s; the common initialisation is made again", error)
    state = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, state)
    return state
