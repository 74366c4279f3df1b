"""Write a model as a folder that timm can load, and read a checkpoint as the common initialisation.

``timm.create_model("local-dir:DIR", pretrained=True)`` loads the model with its weights; ``model.pretrained_cfg`` has
the normalisation and the class names. A later run can use the folder as ``model.init = file:DIR``. Only safetensors
files are read, because a pickle file can run code.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from timm.layers.attention import Attention
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor

from fedmitr_flwr.data import ImageSpec
from fedmitr_flwr.models.build import build_model, parse_options
from fedmitr_flwr.models.checkpoint_keys import SeveralModelsError, timm_names
from fedmitr_flwr.models.vit import grid_size
from fedmitr_flwr.runs.atomic import DamagedFileError, Json, read_json_object, write_json
from fedmitr_flwr.runs.tensors import read_tensors, write_tensors
from fedmitr_flwr.settings import ModelSettings, SettingsError
from fedmitr_flwr.settings.home import expand

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


def load_checkpoint(
    init: str, model: VisionTransformer, spec: ImageSpec, *, replace_head: bool = True
) -> dict[str, Tensor]:
    """Read the checkpoint that ``model.init = file:PATH`` names.

    The names of the weights may have any common prefix, and may be those of transformers or torchvision
    (`checkpoint_keys`). A position embedding of another square grid is resampled by timm. These changes are logged;
    any other difference is an error.

    Parameters
    ----------
    init
        ``file:PATH``, where PATH is a .safetensors file or a folder with ``model.safetensors``, such as one that
        `save_timm` wrote.
    model
        The run's model. It is not changed.
    spec
        Class names.
    replace_head
        Whether a classifier head that is missing, has another number of classes or (in a folder) other class names is
        replaced by the head of `model`, which is logged. False: the head must fit, and the class names of a folder are
        not compared.

    Returns
    -------
    dict
        State dict of the model, with the dtypes of the file.

    Raises
    ------
    SettingsError
        If the file cannot be read or does not fit the model. The message names ``model.init``, the file, the first
        keys that do not fit with both shapes, and keys of the file.
    """
    path = expand(init.removeprefix("file:"), "model.init").resolve()
    try:
        config = read_config(path)
    except (ValueError, OSError) as error:
        raise SettingsError(("model.init", init, str(error))) from error
    path = path / WEIGHTS if path.is_dir() else path
    if path.suffix != ".safetensors" or not path.is_file():
        allowed = f"must name a .safetensors file or a folder with model.safetensors; {path} is neither"
        raise SettingsError(("model.init", init, allowed))
    try:
        stored, _ = read_tensors(path)
        state, notes = timm_names(stored)
    except OSError as error:
        raise SettingsError(("model.init", init, f"{path} cannot be read: {error.strerror or error}")) from error
    except DamagedFileError as error:
        raise SettingsError(("model.init", init, str(error))) from error
    except SeveralModelsError as error:
        allowed = f"{path} has the weights of several models ({error}); write a file with one of them"
        raise SettingsError(("model.init", init, allowed)) from None
    if notes:
        log.info("checkpoint %s: %s", path, "; ".join(notes))
    reference = model.state_dict()
    problems = []
    head = {key: value for key, value in reference.items() if key.startswith("head")}
    unfit = _unfit_head(state, head)
    if not replace_head and unfit:
        problems = [unfit]
    elif unfit or (replace_head and _class_names(config) not in (None, list(spec.class_names))):
        reason = unfit or "its config.json has other class names"
        log.warning("checkpoint %s: the classifier head is replaced by a new one (%s)", path, reason)
        state = {key: value for key, value in state.items() if not key.startswith("head")} | head
    _resample_positions(state, model)
    problems += [text for text in describe_mismatch(state, reference) if not problems or not text.startswith("head")]
    problems += _other_model(config, model)
    problems += [f"{key} is {value.dtype}" for key, value in state.items() if not value.is_floating_point()]
    if not problems and not all(bool(value.float().isfinite().all()) for value in state.values()):
        problems = ["some values are not finite"]
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        allowed = f"{path} does not fit the model: {'; '.join(problems[:3])}{more}"
        names = f"; the file has the keys {', '.join(list(stored)[:4]) or 'none'}"
        names += ", ..." if len(stored) > 4 else ""
        raise SettingsError(("model.init", init, allowed + names))
    return state


def _unfit_head(state: Mapping[str, Tensor], head: Mapping[str, Tensor]) -> str:
    """Return why the classifier head of a checkpoint cannot be that of the model; empty if it can."""
    missing = [key for key in head if key not in state]
    if missing:
        return f"the file has no classifier head ({', '.join(missing)})"
    wrong = [key for key, value in head.items() if state[key].shape[:1] != value.shape[:1]]
    if wrong:
        there, here = (tuple(side[wrong[0]].shape) for side in (state, head))
        return f"the classifier head {wrong[0]} is {there} in the file and {here} in the model"
    return ""


def read_config(path: Path) -> dict[str, object]:
    """Return the content of ``config.json`` in a checkpoint's folder; empty if there is none.

    Raises
    ------
    ValueError
        If the file is not a JSON object.
    """
    file = expand(path) / CONFIG
    return read_json_object(file) if file.is_file() else {}


def _class_names(config: Mapping[str, object]) -> list[str] | None:
    """Return the class names in a configuration of timm or transformers; None if it has none."""
    names = config.get("label_names")
    if isinstance(names, list):
        return [str(name) for name in names]
    by_number = config.get("id2label")
    if not isinstance(by_number, dict):
        return None
    found = [str(by_number.get(str(number))) for number in range(len(by_number))]
    # transformers writes these names for a model whose classes have none.
    return None if found == [f"LABEL_{number}" for number in range(len(found))] else found


def _other_model(config: Mapping[str, object], model: VisionTransformer) -> list[str]:
    """Return a text for each property in a folder's configuration that differs and that weights do not show."""
    arguments = config.get("model_args")
    heads = arguments.get("num_heads") if isinstance(arguments, dict) else config.get("num_attention_heads")
    here = cast(Attention, cast(Block, model.blocks[0]).attn).num_heads
    problems = [] if heads in (None, here) else [f"num_heads: {heads} in config.json, {here} in the model"]
    activation = config.get("hidden_act", "gelu")
    if activation != "gelu":
        problems.append(f"hidden_act: {activation} in config.json, gelu in the model")
    return problems


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
    log.info("checkpoint: the position embedding is resampled from %d x %d to %d x %d patches", side, side, *grid)
    state["pos_embed"] = resample_abs_pos_embed(old, list(grid), [side, side], num_prefix_tokens=prefix)


def describe_mismatch(state: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> list[str]:
    """Return a text for each key that is missing, unknown or of another shape, with the shapes of both sides."""

    def shape(side: Mapping[str, Tensor], key: str) -> str:
        return str(tuple(side[key].shape)) if key in side else "absent"

    keys = [*reference, *(key for key in state if key not in reference)]
    pairs = [(key, shape(state, key), shape(reference, key)) for key in keys]
    return [f"{key}: {found} in the file, {wanted} in the model" for key, found, wanted in pairs if found != wanted]
