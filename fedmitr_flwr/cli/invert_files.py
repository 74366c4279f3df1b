"""Load the timm model of ``fedmitr invert``, and write the images."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import timm
from PIL import Image
from safetensors.torch import save
from timm.models.vision_transformer import VisionTransformer

from fedmitr_flwr.data import ImageSpec
from fedmitr_flwr.models.build import FROM_DATA, parse_options
from fedmitr_flwr.models.timm_checkpoint import load_checkpoint, read_config
from fedmitr_flwr.models.vit import check_supported
from fedmitr_flwr.runs.atomic import atomic_path
from fedmitr_flwr.settings import SettingsError
from fedmitr_flwr.stages.inversion.single import spec_of
from fedmitr_flwr.stages.synthetic import SyntheticImages


def load_timm(name: str, options: str, checkpoint: Path | None) -> VisionTransformer:
    """Build a timm ViT with the weights of a checkpoint or timm's pretrained weights.

    Parameters
    ----------
    name
        Model name in timm.
    options
        Arguments for timm as ``key=value`` separated by commas; may include image size, channels and classes.
    checkpoint
        A safetensors file or a folder with one. None: timm's pretrained weights.

    Raises
    ------
    SettingsError
        If the name, an option or the weights are invalid; the message names the option of the command.
    """
    if not timm.is_model(name):
        raise SettingsError(("--model", name, "must be the name of a timm model; timm.list_models('*vit*') lists them"))
    pairs = [part.strip() for part in options.split(",") if part.strip()]
    ours = [part for part in pairs if part.partition("=")[0].strip() in FROM_DATA]
    arguments: dict[str, Any] = dict(parse_options(",".join(part for part in pairs if part not in ours)))
    for part in ours:
        key, _, value = part.partition("=")
        if not value.strip().isdecimal():
            raise SettingsError(("--options", part, "must be a whole number, such as img_size=28"))
        arguments[key.strip()] = int(value)
    try:
        model = timm.create_model(name, pretrained=checkpoint is None, **arguments)
    except OSError as error:
        reason = (
            f"its weights are not in the local cache and cannot be downloaded from the Hub; use --checkpoint ({error})"
        )
        raise SettingsError(("--model", name, reason)) from None
    except Exception as error:  # timm raises exceptions of any kind for bad arguments
        raise SettingsError(("--options", options, f"{name} cannot be built with these options: {error}")) from None
    model = cast(VisionTransformer, model)
    check_supported(model)
    if checkpoint is not None:
        load_weights(model, checkpoint)
    return model


def save_images(synthetic: SyntheticImages, spec: ImageSpec, folder: Path) -> list[Path]:
    """Write each image as a PNG named by its number and label, and all tensors as ``inverted.safetensors``."""
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
    """Load a safetensors file, or a folder with one, into a model.

    The classifier head must be in the file: images of a class are inverted from it. A folder that timm or a run has
    written also gives the normalisation and the class names.

    Raises
    ------
    SettingsError
        If the file cannot be read or does not fit the model.
    """
    try:
        state = load_checkpoint(f"file:{checkpoint}", model, spec_of(model), replace_head=False)
    except SettingsError as error:
        raise SettingsError(*(("--checkpoint", str(checkpoint), allowed) for _, _, allowed in error.problems)) from None
    model.load_state_dict({key: value.float() for key, value in state.items()})
    config = read_config(checkpoint)
    source = config.get("pretrained_cfg")
    known = {key: source[key] for key in ("mean", "std") if key in source} if isinstance(source, dict) else {}
    names = config.get("label_names")
    if isinstance(names, list) and len(set(names)) == model.num_classes:
        known["label_names"] = [str(name) for name in names]
    of_timm = cast(Any, model)
    of_timm.pretrained_cfg = {**(of_timm.pretrained_cfg or {}), **known}
