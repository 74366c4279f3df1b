"""Every published setting of conf/ runs from end to end, on stand-ins with the columns, classes and sizes of its data.

Pretrained weights come from a local file in place of the Hub; steps, images and clients are as few as can be. The
real data and weights can't be had without the Hub: what these runs reach is not measured here. The settings for own
images get paths of data and weights as users give them, with ``--set``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import datasets
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from benchmarks.federation import Federation, train_federation
from fedmitr_flwr.data.presets import Preset, find_preset
from fedmitr_flwr.launch.settings_files import run_settings
from fedmitr_flwr.pipeline.inputs import PipelineResult
from fedmitr_flwr.pipeline.methods import METHODS
from fedmitr_flwr.results.evaluate import evaluate
from fedmitr_flwr.settings import RunConfigValue, Settings
from fedmitr_flwr.settings.recipes import PRETRAINED

ROOT = Path(__file__).resolve().parents[3]
PUBLISHED = sorted(path for path in (ROOT / "conf").glob("*.toml") if "_dir" in path.stem or path.stem == "office_home")
DOMAINS = ("Art", "Clipart", "Product", "Real World")

FEW: dict[str, RunConfigValue] = {
    "train.epochs": 1,
    "train.min-steps": 2,
    "train.max-steps": 2,
    "train.batch-size": 16,
    "inversion.images": 4,
    "inversion.batch-size": 4,
    "inversion.iterations": 6,
    "inversion.stops": "1,2,3,4",
    "distill.steps": 2,
    "distill.batch-size": 4,
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
    datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DeiT-Tiny for the 1000 classes of ImageNet, as `timm` would download it."""
    path = tmp_path_factory.mktemp("weights") / "deit_tiny.safetensors"
    save_file(timm.create_model("deit_tiny_patch16_224").state_dict(), path)
    return path


def stand_in(folder: Path, preset: Preset) -> Path:
    """Save a dataset with a preset's columns, number of classes, image size and splits."""
    rng, size = np.random.default_rng(0), preset.geometry.image_size
    names = [f"class {number}" for number in range(preset.classes)]
    features = {
        preset.image_column: datasets.Image(),
        preset.label_column: datasets.ClassLabel(names=names),
        "domain": datasets.Value("string"),
    }

    def split(count: int) -> datasets.Dataset:
        rows = range(count)
        columns = {
            preset.image_column: [Image.fromarray(rng.integers(0, 256, (size, size, 3), np.uint8)) for _ in rows],
            preset.label_column: [row % preset.classes for row in rows],
            "domain": [DOMAINS[row % 4] for row in rows],
        }
        return datasets.Dataset.from_dict(columns, features=datasets.Features(features))

    sizes = {preset.train: max(48, 2 * preset.classes), preset.test: 8, preset.validation: 8}
    datasets.DatasetDict({name: split(count) for name, count in sizes.items() if name}).save_to_disk(str(folder))
    return folder


def run_all(settings: Settings, folder: Path) -> tuple[Federation, PipelineResult]:
    """Train four clients, run the method and evaluate its model; check what all runs have in common."""
    federation = train_federation(settings, 4, folder / "uploads")
    result = METHODS[settings.run.method](federation.inputs(settings))
    found = evaluate(result, federation.source.test, federation.spec, settings.model, torch.device("cpu"))
    size = settings.data.image_size
    assert federation.spec.image_size == size
    assert result.synthetic is not None
    assert result.synthetic.images.shape == (4, 3, size, size)
    assert all(0.0 <= value <= 1.0 for value in found.accuracy().values())
    assert any(not torch.equal(value, federation.initial[key]) for key, value in result.state.items())
    return federation, result


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_a_published_setting_runs_from_end_to_end(path: Path, weights: Path, tmp_path: Path) -> None:
    published = run_settings(ROOT, path)
    assert published.model.init == "pretrained"
    name = published.data.source.removeprefix("hub:")
    preset = find_preset(name)
    assert preset is not None
    source = f"hub:{stand_in(tmp_path / name, preset)}"
    settings = published.replace(**{**FEW, "data.source": source, "model.init": f"file:{weights}"})
    federation, result = run_all(settings, tmp_path)
    assert federation.spec.num_classes == preset.classes
    assert federation.spec.image_size == 224
    assert result.synthetic is not None
    assert result.synthetic.kept.shape[1] < 196 / 3


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with the keys of DINOv2's ViT-S/14, for images of 56 px; a run resizes the position embedding."""
    path = tmp_path_factory.mktemp("weights") / "dinov2.safetensors"
    save_file(timm.create_model("vit_small_patch14_dinov2", img_size=56).state_dict(), path)
    return path


def pictures(count: int, size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)


def class_folder(folder: Path, size: int, splits: Sequence[str] = ("",)) -> str:
    """Save images of three classes in one folder for each class."""
    for number, image in enumerate(pictures(48 * len(splits), size)):
        place = folder / splits[number // 48] / f"class-{number % 3}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{number}.png")
    return f"folder:{folder}"


def archive(folder: Path, size: int, **columns: np.ndarray) -> str:
    """Save images of four classes as an archive with a test set, and with further columns."""
    numbers = np.arange(64)
    path = folder / "images.npz"
    names = np.array([f"class {number}" for number in range(4)])
    np.savez(path, images=pictures(64, size), label=numbers % 4, test=numbers >= 48, class_names=names, **columns)
    return f"npz:{path}"


OWN: dict[str, Callable[[Path], str]] = {
    "photographs": lambda folder: class_folder(folder / "photographs", 90),
    "cifar10_pretrained": lambda folder: class_folder(folder / "cifar10", 32, ("train", "test")),
    "emojihome": lambda folder: archive(
        folder, 64, domain=np.arange(64) // 4 % 4, domain_names=np.array(["3d", "flat", "line", "old"])
    ),
    "food12": lambda folder: archive(folder, 112, photo=np.array([f"{number // 2:04}" for number in range(64)])),
}


@pytest.mark.parametrize("name", OWN)
def test_a_setting_for_own_images_runs_with_the_paths_that_a_user_gives(
    name: str, dinov2: Path, tmp_path: Path
) -> None:
    given = [f"data.source={OWN[name](tmp_path)}", f"model.init=file:{dinov2}"]
    if name == "photographs":
        given.append("data.image-size=84")  # as its comment says for a CPU
    settings = run_settings(ROOT, ROOT / "conf" / f"{name}.toml", given)
    assert settings.applied_recipe().name == "pretrained"
    settings = settings.replace(**FEW)
    assert settings.train.augment == PRETRAINED["train.augment"]
    federation, _ = run_all(settings, tmp_path)
    assert federation.spec.mean == (0.485, 0.456, 0.406)
