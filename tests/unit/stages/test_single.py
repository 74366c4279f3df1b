"""Inversion of one model without federation, as a function and as a command."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from fedmitr_flwr import (
    ImageSpec,
    InversionSettings,
    SettingsError,
    build_model,
    initial_state,
    invert_model,
    save_timm,
)
from fedmitr_flwr.cli import app
from fedmitr_flwr.cli.invert import parse_labels
from fedmitr_flwr.cli.invert_files import load_timm
from fedmitr_flwr.stages.inversion.single import spec_of
from tests.unit.pipeline.test_pipeline import SETTINGS, SOURCE

SCHEDULE = InversionSettings(iterations=8, stops=(2, 4), fractions=(0.3, 0.3), batch_size=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_timm(initial_state(SETTINGS, SOURCE.spec), SETTINGS.model, SOURCE.spec, folder, {})
    return folder


def invert(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["invert", *map(str, arguments)])


def options(folder: Path) -> list[object]:
    sizes = "img_size=8,in_chans=1,num_classes=10,patch_size=2,embed_dim=32,depth=2,num_heads=2"
    return ["--model", "vit_tiny_patch16_224", "--options", sizes, "--checkpoint", folder]


def test_images_of_the_wanted_classes_come_out_in_order() -> None:
    model = build_model(SETTINGS.model, SOURCE.spec)
    seen: list[int] = []
    found = invert_model(model, [3, 1, 4, 1], SCHEDULE, spec=SOURCE.spec, on_iteration=lambda i, _: seen.append(i))
    assert found.labels.tolist() == [3, 1, 4, 1]
    assert found.images.shape == (4, 1, 8, 8)
    assert found.kept.shape == (4, 7)
    assert seen == list(range(16))
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("labels", [[10], [-1], []])
def test_a_label_out_of_range_is_refused(labels: list[int]) -> None:
    with pytest.raises(SettingsError, match="must be classes of the model, 0 to 9"):
        invert_model(build_model(SETTINGS.model, SOURCE.spec), labels, SCHEDULE, spec=SOURCE.spec)


def test_geometry_is_read_from_the_model() -> None:
    spec = spec_of(build_model(SETTINGS.model, SOURCE.spec))
    assert (spec.channels, spec.image_size, spec.num_classes) == (1, 8, 10)


def test_the_command_writes_one_picture_a_label(folder: Path, tmp_path: Path) -> None:
    more = ["--labels", "0-2,7", "--iterations", 6, "--stops", "2", "-o", tmp_path / "out", "--device", "cpu"]
    result = invert(*options(folder), *more)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == str(tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    assert names == ["0000-class0.png", "0001-class1.png", "0002-class2.png", "0003-class7.png"]
    tensors = load_file(tmp_path / "out" / "inverted.safetensors")
    assert tensors["labels"].tolist() == [0, 1, 2, 7]
    assert tensors["kept"].shape == (4, 11)
    assert torch.isfinite(tensors["images"]).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--labels", "3-1"], '--labels = "3-1": must be numbers and ranges'),
        (["--labels", "99"], "labels = 99: must be classes of the model, 0 to 9"),
        (["--stops", "9,5"], "inversion.stops"),
        (["--model", "vit_nonesuch"], '--model = "vit_nonesuch"'),
        (["--model", "resnet18", "--options", ""], "resnet18"),
        (["--checkpoint", "none.safetensors"], "--checkpoint"),
        (["--options", "img_size=big"], '--options = "img_size=big": must be a whole number'),
        (["--device", "cuda:99"], "this machine has"),
    ],
)
def test_bad_input_is_exit_code_2(folder: Path, tmp_path: Path, changes: list[str], message: str) -> None:
    plain = ["--labels", "0", "--iterations", 20, "--stops", "2", "-o", tmp_path, "--device", "cpu"]
    result = invert(*options(folder), *plain, *changes)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_labels_are_numbers_and_ranges() -> None:
    assert parse_labels("0-3, 3,10-10") == [0, 1, 2, 3, 3, 10]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("head", [None, 7])
def test_a_checkpoint_without_a_fitting_head_is_refused(folder: Path, tmp_path: Path, head: int | None) -> None:
    state = {key: value for key, value in weights(folder).items() if not key.startswith("head")}
    if head:
        state |= {"head.weight": torch.zeros(head, 32), "head.bias": torch.zeros(head)}
    save_file(state, tmp_path / "w.safetensors")
    plain = ["--labels", "0", "--iterations", 20, "--stops", "2", "-o", tmp_path / "out", "--device", "cpu"]
    result = invert(*options(folder)[:-1], tmp_path / "w.safetensors", *plain)
    assert result.exit_code == 2, result.output
    assert "--checkpoint" in result.stderr
    assert "classifier head" in result.stderr
    assert not (tmp_path / "out").exists()


def test_class_names_and_normalisation_come_with_a_folder_and_its_head_is_kept(folder: Path, tmp_path: Path) -> None:
    spec = ImageSpec(tuple("abcdefghij"), 1, 8, (0.1,), (0.2,))
    save_timm(weights(folder), SETTINGS.model, spec, tmp_path, {})
    model = load_timm("vit_tiny_patch16_224", str(options(folder)[3]), tmp_path)
    assert torch.equal(model.head.weight, weights(folder)["head.weight"])
    assert spec_of(model) == spec
