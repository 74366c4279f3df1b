"""Common initialisation by training on rendered letters: a replacement for ImageNet pretraining that needs no download.

Upper-case and lower-case letters are rendered with the fonts of matplotlib. No digits are among them, so nothing of
MNIST is seen. The run's ViT is trained to classify the letters; its weights without the classifier head are the common
initialisation. The result is cached under a digest of the model, image size, settings, fonts, number of threads and
code.
"""

from __future__ import annotations

import hashlib
import json
import logging
import string
from importlib.metadata import version
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional as F

from fedmitr_flwr.data import ImageSpec, cache_dir
from fedmitr_flwr.models.build import build_model
from fedmitr_flwr.models.vit import forward_images, patch_size, patchify
from fedmitr_flwr.models.weights import seed_weights
from fedmitr_flwr.runs.atomic import DamagedFileError
from fedmitr_flwr.runs.tensors import read_tensors, write_tensors
from fedmitr_flwr.settings import ModelSettings, Settings, TrainSettings
from fedmitr_flwr.training.augment import augment
from fedmitr_flwr.training.optimizer import make_optimizer

log = logging.getLogger("fedmitr.glyphs")

# As in EMNIST "balanced", lower-case letters that look like their capitals are left out.
LETTERS = string.ascii_uppercase + "abdefghnqrt"
TEXT_FONTS = ("DejaVuSans*", "DejaVuSerif*", "STIXGeneral*", "cmb10*", "cmr10*", "cmss10*", "cmtt10*")


def glyph_state(settings: Settings, spec: ImageSpec) -> dict[str, Tensor]:
    """Return the initialisation for `model.init = glyphs`, from the cache if it is there.

    Parameters
    ----------
    settings
        `model` and `run.seed` are used.
    spec
        Image size, channels and classes.

    Returns
    -------
    dict
        State dict of the model, fp32 on the CPU. Its head has C outputs and random weights seeded by `run.seed`.
    """
    path = cache_path(settings, spec)
    model = build_model(settings.model, spec)
    seed_weights(model, settings.run.seed)
    body = _cached(path)
    if body is None:
        log.info(
            "common initialisation: training on %d rendered letters, %d epochs",
            settings.model.glyph_images,
            settings.model.glyph_epochs,
        )
        letters = ImageSpec(tuple(LETTERS), spec.channels, spec.image_size, spec.mean, spec.std)
        student = build_model(settings.model, letters)
        seed_weights(student, settings.run.seed)
        accuracy = pretrain(student, letters, settings.model, settings.run.seed)
        log.info("common initialisation: %.1f %% accuracy on the letters in the last epoch", 100 * accuracy)
        body = {name: value for name, value in student.state_dict().items() if not name.startswith("head")}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, body)
    return {name: body.get(name, value) for name, value in model.state_dict().items()}


def _cached(path: Path) -> dict[str, Tensor] | None:
    """Return the initialisation in the cache; None if it is missing or damaged."""
    try:
        body, _ = read_tensors(path)
    except FileNotFoundError:
        return None
    except (OSError, DamagedFileError) as error:
        log.warning("the cached initialisation %s is made again (%s)", path, error)
        return None
    log.info("common initialisation: glyphs, from the cache (%s)", path.name)
    return body


def cache_path(settings: Settings, spec: ImageSpec) -> Path:
    """Return the path of the cached initialisation; its name is a digest of everything that the result depends on."""
    recipe = {
        "model": settings.model.model_dump(mode="json", exclude={"init"}),
        "seed": settings.run.seed,
        "spec": [spec.channels, spec.image_size, spec.mean, spec.std],
        "fonts": [[font.name, font.stat().st_size] for font in _fonts()],
        "threads": torch.get_num_threads(),  # it changes the order of sums
        "code": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
        "versions": [version("torch"), version("timm"), version("pillow")],
    }
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:20]
    return cache_dir() / "initial" / f"glyphs-{digest}.safetensors"


