"""What can be done with a finished run's model: predict, evaluate, export; and its card."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from fedmitr_flwr.cli import app
from fedmitr_flwr.data import load_source
from fedmitr_flwr.models.build import build_model
from fedmitr_flwr.models.vit import forward_images
from fedmitr_flwr.results.finished_model import load_run_model
from fedmitr_flwr.results.report import load_run
from tests.unit.results.finished import SETTINGS, make_run

SOURCE = load_source(SETTINGS.data)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs"), "done")


def fedmitr(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def save_digit(path: Path, row: int) -> Path:
    Image.fromarray(SOURCE.test.images([row])[0, 0].numpy()).save(path)
    return path


def test_plain_timm_gives_the_logits_of_our_own_forward(run: Path) -> None:
    ours = build_model(SETTINGS.model, SOURCE.spec)
    ours.load_state_dict(load_file(run / "model" / "model.safetensors"))
    theirs = timm.create_model(f"local-dir:{run / 'model'}", pretrained=True).eval()
    images = SOURCE.spec.normalise(SOURCE.test.images(range(50)))
    with torch.inference_mode():
        expected, found = forward_images(ours.eval(), images).logits, theirs(images)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_predict_prints_the_likeliest_classes(run: Path, tmp_path: Path) -> None:
    files = [save_digit(tmp_path / f"{row}.png", row) for row in range(3)]
    result = fedmitr("predict", run, *files, "--top", 2)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert len(lines) == 3
    assert re.fullmatch(rf"{re.escape(str(files[0]))}: \d [\d.]+ %, \d [\d.]+ %", lines[0])


def test_predict_as_json_holds_every_class_and_adds_to_one(run: Path, tmp_path: Path) -> None:
    file = save_digit(tmp_path / "a.png", 0)
    (answer,) = json.loads(fedmitr("predict", run, file, "--json").stdout)
    rates = {entry["name"]: entry["probability"] for entry in answer["classes"]}
    assert sum(rates.values()) == pytest.approx(1.0, abs=1e-4)
    model = load_run_model(load_run(run))
    expected = model.probabilities(SOURCE.test.images([0]))[0]
    assert rates["3"] == pytest.approx(float(expected[3]), abs=1e-5)


def probabilities(run: Path, *files: Path) -> list[dict[str, float]]:
    result = fedmitr("predict", run, *files, "--json")
    assert result.exit_code == 0, result.output
    return [
        {entry["name"]: entry["probability"] for entry in answer["classes"]} for answer in json.loads(result.stdout)
    ]


def test_predict_gives_a_digit_the_same_classes_however_its_file_stores_it(run: Path, tmp_path: Path) -> None:
    plain = save_digit(tmp_path / "plain.png", 0)
    digit = Image.open(plain)
    exif = Image.Exif()
    exif[0x0112] = 6
    digit.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(np.asarray(digit).astype(np.uint16) * 257).save(tmp_path / "16-bits.png")
    Image.fromarray((np.asarray(digit) / 255).astype(np.float32)).save(tmp_path / "float.tif")
    digit.save(tmp_path / os.fsdecode(b"caf\xe9"), "GIF")
    (tmp_path / "link").symlink_to("plain.png")
    names = ("turned.png", "16-bits.png", "float.tif", os.fsdecode(b"caf\xe9"), "link")
    expected, *found = probabilities(run, plain, *(tmp_path / name for name in names))
    for name, rates in zip(names, found, strict=True):
        assert rates == pytest.approx(expected, abs=1e-6), name


def test_predict_says_that_it_takes_the_first_of_several_pictures(run: Path, tmp_path: Path) -> None:
    first, other = (Image.open(save_digit(tmp_path / f"{row}.png", row)) for row in (0, 1))
    for name in ("x.gif", "x.tif", "x.webp"):
        options = {"lossless": True} if name == "x.webp" else {}
        first.save(tmp_path / name, save_all=True, append_images=[other], **options)
        result = fedmitr("predict", run, tmp_path / "0.png", tmp_path / name, "--json")
        assert "1 files have several pictures; only the first of each is classified" in result.stderr
        plain, found = (answer["classes"] for answer in json.loads(result.stdout))
        assert [entry["name"] for entry in found] == [entry["name"] for entry in plain]


def test_predict_names_a_file_whose_name_is_not_utf8(run: Path, tmp_path: Path) -> None:
    file = save_digit(tmp_path / "a.png", 0).rename(tmp_path / os.fsdecode(b"caf\xe9.png"))
    result = fedmitr("predict", run, file)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"{tmp_path}/caf\\xe9.png: ")


def test_evaluate_matches_the_classes_of_an_old_model_in_any_form(run: Path, tmp_path: Path) -> None:
    config = json.loads((run / "model" / "config.json").read_text())
    shutil.copytree(run, tmp_path / "old")
    config["label_names"][0] = "cafe\u0301"
    (tmp_path / "old" / "model" / "config.json").write_text(json.dumps(config))
    (tmp_path / "mine" / "caf\u00e9 ").mkdir(parents=True)
    save_digit(tmp_path / "mine" / "caf\u00e9 " / "0.png", 0)
    found = json.loads(fedmitr("evaluate", tmp_path / "old", "--data", f"folder:{tmp_path / 'mine'}", "--json").stdout)
    assert found["num_images"] == 1
    assert sum(found["confusion"][0]) == 1


def test_evaluate_says_on_stderr_what_it_found(run: Path, tmp_path: Path) -> None:
    (tmp_path / "3").mkdir()
    save_digit(tmp_path / "3" / "0.png", 0)
    (tmp_path / "3" / "notes.txt").write_text("none")
    result = fedmitr("evaluate", run, "--data", f"folder:{tmp_path}", "--json")
    assert "1 images of 1 classes (1 .png)" in result.stderr
    assert "left out: 1 files that are no image that can be read (1 .txt)" in result.stderr
    assert json.loads(result.stdout)["num_images"] == 1


def test_evaluate_repeats_the_accuracy_of_the_run(run: Path) -> None:
    found = json.loads(fedmitr("evaluate", run, "--json").stdout)
    metrics = json.loads((run / "metrics.json").read_text())
    assert found["accuracy"] == pytest.approx(metrics["accuracy"]["global"], abs=1e-6)
    assert found["per_class"] == pytest.approx(metrics["per_class"]["global"], abs=1e-6)
    assert sum(map(sum, found["confusion"])) == found["num_images"] == len(SOURCE.test)
    assert "accuracy" in fedmitr("evaluate", run, "--split", "validation").stdout


def test_evaluate_matches_classes_of_a_folder_by_name(run: Path, tmp_path: Path) -> None:
    for row, label in enumerate(SOURCE.test.labels[:40].tolist()):
        folder = tmp_path / "mine" / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        save_digit(folder / f"{row}.png", row)
    shutil.rmtree(tmp_path / "mine" / "0")
    found = json.loads(fedmitr("evaluate", run, "--data", f"folder:{tmp_path / 'mine'}", "--json").stdout)
    rows = np.flatnonzero(SOURCE.test.labels[:40] != 0)
    model = load_run_model(load_run(run))
    said = model.probabilities(SOURCE.test.images(rows)).argmax(1).numpy()
    assert found["accuracy"] == pytest.approx(float((said == SOURCE.test.labels[rows]).mean()))
    assert found["per_class"][0] is None


@pytest.mark.parametrize(("test", "used"), [([4, 5], [4, 5]), (range(6), range(6)), ([], range(6))])
def test_evaluate_takes_the_test_images_of_an_archive_that_marks_them(
    run: Path, tmp_path: Path, test: Sequence[int], used: Sequence[int]
) -> None:
    marked = np.isin(np.arange(6), test)
    images = SOURCE.test.images(range(6))[:, 0].numpy()
    np.savez(tmp_path / "x.npz", images=images, label=np.arange(6), test=marked)
    result = fedmitr("evaluate", run, "--data", f"npz:{tmp_path / 'x.npz'}", "--json")
    confusion = json.loads(result.stdout)["confusion"]
    assert [label for label, row in enumerate(confusion) if sum(row)] == list(used)
    assert f"{len(used)} to evaluate" in result.stderr
    assert ("left out: 4 images that it does not mark as test data" in result.stderr) == (len(test) == 2)


def test_evaluate_takes_another_source_with_the_same_classes(run: Path) -> None:
    result = fedmitr("evaluate", run, "--data", "mnist-5k", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["num_images"] == 1000
    assert sum(map(sum, found["confusion"])) == 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "RUN", "none.png"], 'IMAGE = "none.png": No such file'),
        (["predict", "RUN", "text.png"], 'IMAGE = "text.png": cannot be read as an image: it is damaged'),
        (["predict", "nowhere", "text.png"], "is not a run"),
        (["predict", "RUN", "12-bits.png"], 'IMAGE = "12-bits.png": the images of 16 or more bits have no value above'),
        (["predict", "RUN", "dangling.png"], 'IMAGE = "dangling.png": No such file'),
        (["predict", "RUN", "circle.png"], 'IMAGE = "circle.png": Too many levels of symbolic links'),
        (["predict", "RUN", "other"], 'IMAGE = "other": Is a directory'),
        (["evaluate", "RUN", "--data", "folder:split"], "has the splits Train, Test; name the folder of one of them"),
        (["evaluate", "RUN", "--data", "folder:circle"], "leads in a circle"),
        (["evaluate", "RUN", "--data", "mnist"], '--data = "mnist": '),
        (["evaluate", "RUN", "--data", "npz:other.npz"], '--data = "npz:other.npz": does not exist'),
        (["evaluate", "RUN", "--data", "folder:none"], "does not exist"),
        (["evaluate", "RUN", "--data", "folder:other"], "classes that the federation does not have: cat"),
        (["predict", "RUN", "pipe.png"], 'IMAGE = "pipe.png": is a pipe, a socket or a device'),
        (["predict", "RUN", "~nonesuch/a.png"], 'IMAGE = "~nonesuch/a.png": begins with ~, but no such user'),
        (["evaluate", "RUN", "--data", "folder:~nonesuch"], '--data = "folder:~nonesuch": begins with ~'),
        (["evaluate", "RUN", "--data", "hub:~nonesuch"], '--data = "hub:~nonesuch": begins with ~'),
        (["evaluate", "~nonesuch"], 'RUN = "~nonesuch": begins with ~'),
        (["split", "~nonesuch"], 'DIR = "~nonesuch": begins with ~'),
        (["certs", "~nonesuch", "--site", "a"], 'DIR = "~nonesuch": begins with ~'),
        (["export", "RUN", "--onnx", "no/such/folder.onnx"], "cannot be written"),
        (["export", "DAMAGED", "--onnx", "x.onnx"], "its model cannot be loaded"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    if arguments[0] == "export" and "RUN" in arguments:
        pytest.importorskip("onnxscript", reason="the onnx packages are not installed")
    monkeypatch.chdir(tmp_path)
    Path("text.png").write_text("no image")
    for name in ("cat", "dog"):
        Path("other", name).mkdir(parents=True)
        save_digit(Path("other", name, "a.png"), 0)
    Image.fromarray(np.full((8, 8), 4095, np.uint16)).save("12-bits.png")
    Path("dangling.png").symlink_to("nowhere.png")
    os.mkfifo("pipe.png")
    Path("circle.png").symlink_to("circle.png")
    for name in ("split/Train/3", "split/Test/3", "circle/3", "dangling/3"):
        Path(name).mkdir(parents=True)
        save_digit(Path(name, "a.png"), 0)
    Path("circle/3/again").symlink_to("..")
    Path("dangling/3/b.png").symlink_to("nowhere.png")
    shutil.copytree(run, "damaged")
    Path("damaged/model/model.safetensors").write_bytes(b"nothing")
    names = {"RUN": str(run), "DAMAGED": "damaged"}
    result = fedmitr(*(names.get(argument, argument) for argument in arguments))
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_the_onnx_file_gives_torch_s_logits_for_any_number_of_images(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="the onnx packages are not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    file = tmp_path / "model.onnx"
    result = fedmitr("export", run, "--onnx", file)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == str(file)
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    model = load_run_model(load_run(run))
    for count in (1, 7):
        images = SOURCE.spec.normalise(SOURCE.test.images(range(count)))
        (found,) = session.run(["logits"], {"images": images.numpy()})
        with torch.inference_mode():
            torch.testing.assert_close(torch.from_numpy(found), model.model(images), atol=1e-4, rtol=0)
    assert json.loads(session.get_modelmeta().custom_metadata_map["class_names"]) == list(SOURCE.spec.class_names)


def test_the_card_has_what_the_hub_reads_and_what_a_person_must_know(run: Path) -> None:
    yaml = pytest.importorskip("yaml")
    _, front, text = (run / "model" / "README.md").read_text().split("---\n", 2)
    card = yaml.safe_load(front)
    assert card["library_name"] == "timm"
    assert card["pipeline_tag"] == "image-classification"
    accuracy = json.loads((run / "metrics.json").read_text())["accuracy"]["global"]
    (result,) = card["model-index"][0]["results"]
    assert result["metrics"] == [{"type": "accuracy", "value": pytest.approx(accuracy, abs=1e-4)}]
    assert f"**this model** | {100 * accuracy:.1f} %" in text
    assert "no label counts" in text
    assert "## Limits" in text
