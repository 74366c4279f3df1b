"""Write a model as a folder that timm can load, and read a checkpoint as the common initialisation.

``timm.create_model("local-dir:DIR", pretrained=True)`` loads the model with its weights; ``model.pretrained_cfg`` has
the normalisation and the class names. A later run can use the folder as ``model.init = file:DIR``. Only safetensors
files are read, because a pickle file can run code.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.layers.attention import Attention
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor

from fedmitr_flwr.data import ImageSpec
from fedmitr_flwr.models.build import build_model, parse_options
from fedmitr_flwr.models.vit import grid_size
from fedmitr_flwr.runs.atomic import Json, write_json
from fedmitr_flwr.runs.tensors import write_tensors
from fedmitr_flwr.settings import ModelSettings, SettingsError

WEIGHTS, CONFIG = "model.safetensors", "config.json"  # names that timm requires


def save_timm(
    state: Mapping[str, Tensor],
    settings: ModelSettings,
    spec: ImageSpec,
    directory: Path,
    metadata: Mapping[str, str],
) -> None:
    """Write ``model.safetensors`` and ``config.json``.

    Each file is written atomically. The configuration is written last, so a folder that is incomplete after an
    interruption is not taken for a model.

    Parameters
    ----------
    state
        State dict of `build.build_model`'s model, on any device and of any float dtype; it is written as fp32.
    settings, spec
        Model and images of the run.
    directory
        Folder to write to; made if missing.
    metadata
        Texts about the run, for the header of the weights and the entry ``fedmitr`` of the configuration.

    Raises
    ------
    ValueError
        If the state does not fit the model.
    """
    model = build_model(settings, spec)
    problems = describe_mismatch(state, model.state_dict())
    if problems:
        raise ValueError(f"the weights do not fit {settings.name}: {'; '.join(problems[:3])}")
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CONFIG).unlink(missing_ok=True)
    tensors = {key: value.float() for key, value in state.items()}
    write_tensors(directory / WEIGHTS, tensors, {"format": "pt", **metadata})
    write_json(directory / CONFIG, {**_timm_config(model, settings, spec), "fedmitr": dict(metadata)})


def _timm_config(model: VisionTransformer, settings: ModelSettings, spec: ImageSpec) -> dict[str, Json]:
    """Return the model's configuration in timm's format (``timm.models._hub.save_config_for_hf``)."""
    options = {key: value for key, value in parse_options(settings.options).items() if "drop" not in key}
    # The shapes of the weights do not show the number of heads, so it is always written.
    options["num_heads"] = cast(Attention, cast(Block, model.blocks[0]).attn).num_heads
    distilled = isinstance(model, VisionTransformerDistilled)
    return {
        "architecture": settings.name.split(".")[0],
        "num_classes": spec.num_classes,
        "num_features": model.num_features,
        "global_pool": "token",
        "label_names": list(spec.class_names),
        "model_args": {**options, "img_size": spec.image_size, "in_chans": spec.channels},
        "pretrained_cfg": {
            "tag": "fedmitr",
            "custom_load": False,
            "input_size": [spec.channels, spec.image_size, spec.image_size],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": list(spec.mean),
            "std": list(spec.std),
            "num_classes": spec.num_classes,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": ["head", "head_dist"] if distilled else "head",
        },
    }


log = logging.getLogger("fedmitr.models")


def load_checkpoint(init: str, model: VisionTransformer, spec: ImageSpec) -> dict[str, Tensor]:
    """Read the checkpoint that ``model.init = file:PATH`` names.

    A prefix ``module.`` or ``model.`` of all keys is removed. A classifier head that is missing, has another number of
    classes or (in a folder) other class names is replaced by the head of `model`. A position embedding of another
    square grid is resampled by timm. Both changes are logged; any other difference is an error.

    Parameters
    ----------
    init
        ``file:PATH``, where PATH is a .safetensors file or a folder that `save_timm` wrote.
    model
        The run's model, whose head is the replacement. It is not changed.
    spec
        Class names.

    Returns
    -------
    dict
        State dict of the model, with the dtypes of the file.

    Raises
    ------
    SettingsError
        If the file cannot be read or does not fit the model. The message names ``model.init``, the file, and the first
        keys that do not fit with both shapes.
    """
    path = Path(init.removeprefix("file:")).expanduser().resolve()
    config = _read_config(init, path) if path.is_dir() else {}
    path = path / "model.safetensors" if path.is_dir() else path
    if path.suffix != ".safetensors" or not path.is_file():
        allowed = f"must name a .safetensors file or a folder with model.safetensors; {path} is neither"
        raise SettingsError(("model.init", init, allowed))
    try:
        state = _strip_prefix(load_file(path))
    except (SafetensorError, OSError) as error:
        raise SettingsError(("model.init", init, f"{path} cannot be read as safetensors: {error}")) from error
    reference = model.state_dict()
    head = {key: value for key, value in reference.items() if key.startswith("head")}
    names = config.get("label_names")
    if names not in (None, list(spec.class_names)) or any(
        key not in state or state[key].shape[:1] != value.shape[:1] for key, value in head.items()
    ):
        log.info("common initialisation: the classifier head of %s does not fit and is replaced by a new one", path)
        state = {key: value for key, value in state.items() if not key.startswith("head")} | head
    _resample_positions(state, model)
    problems = describe_mismatch(state, reference)
    problems += _other_heads(config, model)
    if not problems and not all(bool(torch.isfinite(value).all()) for value in state.values()):
        problems = ["some values are not finite"]
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        allowed = f"{path} does not fit the model of model.name and model.options: {'; '.join(problems[:3])}{more}"
        raise SettingsError(("model.init", init, allowed))
    return state


def _read_config(init: str, folder: Path) -> dict[str, object]:
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise SettingsError(("model.init", init, f"{file} is not valid JSON: {error}")) from error
    return config if isinstance(config, dict) else {}


def _other_heads(config: dict[str, object], model: VisionTransformer) -> list[str]:
    """Return an error text if the number of attention heads differs, which weight shapes do not show."""
    arguments = config.get("model_args")
    there = arguments.get("num_heads") if isinstance(arguments, dict) else None
    here = cast(Attention, cast(Block, model.blocks[0]).attn).num_heads
    return [] if there in (None, here) else [f"num_heads: {there} in config.json, {here} in the model"]


def _strip_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove the prefixes ``module.`` and ``model.``, which wrappers add to every key."""
    for prefix in ("module.", "model.", "module."):
        if state and all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _resample_positions(state: dict[str, Tensor], model: VisionTransformer) -> None:
    """Resample a position embedding of another square grid, as timm does for pretrained weights."""
    old, new = state.get("pos_embed"), model.pos_embed
    if old is None or new is None or old.ndim != 3 or old.shape[1] == new.shape[1] or old.shape[2] != new.shape[2]:
        return
    prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    side = math.isqrt(max(old.shape[1] - prefix, 0))
    if side * side + prefix != old.shape[1] or side == 0:
        return
    grid = grid_size(model)
    log.info("common initialisation: position embedding resampled from %d x %d to %d x %d patches", side, side, *grid)
    state["pos_embed"] = resample_abs_pos_embed(old, list(grid), [side, side], num_prefix_tokens=prefix)


def describe_mismatch(state: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> list[str]:
    """Return a text for each key that is missing, unknown or of another shape, with the shapes of both sides."""

    def shape(side: Mapping[str, Tensor], key: str) -> str:
        return str(tuple(side[key].shape)) if key in side else "absent"

    keys = [*reference, *(key for key in state if key not in reference)]
    pairs = [(key, shape(state, key), shape(reference, key)) for key in keys]
    return [f"{key}: {found} in the file, {wanted} in the model" for key, found, wanted in pairs if found != wanted]