def render_letters(count: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Render letters, white on black, in random fonts and sizes.

    Returns
    -------
    images
        ``(count, 1, size, size)`` uint8.
    labels
        ``(count,)`` int64, index into `LETTERS`; all letters equally often.
    """
    rng = np.random.default_rng(seed)
    fonts = [ImageFont.truetype(str(path), round(size * scale)) for path in _fonts() for scale in (0.8, 0.95, 1.1)]
    labels = rng.permutation(np.arange(count) % len(LETTERS))
    images = np.zeros((count, 1, size, size), np.uint8)
    for row, label in enumerate(labels):
        canvas = Image.new("L", (size, size))
        font = fonts[rng.integers(len(fonts))]
        stroke = int(rng.integers(0, 2))
        centre = (size / 2, size / 2)
        ImageDraw.Draw(canvas).text(centre, LETTERS[label], fill=255, font=font, anchor="mm", stroke_width=stroke)
        images[row, 0] = np.asarray(canvas)
    return torch.from_numpy(images), torch.from_numpy(labels)


def pretrain(model: VisionTransformer, spec: ImageSpec, settings: ModelSettings, seed: int) -> float:
    """Train `model` in place to classify rendered letters; return the accuracy over the last epoch.

    Before the last epoch the model receives only the half of an image's patches that has the most ink, because empty
    patches teach little and cost as much. In the last epoch it receives whole images, as in later use.
    """
    images, labels = render_letters(settings.glyph_images, spec.image_size, seed)
    draws = torch.Generator().manual_seed(seed)
    batch = 64
    steps = settings.glyph_epochs * (len(images) // batch)
    recipe = TrainSettings(learning_rate=1e-3, weight_decay=0.05, warmup_fraction=0.1)
    optimizer, scheduler = make_optimizer(model, recipe, steps)
    model.train()
    hits = torch.zeros(())
    for epoch in range(settings.glyph_epochs):
        hits.zero_()
        whole = epoch == settings.glyph_epochs - 1
        for chosen in torch.randperm(len(images), generator=draws).split(batch)[: len(images) // batch]:
            x = augment(tilt(images[chosen].float() / 255, draws), "shift", draws)
            inked = None if whole else inked_patches(x, patch_size(model))
            x = spec.normalise((paint(x, spec.channels, draws) * 255).round().to(torch.uint8))
            logits = forward_images(model, x, inked).logits
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(logits, labels[chosen], label_smoothing=0.1).backward()
            optimizer.step()
            scheduler.step()
            hits += (logits.argmax(1) == labels[chosen]).sum()
    model.eval()
    return float(hits) / (len(images) // batch * batch)


def inked_patches(images: Tensor, patch: tuple[int, int]) -> Tensor:
    """Return the positions of the half of the patches with the most ink, ``(B, P // 2)``, of white on black letters."""
    ink = patchify(images, patch).sum(2)
    return ink.topk(max(1, ink.shape[1] // 2), dim=1).indices.sort(1).values


def tilt(images: Tensor, generator: torch.Generator) -> Tensor:
    """Rotate, slant and scale each letter at random, as in handwriting; ``(B, 1, S, S)`` in 0..1."""
    B = len(images)
    angle, slant, wide, high = 2 * torch.rand(4, B, generator=generator) - 1
    angle, slant, wide, high = 0.2 * angle, 0.3 * slant, 1.0 + 0.2 * wide, 1.0 + 0.2 * high
    zero = torch.zeros(B)
    top = torch.stack([wide * angle.cos(), wide * (slant - angle.sin()), zero], 1)
    bottom = torch.stack([high * angle.sin(), high * angle.cos(), zero], 1)
    grid = F.affine_grid(torch.stack([top, bottom], 1), list(images.shape), align_corners=False)
    tilted: Tensor = F.grid_sample(images, grid, align_corners=False)
    return tilted


def paint(images: Tensor, channels: int, generator: torch.Generator) -> Tensor:
    """Return ``(B, channels, S, S)``: unchanged for one channel, else letters of random colour on a random colour."""
    if channels == 1:
        return images
    ink, paper = torch.rand(2, len(images), channels, 1, 1, generator=generator).unbind(0)
    return images * ink + (1 - images) * paper


def _fonts() -> list[Path]:
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return sorted(
        path for pattern in TEXT_FONTS for path in folder.glob(f"{pattern}.ttf") if "Display" not in path.name
    )
