"""Files around the inversion of a single model: timm models in, images out."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import timm
from PIL import Image
from safetensors.torch import save
from timm.models.vision_transformer import VisionTransformer

from fedmitr_flwr.data import ImageSpec
from fedmitr_flwr.models.build import FROM_DATA, parse_options
from fedmitr_flwr.models.timm_checkpoint import load_checkpoint
from fedmitr_flwr.models.vit import check_supported
from fedmitr_flwr.runs.atomic import atomic_path
from fedmitr_flwr.settings import SettingsError
from fedmitr_flwr.stages.inversion.single import spec_of
from fedmitr_flwr.stages.synthetic import SyntheticImages


def load_timm(name: str, options: str, checkpoint: Path | None) -> VisionTransformer:
    """Build a timm ViT with weights from a checkpoint, or pretrained ones.

    Parameters
    ----------
    name
        As timm knows it.
    options
        ``key=value`` pairs for timm, image size, channels and classes among them.
    checkpoint
        A safetensors file or a folder with one; None: timm's pretrained weights.

    Raises
    ------
    SettingsError
        Naming the option that can't work.
    """
    if not timm.is_model(name):
        raise SettingsError(("--model", name, "must be a model name that timm knows; see timm.list_models('*vit*')"))
    pairs = [part.strip() for part in options.split(",") if part.strip()]
    ours = [part for part in pairs if part.partition("=")[0].strip() in FROM_DATA]
    arguments: dict[str, Any] = dict(parse_options(",".join(part for part in pairs if part not in ours)))
    for part in ours:
        key, _, value = part.partition("=")
        if not value.strip().isdecimal():
            raise SettingsError(("--options", part, "must be a number"))
        arguments[key.strip()] = int(value)
    try:
        model = timm.create_model(name, pretrained=checkpoint is None, **arguments)
    except OSError as error:
        reason = f"its weights are neither in the local cache nor to be had from the Hub; give --checkpoint ({error})"
        raise SettingsError(("--model", name, reason)) from None
    except Exception as error:  # timm reports bad arguments by whatever exception they run into
        raise SettingsError(("--options", options, f"{name} can't be built with them: {error}")) from None
    model = cast(VisionTransformer, model)
    check_supported(model)
    if checkpoint is not None:
        load_weights(model, checkpoint)
    return model


def save_images(synthetic: SyntheticImages, spec: ImageSpec, folder: Path) -> list[Path]:
    """Write one PNG an image, named by place and label, and all tensors as ``inverted.safetensors``."""
    pixels = spec.denormalise(synthetic.images.cpu())
    files = []
    for number, (image, label) in enumerate(zip(pixels, synthetic.labels.tolist(), strict=True)):
        shown = image[:3].permute(1, 2, 0).numpy() if len(image) >= 3 else image[0].numpy()
        files.append(folder / f"{number:04d}-class{label}.png")
        Image.fromarray(shown).save(files[-1])
    tensors = {name: value.detach().cpu().contiguous() for name, value in vars(synthetic).items()}
    with atomic_path(folder / "inverted.safetensors") as temporary:
        temporary.write_bytes(save(tensors))
    return files


def load_weights(model: VisionTransformer, checkpoint: Path) -> None:
    """Load a safetensors file, or a folder with one, into a model; the head must fit too.

    Raises
    ------
    SettingsError
        If it cannot be read or does not fit.
    """
    try:
        state = load_checkpoint(f"file:{checkpoint}", model, spec_of(model))
    except SettingsError as error:
        raise SettingsError(*(("--checkpoint", str(checkpoint), allowed) for _, _, allowed in error.problems)) from None
    model.load_state_dict({key: value.float() for key, value in state.items()})
