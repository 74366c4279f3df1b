"""Every published setting of conf/ runs from end to end, on stand-ins with the columns, classes and sizes of its data.

Pretrained weights come from a local file in place of the Hub; steps, images and clients are as few as can be. The
real data and weights can't be had without the Hub: what these runs reach is not measured here.
"""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from benchmarks.federation import train_federation
from fedmitr_flwr.data.presets import Preset, find_preset
from fedmitr_flwr.launch.settings_files import run_settings
from fedmitr_flwr.pipeline.methods import METHODS
from fedmitr_flwr.results.evaluate import evaluate
from fedmitr_flwr.settings import RunConfigValue

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


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_a_published_setting_runs_from_end_to_end(path: Path, weights: Path, tmp_path: Path) -> None:
    published = run_settings(ROOT, path)
    assert published.model.init == "pretrained"
    name = published.data.source.removeprefix("hub:")
    preset = find_preset(name)
    assert preset is not None
    source = f"hub:{stand_in(tmp_path / name, preset)}"
    settings = published.replace(**{**FEW, "data.source": source, "model.init": f"file:{weights}"})
    federation = train_federation(settings, 4, tmp_path / "uploads")
    assert federation.spec.num_classes == preset.classes
    assert federation.spec.image_size == 224
    result = METHODS[settings.run.method](federation.inputs(settings))
    found = evaluate(result, federation.source.test, federation.spec, settings.model, torch.device("cpu"))
    assert result.synthetic is not None
    assert result.synthetic.images.shape == (4, 3, 224, 224)
    assert result.synthetic.kept.shape[1] < 196 / 3
    assert all(0.0 <= value <= 1.0 for value in found.accuracy().values())
    assert any(not torch.equal(value, federation.initial[key]) for key, value in result.state.items())
