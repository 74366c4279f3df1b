import dataclasses

import pytest
import torch

from fedmitr_flwr.data import load_spec
from fedmitr_flwr.models.build import build_model
from fedmitr_flwr.settings import DataSettings, Settings
from fedmitr_flwr.training import glyphs
from fedmitr_flwr.training.initial import initial_state

SETTINGS = Settings.from_run_config(
    {
        "data.source": "digits",
        "model.options": "patch_size=4,embed_dim=32,depth=2,num_heads=2",
        "model.glyph-images": 2048,
        "model.glyph-epochs": 1,
    }
)
SPEC = load_spec(SETTINGS.data)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDMITR_CACHE", str(tmp_path))
    return tmp_path


def test_letters_are_rendered_evenly_without_digits():
    images, labels = glyphs.render_letters(370, 28, seed=0)
    assert images.shape == (370, 1, 28, 28)
    assert labels.bincount().tolist() == [10] * len(glyphs.LETTERS)
    assert not set(glyphs.LETTERS) & set("0123456789")
    assert bool((images.flatten(1).amax(1) > 200).all())
    assert torch.equal(images, glyphs.render_letters(370, 28, seed=0)[0])


def test_initialisation_is_made_once_and_then_comes_from_the_cache(cache, monkeypatch):
    first = initial_state(SETTINGS, SPEC)
    assert len(list(cache.glob("initial/glyphs-*.safetensors"))) == 1
    monkeypatch.setattr(glyphs, "pretrain", lambda *_: pytest.fail("trained again"))
    second = initial_state(SETTINGS, SPEC)
    assert all(torch.equal(first[name], second[name]) for name in first)
    build_model(SETTINGS.model, SPEC).load_state_dict(first)


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty"])
def test_a_damaged_initialisation_in_the_cache_is_made_again(cache, damage, caplog):
    first = initial_state(SETTINGS, SPEC)
    path = next(cache.glob("initial/glyphs-*.safetensors"))
    content = path.read_bytes()
    half = len(content) // 2
    flipped = content[:half] + bytes([content[half] ^ 0x40]) + content[half + 1 :]
    path.write_bytes({"flip": flipped, "truncate": content[:1000], "empty": b""}[damage])
    second = initial_state(SETTINGS, SPEC)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert f"the cached initialisation {path} is made again" in caplog.text
    assert path.read_bytes() == content


def test_cache_depends_on_model_seed_and_geometry():
    paths = {
        glyphs.cache_path(settings, spec)
        for settings, spec in [
            (SETTINGS, SPEC),
            (SETTINGS.replace(**{"run.seed": 1}), SPEC),
            (SETTINGS.replace(**{"model.glyph-epochs": 2}), SPEC),
            (SETTINGS, dataclasses.replace(SPEC, image_size=16)),
        ]
    }
    assert len(paths) == 4
    assert glyphs.cache_path(SETTINGS, SPEC) == glyphs.cache_path(SETTINGS.replace(**{"train.epochs": 9}), SPEC)


def test_the_cache_is_not_shared_between_numbers_of_threads(monkeypatch):
    """Sums are taken in another order, and training makes much of little."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    one = glyphs.cache_path(SETTINGS, SPEC)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert glyphs.cache_path(SETTINGS, SPEC) != one


def test_head_has_the_classes_of_the_data_and_the_body_is_trained():
    state = initial_state(SETTINGS, SPEC)
    seeded = initial_state(SETTINGS.replace(**{"model.init": "seeded"}), SPEC)
    assert state["head.weight"].shape[0] == SPEC.num_classes
    assert torch.equal(state["head.weight"], seeded["head.weight"])
    assert not torch.equal(state["blocks.0.attn.qkv.weight"], seeded["blocks.0.attn.qkv.weight"])


def test_colour_letters_have_ink_and_paper():
    images = glyphs.paint(torch.rand(4, 1, 8, 8), 3, torch.Generator().manual_seed(0))
    assert images.shape == (4, 3, 8, 8)
    assert float(images.min()) >= 0.0
    assert float(images.max()) <= 1.0


def test_digits_preset_needs_no_images_for_its_spec():
    assert load_spec(DataSettings(source="mnist-5k")).image_size == 28


def test_patches_with_most_ink_are_found():
    images = torch.zeros(2, 1, 8, 8)
    images[0, 0, :4, 4:], images[0, 0, 4:, :4] = 1.0, 0.5
    images[1, 0, 7, 7], images[1, 0, 0, 0] = 0.2, 0.1
    assert glyphs.inked_patches(images, (4, 4)).tolist() == [[1, 2], [0, 3]]
    assert glyphs.inked_patches(images, (8, 8)).tolist() == [[0], [0]]
