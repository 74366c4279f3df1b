"""Write a model as a folder that timm loads in one line.

``timm.create_model("local-dir:DIR", pretrained=True)`` gives the model with its weights;
``model.pretrained_cfg`` holds the normalisation and the class names. The same folder serves as
``model.init = file:DIR`` of a later run.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import cast

from timm.layers.attention import Attention
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor

from fedmitr_flwr.atomic import Json, write_json
from fedmitr_flwr.checkpoint import describe_mismatch
from fedmitr_flwr.data import ImageSpec
from fedmitr_flwr.models import build_model, parse_options
from fedmitr_flwr.settings import ModelSettings
from fedmitr_flwr.tensor_files import write_tensors

WEIGHTS, CONFIG = "model.safetensors", "config.json"  # the names timm looks for


def save_timm(
    state: Mapping[str, Tensor],
    settings: ModelSettings,
    spec: ImageSpec,
    directory: Path,
    metadata: Mapping[str, str],
) -> None:
    """Write ``model.safetensors`` and ``config.json``.

    Each file appears whole or not at all; the configuration comes last, so that a folder that was
    cut off in between isn't taken for a model.

    Parameters
    ----------
    state
        State dict of `models.build_model`'s model, any device and float dtype; written as fp32.
    settings, spec
        The run's model and images.
    directory
        Made if it doesn't exist.
    metadata
        Words about the run; into the header of the weights and under ``fedmitr`` in the configuration.

    Raises
    ------
    ValueError
        When the state isn't that of the model.
    """
    model = build_model(settings, spec)
    problems = describe_mismatch(state, model.state_dict())
    if problems:
        raise ValueError(f"the weights are not those of {settings.name}: {'; '.join(problems[:3])}")
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CONFIG).unlink(missing_ok=True)
    tensors = {key: value.float() for key, value in state.items()}
    write_tensors(directory / WEIGHTS, tensors, {"format": "pt", **metadata})
    write_json(directory / CONFIG, {**_timm_config(model, settings, spec), "fedmitr": dict(metadata)})


def _timm_config(model: VisionTransformer, settings: ModelSettings, spec: ImageSpec) -> dict[str, Json]:
    """Describe the model as timm's own export does (``timm.models._hub.save_config_for_hf``)."""
    options = {key: value for key, value in parse_options(settings.options).items() if "drop" not in key}
    # The number of heads doesn't show in the shapes of the weights: always say it.
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
