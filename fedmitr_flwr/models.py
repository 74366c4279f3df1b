"""Build the timm Vision Transformer of a run and its common initialisation.

Image size, channels and classes come from the data; all else from ``model.name`` and
``model.options``. Every client and the server start from `initial_state`.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import math
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, cast

import timm
import torch
from timm.layers.attention import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from fedmitr_flwr.checkpoint import load_checkpoint
from fedmitr_flwr.data import ImageSpec
from fedmitr_flwr.settings import ModelSettings, Settings, SettingsError
from fedmitr_flwr.vit import check_supported, grid_size

log = logging.getLogger("fedmitr.models")

OptionValue = bool | int | float | str

FROM_DATA = ("img_size", "in_chans", "num_classes")
# Up to this head width torch's fused attention is slower on a CPU than plain products: one training step of the
# demo's ViT (50 tokens, heads of 16, 64 images, 2 threads) takes 118 ms with it and 101 without (median of 30, in
# turns); heads of 32 are even, and at 64 and 197 tokens the fused one is 10 to 15 % faster.
EXPLICIT_ATTENTION_WIDTH = 16
HEAD_SCALE = 0.1  # small: a class that a client never sees keeps this row, and must not shout in the ensemble
# Python objects and placements, which text can't name.
_NOT_OPTIONS = {"self", "device", "dtype", "embed_layer", "block_fn", "mlp_layer", *FROM_DATA}


def parse_options(text: str) -> dict[str, OptionValue]:
    """Parse ``model.options``, as in ``patch_size=4,qk_norm=true``.

    Returns
    -------
    dict
        Keyword arguments for timm's VisionTransformer: bool, int, float or str.

    Raises
    ------
    SettingsError
        When an item isn't ``key=value``, comes twice, isn't an argument of timm's
        VisionTransformer, or belongs to the data (image size, channels, classes).
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
            problems.append(("model.options", item, f"{key} comes from the data (data.image-size, data.source)"))
        elif key not in known:
            hint = f"did you mean {close[0]}?" if close else f"one of {', '.join(known)}"
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
    """Build the run's model with timm's random weights, the same at each call.

    Parameters
    ----------
    settings
        ``name`` and ``options``.
    spec
        Image size, channels and number of classes C.

    Returns
    -------
    VisionTransformer
        In train mode, fp32, on the CPU. Neither reads nor moves torch's global random state.

    Raises
    ------
    SettingsError
        When the name is unknown, timm refuses the options, the image size isn't divisible by the
        patch size, or the model can't run on a subset of its patches (`vit.check_supported`).
    """
    options = parse_options(settings.options)
    if not timm.is_model(settings.name):
        close = get_close_matches(settings.name.split(".")[0], timm.list_models(), n=3)
        hint = f"did you mean {', '.join(close)}?" if close else "see timm.list_models()"
        raise SettingsError(("model.name", settings.name, f"must be a model name that timm knows; {hint}"))
    try:
        model = _create(settings.name, options, spec)
    except Exception as error:  # timm reports bad arguments by whatever exception they run into
        _check_plain(settings.name)
        refused = ("model.options", settings.options, f"{settings.name} can't be built with them: {error}")
        raise SettingsError(refused) from error
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", (1, 1))
    if any(spec.image_size % side for side in patch):
        allowed = (
            f"must be divisible by the patch size {patch[0]} of {settings.name} "
            "(set patch_size in model.options, or another data.image-size)"
        )
        raise SettingsError(("data.image-size", spec.image_size, allowed))
    check_supported(model)
    for block in model.blocks:
        attention = cast(Attention, block.attn)
        if attention.head_dim <= EXPLICIT_ATTENTION_WIDTH:
            attention.fused_attn = False  # type: ignore[misc]  # final for TorchScript's sake
    return model


def _create(
    name: str, options: Mapping[str, OptionValue], spec: ImageSpec, *, pretrained: bool = False
) -> VisionTransformer:
    """Call timm with the random state of its initialisation fixed and the caller's untouched."""
    arguments: dict[str, Any] = dict(options)
    arguments |= zip(FROM_DATA, (spec.image_size, spec.channels, spec.num_classes), strict=True)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = timm.create_model(name, pretrained=pretrained, **arguments)
    return cast(VisionTransformer, model)


