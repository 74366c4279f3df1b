"""The bound is of the same run as random images, but for the images."""

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import real_images
from benchmarks.accuracy import settings_for
from benchmarks.federation import Federation
from fedmitr_flwr.data import load_source
from fedmitr_flwr.models.build import build_model
from fedmitr_flwr.pipeline.inputs import Upload
from fedmitr_flwr.pipeline.methods import random_images

SHORT = {
    "model.init": "seeded",
    "model.options": "patch_size=4,embed_dim=24,depth=1,num_heads=2",
    "distill.steps": "2",
    "inversion.images": "30",
    "distill.noise": "100.0",
}


@pytest.fixture(scope="module")
def federation() -> Federation:
    settings = settings_for("digits", "0.1", 44, SHORT)
    source = load_source(settings.data)
    state = build_model(settings.model, source.spec).state_dict()
    return Federation(source, state, [Upload(state, 10, (1,) * 10), Upload(state, 20, (2,) * 10)])


def test_only_the_images_differ_and_each_is_seen_as_it_is(federation: Federation, monkeypatch: pytest.MonkeyPatch):
    pools = {}
    real = random_images.label_patches

    def label(ensemble: Any, patches: torch.Tensor, *more: Any, **named: Any) -> Any:
        pools[len(pools)] = patches
        return real(ensemble, patches, *more, **named)

    monkeypatch.setattr(random_images, "label_patches", label)
    settings = settings_for("digits", "0.1", 44, SHORT)
    results = [real_images.run(federation, settings, images) for images in real_images.IMAGES]
    assert [0 <= result["global"] <= 1 for result in results] == [True, True]
    assert [result["ensemble"] for result in results] == [results[0]["ensemble"]] * 2
    random, own = pools[0], pools[1]
    assert random.shape == own.shape
    train = federation.source.train
    pixels = federation.spec.normalise(train.images(torch.arange(len(train)))).flatten(1)
    assert len(train) < len(own) < 4 * len(train)
    as_they_are, further = own.flatten(1)[: len(train)], own.flatten(1)[len(train) :]
    assert torch.allclose(as_they_are.square().sum(1).sort().values, pixels.square().sum(1).sort().values, rtol=1e-4)
    known = {image.numpy().tobytes() for image in as_they_are}
    assert sum(image.numpy().tobytes() not in known for image in further) > 0.5 * len(further)


def test_what_is_stored_is_not_run_again(
    federation: Federation, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys
):
    accuracies = iter([0.80, 0.85])
    monkeypatch.setattr(real_images, "train_federation", lambda *_: federation)
    monkeypatch.setattr(
        real_images, "run", lambda *_: {"global": next(accuracies), "fedavg": 0.5, "ensemble": 0.9, "hardware": "this"}
    )
    for _ in range(2):
        real_images.main("digits", "0.1", "44", 10, None, tmp_path, tmp_path / "lines.jsonl")
        shown = capsys.readouterr().out
        assert all(number in shown for number in ("50.0", "80.0", "85.0", "+5.0", "90.0"))
    assert len((tmp_path / "lines.jsonl").read_text().splitlines()) == 2
