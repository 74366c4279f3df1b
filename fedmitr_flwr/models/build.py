"""Build the timm Vision Transformer of a run.

Image size, channels and number of classes come from the data, everything else from ``model.name`` and
``model.options``. `training.initial` makes the weights from which all clients start.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, cast

import timm
import torch
from timm.layers.attention import Attention
from timm.models.vision_transformer import VisionTransformer

from fedmitr_flwr.data import ImageSpec
from fedmitr_flwr.models.vit import check_supported
from fedmitr_flwr.settings import ModelSettings, SettingsError

log = logging.getLogger("fedmitr.models")

OptionValue = bool | int | float | str

FROM_DATA = ("img_size", "in_chans", "num_classes")
# Up to this width of a head, torch's fused attention is slower on a CPU than explicit matrix products. A training step
# of the demo's ViT (50 tokens, heads of width 16, 64 images, 2 threads) takes 118 ms with it and 101 ms without (median
# of 30, measured alternately). With heads of width 32 both take the same time. With width 64 and 197 tokens the fused
# attention is 10 to 15 % faster.
EXPLICIT_ATTENTION_WIDTH = 16
# Arguments whose values are Python objects or devices, which a string cannot give.
_NOT_OPTIONS = {"self", "device", "dtype", "embed_layer", "block_fn", "mlp_layer", *FROM_DATA}


def parse_options(text: str) -> dict[str, OptionValue]:
    """Parse ``model.options``, such as ``patch_size=4,qk_norm=true``.

    Returns
    -------
    dict
        Keyword arguments for timm's VisionTransformer, with values of type bool, int, float or str.

    Raises
    ------
    SettingsError
        If an item is not ``key=value``, occurs twice, is not an argument of timm's VisionTransformer, or is an
        argument that the data sets (image size, channels, classes).
    """
    known = sorted(inspect.signature(VisionTransformer.__init__).parameters.keys() - _NOT_OPTIONS)
    options: dict[str, OptionValue] = {}
    problems: list[tuple[str, object, str]] = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = (part.strip() for part in item.partition("="))
        close = get_close_matches(key, known, n=1)
        if not (key and equals and value):
            problems.append(("model.options", item, "must be key=value"))
        elif key in FROM_DATA:
            problems.append(("model.options", item, f"{key} is set by the data (data.image-size, data.source)"))
        elif key not in known:
            hint = f"did you mean {close[0]}?" if close else f"the options are {', '.join(known)}"
            problems.append(("model.options", item, f"unknown option {key}; {hint}"))
        elif key in options:
            problems.append(("model.options", item, f"{key} is given twice"))
        else:
            options[key] = _parse_value(value)
    if problems:
        raise SettingsError(*problems)
    return options


def _parse_value(text: str) -> OptionValue:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def build_model(settings: ModelSettings, spec: ImageSpec) -> VisionTransformer:
    """Build the model of a run with timm's random weights, which are the same in every call.

    Parameters
    ----------
    settings
        ``name`` and ``options``.
    spec
        Image size, channels and number of classes C.

    Returns
    -------
    VisionTransformer
        In train mode, fp32, on the CPU. The function does not use torch's global random state.

    Raises
    ------
    SettingsError
        If the name is unknown, timm refuses the options, the image size is not divisible by the patch size, or the
        model cannot run on a subset of its patches (`vit.check_supported`).
    """
    options = parse_options(settings.options)
    if not timm.is_model(settings.name):
        close = get_close_matches(settings.name.split(".")[0], timm.list_models(), n=3)
        hint = f"did you mean {', '.join(close)}?" if close else "timm.list_models() lists them"
        raise SettingsError(("model.name", settings.name, f"must be the name of a timm model; {hint}"))
    try:
        model = create_timm(settings.name, options, spec)
    except Exception as error:  # timm raises exceptions of any kind for bad arguments
        _check_plain(settings.name)
        refused = ("model.options", settings.options, f"{settings.name} cannot be built with these options: {error}")
        raise SettingsError(refused) from error
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", (1, 1))
    if any(spec.image_size % side for side in patch):
        allowed = (
            f"must be divisible by the patch size {patch[0]} of {settings.name}; "
            "change patch_size in model.options or data.image-size"
        )
        raise SettingsError(("data.image-size", spec.image_size, allowed))
    check_supported(model)
    for block in model.blocks:
        attention = cast(Attention, block.attn)
        if attention.head_dim <= EXPLICIT_ATTENTION_WIDTH:
            attention.fused_attn = False  # type: ignore[misc]  # declared final for TorchScript
    return model


def create_timm(
    name: str, options: Mapping[str, OptionValue], spec: ImageSpec, *, pretrained: bool = False
) -> VisionTransformer:
    """Create a timm model with a fixed seed and without changing torch's global random state."""
    arguments: dict[str, Any] = dict(options)
    arguments |= zip(FROM_DATA, (spec.image_size, spec.channels, spec.num_classes), strict=True)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = timm.create_model(name, pretrained=pretrained, **arguments)
    return cast(VisionTransformer, model)


def outline(settings: ModelSettings) -> VisionTransformer | None:
    """Return the model of the settings without memory for its weights, with timm's own image size and classes.

    Names and shapes of the blocks are those of the run's model. The result is None if the model cannot be built or is
    not supported; `build_model` says why.
    """
    with contextlib.suppress(Exception), torch.device("meta"):
        options: dict[str, Any] = {**parse_options(settings.options)}
        model = timm.create_model(settings.name, **options)
        check_supported(model)
        return cast(VisionTransformer, model)
    return None


def _check_plain(name: str) -> None:
    """Raise a `SettingsError` about the architecture if it is not supported under any options."""
    plain = None
    with contextlib.suppress(Exception), torch.device("meta"):
        plain = timm.create_model(name)
    if plain is not None:
        check_supported(plain)