def _check_plain(name: str) -> None:
    """Give the better reason, that the architecture is the wrong one, if it is."""
    plain = None
    with contextlib.suppress(Exception), torch.device("meta"):
        plain = timm.create_model(name)
    if plain is not None:
        check_supported(plain)


@torch.no_grad()
def seed_weights(model: VisionTransformer, seed: int) -> None:
    """Initialise all weights so that small ViTs train within a few hundred steps.

    timm's standard deviation of 0.02 hardly moves at an embedding of 64. Here linear maps are
    normal with standard deviation 1/sqrt(fan-in); those that write to the residual stream
    (attn.proj, mlp.fc2) have half of that and the classifier a tenth; patch positions are 2-D
    sines and cosines (MoCo v3, arXiv 2104.02057); tokens are small; biases zero; norm weights and
    layer scales one. Deterministic in `seed`; torch's global random state is left alone.

    Raises
    ------
    ValueError
        When the model has a parameter that isn't covered.
    """
    draws = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if name == "pos_embed":
            weight.copy_(_sincos_positions(model))
        elif name.endswith("_token"):
            weight.copy_(0.02 * torch.randn(weight.shape, generator=draws))
        elif name.endswith("bias"):
            weight.zero_()
        elif weight.ndim == 1:
            weight.fill_(1.0)
        elif name.endswith("weight"):
            scale = 0.5 if name.endswith(("attn.proj.weight", "mlp.fc2.weight")) else 1.0
            scale = HEAD_SCALE if name.startswith("head") else scale
            std = scale / math.sqrt(weight[0].numel())
            weight.copy_(std * torch.randn(weight.shape, generator=draws))
        else:
            raise ValueError(f"no initialisation for parameter {name} of shape {tuple(weight.shape)}")


def _sincos_positions(model: VisionTransformer) -> Tensor:
    """(1, P or prefix + P, D): zeros for prefix tokens, a quarter of D each for sin/cos of row/column."""
    rows, columns = grid_size(model)
    D = model.embed_dim
    quarter = D // 4
    omega = 10000.0 ** (-torch.arange(quarter) / quarter)
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    angles = [axis.reshape(-1, 1) * omega for axis in (row, column)]
    out = torch.zeros(1, cast(Tensor, model.pos_embed).shape[1], D)
    waves = torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1)
    out[0, -rows * columns :, : 4 * quarter] = waves
    return out


def initial_state(settings: Settings, spec: ImageSpec) -> dict[str, Tensor]:
    """Make the common initialisation that ``model.init`` names.

    Parameters
    ----------
    settings
        ``model`` and ``run.seed``.
    spec
        Image size, channels, classes.

    Returns
    -------
    dict
        State dict of `build_model`'s model, fp32 on the CPU.

    Raises
    ------
    SettingsError
        As `build_model`; and naming ``model.init`` when weights can't be had or don't fit.
    """
    init = settings.model.init
    if init == "glyphs":
        from fedmitr_flwr.glyphs import glyph_state

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
    """Take timm's weights; a head that timm had to make anew is taken from `seeded`."""
    try:
        model = _create(settings.name, parse_options(settings.options), spec, pretrained=True)
    except OSError as error:
        fetch = f"python -c \"import timm; timm.create_model('{settings.name}', pretrained=True)\""
        allowed = (
            f"the weights of {settings.name} are neither in the local cache nor to be had from the Hub ({error}). "
            f"On a machine with a network run {fetch} and copy the folder HF_HOME, or use model.init = file:PATH"
        )
        raise SettingsError(("model.init", "pretrained", allowed)) from error
    except RuntimeError as error:
        allowed = f"{settings.name} with model.options = {settings.options!r} can't take timm's weights: {error}"
        raise SettingsError(("model.init", "pretrained", allowed)) from error
    source = cast(dict[str, Any], model.pretrained_cfg)
    if (tuple(source["mean"]), tuple(source["std"])) != (tuple(spec.mean), tuple(spec.std)):
        seen = ", ".join(f"data.{key} = {','.join(map(str, source[key]))}" for key in ("mean", "std"))
        log.warning("the pretrained weights were trained on images normalised with %s", seen)
    state = model.state_dict()
    if source["num_classes"] != spec.num_classes:
        state |= {key: value for key, value in seeded.items() if key.startswith("head")}
    return state
