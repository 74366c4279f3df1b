from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from torch import Tensor

from fedmitr_flwr.data import ImageSpec
from fedmitr_flwr.models.build import build_model
from fedmitr_flwr.models.timm_checkpoint import save_timm
from fedmitr_flwr.settings import ModelSettings, Settings
from fedmitr_flwr.training.initial import initial_state

TINY = ModelSettings(options="patch_size=4,embed_dim=32,depth=2,num_heads=2,qk_norm=true,drop_path_rate=0.1")
GREY = ImageSpec(("zero", "one", "two"), 1, 28, (0.13,), (0.31,))


def colour(size: int) -> ImageSpec:
    return ImageSpec(("cat", "dog"), 3, size, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))


def make_state(settings: ModelSettings, spec: ImageSpec) -> dict[str, Tensor]:
    state = initial_state(Settings(model=settings.model_copy(update={"init": "seeded"})), spec)
    draws = torch.Generator().manual_seed(1)
    return {key: value + 0.1 * torch.randn(value.shape, generator=draws) for key, value in state.items()}


@pytest.mark.parametrize(
    ("settings", "spec"),
    [
        pytest.param(TINY, GREY, id="small-grey"),
        pytest.param(ModelSettings(name="deit_tiny_patch16_224", options="depth=2"), colour(64), id="deit"),
        pytest.param(ModelSettings(name="vit_small_patch14_reg4_dinov2", options="depth=1"), colour(56), id="dinov2"),
        pytest.param(ModelSettings(name="deit3_small_patch16_224", options="depth=1"), colour(64), id="deit3"),
        pytest.param(
            ModelSettings(name="deit_tiny_distilled_patch16_224", options="depth=1"), colour(64), id="two-heads"
        ),
        pytest.param(ModelSettings(name="vit_tiny_patch16_224.augreg_in21k", options="depth=1"), colour(32), id="tag"),
    ],
)
def test_timm_loads_the_folder_in_one_line_with_equal_logits(
    settings: ModelSettings, spec: ImageSpec, tmp_path: Path
) -> None:
    state = make_state(settings, spec)
    save_timm(state, settings, spec, tmp_path, {})
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    ours = build_model(settings, spec).eval()
    ours.load_state_dict(state)
    images = torch.randn(2, spec.channels, spec.image_size, spec.image_size, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(images), ours(images), rtol=1e-5, atol=1e-6)
    assert ours(images).std() > 0.01


def test_the_loaded_model_knows_its_classes_and_how_its_images_are_prepared(tmp_path: Path) -> None:
    save_timm(make_state(TINY, GREY), TINY, GREY, tmp_path, {})
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert list(model.pretrained_cfg["label_names"]) == ["zero", "one", "two"]
    preparation = timm.data.resolve_model_data_config(model)
    assert preparation["input_size"] == (1, 28, 28)
    assert tuple(preparation["mean"]) == (0.13,)
    assert tuple(preparation["std"]) == (0.31,)
    assert preparation["crop_pct"] == 1.0


def test_a_later_run_starts_from_the_folder(tmp_path: Path) -> None:
    state = make_state(TINY, GREY)
    save_timm(state, TINY, GREY, tmp_path, {})
    again = initial_state(Settings(model=TINY.model_copy(update={"init": f"file:{tmp_path}"})), GREY)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], state[key]) for key in state)


def test_metadata_stands_in_both_files(tmp_path: Path) -> None:
    save_timm(make_state(TINY, GREY), TINY, GREY, tmp_path / "deep" / "folder", {"run": "demo"})
    with safe_open(tmp_path / "deep" / "folder" / "model.safetensors", "pt") as weights:
        assert weights.metadata().items() > {"format": "pt", "run": "demo"}.items()
    config = json.loads((tmp_path / "deep" / "folder" / "config.json").read_text())
    assert config["fedmitr"] == {"run": "demo"}


def test_saving_again_replaces_the_model_and_leaves_nothing_else_behind(tmp_path: Path) -> None:
    first = make_state(TINY, GREY)
    save_timm(first, TINY, GREY, tmp_path, {})
    save_timm({key: value + 1 for key, value in first.items()}, TINY, GREY, tmp_path, {})
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert torch.equal(model.state_dict()["norm.bias"], first["norm.bias"] + 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_a_write_that_fails_leaves_no_configuration_without_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = make_state(TINY, GREY)
    save_timm(state, TINY, GREY, tmp_path, {})

    def full_disk(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_timm({key: value + 1 for key, value in state.items()}, TINY, GREY, tmp_path, {})
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_views_of_one_vector_are_saved_as_fp32(dtype: torch.dtype, tmp_path: Path) -> None:
    state = make_state(TINY, GREY)
    flat = torch.cat([value.flatten() for value in state.values()]).to(dtype)
    cuts = flat.split([value.numel() for value in state.values()])
    views = {key: cut.view(state[key].shape) for key, cut in zip(state, cuts, strict=True)}
    save_timm(views, TINY, GREY, tmp_path, {})
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert torch.equal(model.state_dict()["pos_embed"], views["pos_embed"].float())
    assert (tmp_path / "model.safetensors").stat().st_size < 4 * flat.numel() + 10_000


def test_weights_of_another_model_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    state = make_state(TINY, GREY)
    state.pop("norm.bias")
    with pytest.raises(ValueError, match=r"norm\.bias: absent"):
        save_timm(state, TINY, GREY, tmp_path / "model", {})
    assert not (tmp_path / "model").exists()
