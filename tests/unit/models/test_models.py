from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional as F

from fedmitr_flwr.data import ImageSpec
from fedmitr_flwr.models.build import build_model, parse_options
from fedmitr_flwr.models.vit import forward_images
from fedmitr_flwr.models.weights import seed_weights
from fedmitr_flwr.settings import ModelSettings, Settings, SettingsError
from fedmitr_flwr.training.initial import initial_state

TINY = "patch_size=4,embed_dim=32,depth=2,num_heads=2"


def make_spec(size: int = 16, channels: int = 1, classes: int = 3) -> ImageSpec:
    names = tuple(f"class-{index}" for index in range(classes))
    return ImageSpec(names, channels, size, (0.5,) * channels, (0.25,) * channels)


def make_settings(init: str = "seeded", *, options: str = TINY, name: str = "vit_tiny_patch16_224") -> Settings:
    return Settings(model=ModelSettings(name=name, options=options, init=init))


def test_options_are_parsed_as_numbers_truths_and_words() -> None:
    text = " patch_size=4, mlp_ratio=2.5,qk_norm=true ,pos_embed=none,init_values=1e-5,"
    expected = {"patch_size": 4, "mlp_ratio": 2.5, "qk_norm": True, "pos_embed": "none", "init_values": 1e-5}
    assert parse_options(text) == expected
    assert parse_options("") == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("img_size=32", 'model.options = "img_size=32": img_size is set by the data'),
        ("in_chans=1", "in_chans is set by the data"),
        ("num_classes=10", "num_classes is set by the data"),
        ("dept=4", 'model.options = "dept=4": unknown option dept; did you mean depth?'),
        ("pretrained=true", "unknown option pretrained"),
        ("checkpoint_path=x", "unknown option checkpoint_path"),
        ("depth", 'model.options = "depth": must be key=value'),
        ("depth=", "must be key=value"),
        ("depth=2,depth=3", "depth is given twice"),
    ],
)
def test_a_wrong_option_is_named(text: str, message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        parse_options(text)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "options", "size", "channels"),
    [
        ("vit_tiny_patch16_224", "patch_size=4,embed_dim=64,depth=4,num_heads=4", 28, 1),
        ("vit_tiny_patch16_224", "patch_size=4,embed_dim=64,depth=4,num_heads=4", 32, 3),
        ("deit_tiny_patch16_224", "depth=2", 64, 3),
        ("deit_small_patch16_224", "depth=2", 64, 3),
        ("deit_base_patch16_224", "depth=1", 64, 3),
        ("vit_tiny_patch16_224", "depth=2", 64, 3),
        ("vit_small_patch16_224.augreg_in21k", "depth=2", 64, 3),
        ("vit_base_patch16_224", "depth=1", 64, 3),
        ("vit_small_patch14_dinov2", "depth=2", 56, 3),
        ("vit_small_patch14_reg4_dinov2", "depth=2", 56, 3),
        ("deit3_small_patch16_224", "depth=2", 64, 3),
        ("deit_tiny_distilled_patch16_224", "depth=2", 64, 3),
    ],
)
def test_every_family_is_built_for_the_data_and_seeded(name: str, options: str, size: int, channels: int) -> None:
    spec = make_spec(size, channels, classes=7)
    settings = make_settings(name=name, options=options)
    model = build_model(settings.model, spec)
    model.load_state_dict(initial_state(settings, spec))
    images = torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(0))
    logits = forward_images(model.eval(), images).logits
    torch.testing.assert_close(logits, model(images), atol=1e-5, rtol=0)
    assert logits.shape == (2, 7)
    assert 0.01 < logits.std() < 1.0


def test_building_gives_the_same_weights_and_leaves_the_global_random_state_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = build_model(make_settings().model, make_spec()).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    other = build_model(make_settings().model, make_spec()).state_dict()
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(
    ("name", "options", "size", "message"),
    [
        ("vit_tiny_patch16_224", "", 28, "data.image-size = 28: must be divisible by the patch size 16"),
        ("vit_tiny_patch16_224", "patch_size=5", 28, "data.image-size = 28: must be divisible by the patch size 5"),
        ("vit_tiny_patch16_24", "", 32, "timm model; did you mean vit_tiny_patch16_224"),
        ("vit_tiny_patch16_224.nonsense", "", 32, "Invalid pretrained tag (nonsense)"),
        ("hf-hub:timm/x", "", 32, 'model.name = "hf-hub:timm/x": must be the name of a timm model'),
        ("vit_tiny_patch16_224", "embed_dim=64,num_heads=5", 32, "dim should be divisible by num_heads"),
        ("vit_tiny_patch16_224", "depth=two", 32, 'model.options = "depth=two": vit_tiny_patch16_224 cannot be built'),
        ("vit_tiny_patch16_224", "class_token=false", 32, "Token pooling needs the class token"),
        ("vit_tiny_patch16_224", "global_pool=avg", 32, 'must classify from the [CLS] token (global_pool "token")'),
        ("swin_tiny_patch4_window7_224", "", 28, 'model.name = "swin_tiny_patch4_window7_224": must be a plain'),
        ("resnet18", "", 32, 'model.name = "resnet18": must be a plain timm VisionTransformer, but is a ResNet'),
    ],
)
def test_a_model_that_cannot_be_built_is_one_clear_error(name: str, options: str, size: int, message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        build_model(make_settings(name=name, options=options).model, make_spec(size))
    assert message in str(caught.value)


def test_seeding_depends_on_the_seed_alone() -> None:
    def seeded(seed: int, global_seed: int) -> dict[str, Tensor]:
        model = build_model(make_settings().model, make_spec())
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        with torch.no_grad():
            for weight in model.parameters():
                weight.fill_(float(global_seed))
        seed_weights(model, seed)
        assert torch.equal(torch.get_rng_state(), before)
        return model.state_dict()

    one, same, other = seeded(3, 1), seeded(3, 2), seeded(4, 1)
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not torch.equal(one["blocks.0.attn.qkv.weight"], other["blocks.0.attn.qkv.weight"])


def test_seeded_weights_have_fan_in_scale_and_half_of_it_where_they_write_to_the_residual_stream() -> None:
    model = build_model(make_settings(options="patch_size=4,embed_dim=128,depth=2,num_heads=2").model, make_spec())
    seed_weights(model, 0)
    state = model.state_dict()
    scale = {
        "patch_embed.proj.weight": 16**-0.5,
        "blocks.1.attn.qkv.weight": 128**-0.5,
        "blocks.1.attn.proj.weight": 0.5 * 128**-0.5,
        "blocks.1.mlp.fc1.weight": 128**-0.5,
        "blocks.1.mlp.fc2.weight": 0.5 * 512**-0.5,
        "head.weight": 0.1 * 128**-0.5,
    }
    for key, std in scale.items():
        assert state[key].std().item() == pytest.approx(std, rel=0.1), key
    assert not any(value.any() for key, value in state.items() if key.endswith("bias"))
    assert all((value == 1).all() for key, value in state.items() if "norm" in key and key.endswith("weight"))


@pytest.mark.parametrize("more", ["", ",embed_dim=66,num_heads=3", ",no_embed_class=true,reg_tokens=2"])
def test_seeded_positions_tell_rows_and_columns_apart_and_leave_prefix_tokens_out(more: str) -> None:
    options = "patch_size=4,depth=1" + (more or ",embed_dim=32,num_heads=2")
    options += "" if "embed_dim" in options else ",embed_dim=32,num_heads=2"
    model = build_model(make_settings(options=options).model, make_spec())
    seed_weights(model, 0)
    assert model.pos_embed is not None
    positions = model.pos_embed.detach()[0]
    assert not positions[:-16].any()
    grid = positions[-16:]
    distances = torch.cdist(grid, grid)
    assert (distances + 9 * torch.eye(16)).min() > 0.5
    assert distances[0, 1] < distances[0, 3]  # along a row
    assert distances[0, 4] < distances[0, 12]  # along a column
    assert distances[0, 1].item() == pytest.approx(distances[0, 4].item(), abs=1e-5)


def fit_digits(model: VisionTransformer, steps: int = 60) -> float:
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    labels = torch.tensor(digits.target)
    draws = torch.Generator().manual_seed(0)
    order = torch.randperm(len(images), generator=draws)
    train, test = order[:1400], order[1400:]
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(steps):
        rows = train[torch.randint(len(train), (64,), generator=draws)]
        optimizer.zero_grad()
        F.cross_entropy(forward_images(model, images[rows]).logits, labels[rows]).backward()
        optimizer.step()
    with torch.no_grad():
        return (forward_images(model, images[test]).logits.argmax(1) == labels[test]).float().mean().item()


def test_a_seeded_small_vit_learns_digits_in_sixty_steps_where_timms_weights_do_not() -> None:
    settings = make_settings(options="patch_size=2,embed_dim=64,depth=2,num_heads=4")
    spec = make_spec(8, 1, 10)
    seeded, plain = build_model(settings.model, spec), build_model(settings.model, spec)
    seed_weights(seeded, 0)
    ours, theirs = fit_digits(seeded), fit_digits(plain)
    assert ours > 0.6
    assert ours > theirs + 0.2


def test_a_checkpoint_file_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    saved = initial_state(make_settings(), make_spec())
    saved = {key: value + 1 for key, value in saved.items()}
    for prefix in ("", "module.", "model.", "module.model."):
        save_file({prefix + key: value for key, value in saved.items()}, tmp_path / "weights.safetensors")
        found = initial_state(make_settings(f"file:{tmp_path}/weights.safetensors"), make_spec())
        assert found.keys() == saved.keys()
        assert all(torch.equal(found[key], saved[key]) for key in saved)


def test_a_half_precision_checkpoint_is_read_as_fp32(tmp_path: Path) -> None:
    saved = {key: value.half() for key, value in initial_state(make_settings(), make_spec()).items()}
    save_file(saved, tmp_path / "weights.safetensors")
    found = initial_state(make_settings(f"file:{tmp_path}/weights.safetensors"), make_spec())
    assert {value.dtype for value in found.values()} == {torch.float32}


@pytest.mark.parametrize("change", ["classes", "missing"])
def test_a_head_that_does_not_fit_is_made_anew_and_the_rest_kept(
    change: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="fedmitr")
    saved = {key: value + 1 for key, value in initial_state(make_settings(), make_spec(classes=5)).items()}
    if change == "missing":
        saved = {key: value for key, value in saved.items() if not key.startswith("head.")}
    save_file(saved, tmp_path / "weights.safetensors")
    found = initial_state(make_settings(f"file:{tmp_path}/weights.safetensors"), make_spec(classes=3))
    seeded = initial_state(make_settings(), make_spec(classes=3))
    assert all(torch.equal(found[key], seeded[key] if key.startswith("head.") else saved[key]) for key in found)
    assert "is replaced by a new one" in caplog.text


@pytest.mark.parametrize("names", [["class-1", "class-0", "class-2"], ["class-0", "class-1", "class-2"]])
def test_a_folder_with_other_class_names_lends_no_head(names: list[str], tmp_path: Path) -> None:
    saved = {key: value + 1 for key, value in initial_state(make_settings(), make_spec()).items()}
    save_file(saved, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"label_names": names}))
    found = initial_state(make_settings(f"file:{tmp_path}"), make_spec())
    assert torch.equal(found["head.weight"], saved["head.weight"]) == (names[0] == "class-0")
    assert torch.equal(found["norm.weight"], saved["norm.weight"])


def test_positions_of_another_grid_are_resampled_and_that_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="fedmitr")
    saved = initial_state(make_settings(), make_spec(16))
    save_file(saved, tmp_path / "weights.safetensors")
    found = initial_state(make_settings(f"file:{tmp_path}/weights.safetensors"), make_spec(32))
    assert found["pos_embed"].shape == (1, 65, 32)
    assert torch.equal(found["pos_embed"][:, 0], saved["pos_embed"][:, 0])
    assert "resampled from 4 x 4 to 8 x 8" in caplog.text


def test_a_checkpoint_of_another_architecture_names_the_file_and_the_first_keys(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    save_file(initial_state(make_settings(options=TINY.replace("32", "64")), make_spec()), file)
    with pytest.raises(SettingsError) as caught:
        initial_state(make_settings(f"file:{file}"), make_spec())
    message = str(caught.value)
    assert message.startswith(f'model.init = "file:{file}": {file} does not fit the model')
    assert "cls_token: (1, 1, 64) in the file, (1, 1, 32) in the model" in message
    assert "more" in message


def test_a_checkpoint_with_missing_and_unknown_keys_is_refused(tmp_path: Path) -> None:
    state = initial_state(make_settings(), make_spec())
    state["extra"] = state.pop("norm.bias")
    save_file(state, tmp_path / "weights.safetensors")
    with pytest.raises(SettingsError, match=r"norm\.bias: absent in the file.*extra: .* absent in the model"):
        initial_state(make_settings(f"file:{tmp_path}/weights.safetensors"), make_spec())


def test_a_checkpoint_with_another_number_of_heads_is_refused(tmp_path: Path) -> None:
    save_file(initial_state(make_settings(), make_spec()), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_args": {"num_heads": 4}}))
    with pytest.raises(SettingsError, match=r"num_heads: 4 in config\.json, 2 in the model"):
        initial_state(make_settings(f"file:{tmp_path}"), make_spec())


def test_a_checkpoint_with_infinite_values_is_refused(tmp_path: Path) -> None:
    state = initial_state(make_settings(), make_spec())
    state["norm.bias"][0] = float("inf")
    save_file(state, tmp_path / "weights.safetensors")
    with pytest.raises(SettingsError, match="not finite"):
        initial_state(make_settings(f"file:{tmp_path}/weights.safetensors"), make_spec())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("weights.pth", b"", "must name a .safetensors file"),
        ("absent.safetensors", None, "must name a .safetensors file"),
        ("broken.safetensors", b"not safetensors at all", "cannot be read as safetensors"),
        ("", None, "must name a .safetensors file"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SettingsError) as caught:
        initial_state(make_settings(f"file:{tmp_path / name}"), make_spec())
    assert str(caught.value).startswith(f'model.init = "file:{tmp_path / name}"')
    assert message in str(caught.value)


def test_a_broken_configuration_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(SettingsError, match=r"config\.json is not valid JSON"):
        initial_state(make_settings(f"file:{tmp_path}"), make_spec())


def hub_weights(monkeypatch: pytest.MonkeyPatch, weights: dict[str, Tensor]) -> None:
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_, **__: dict(weights))


def test_pretrained_weights_are_adapted_by_timm_and_get_a_seeded_head(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    weights = timm.create_model("vit_tiny_patch16_224", depth=1).state_dict()
    hub_weights(monkeypatch, weights)
    settings = make_settings("pretrained", options="depth=1")
    spec = make_spec(64, channels=1, classes=7)
    found = initial_state(settings, spec)
    assert found["head.weight"].shape == (7, 192)
    assert torch.equal(found["head.weight"], initial_state(make_settings(options="depth=1"), spec)["head.weight"])
    assert found["pos_embed"].shape == (1, 17, 192)
    torch.testing.assert_close(found["patch_embed.proj.weight"], weights["patch_embed.proj.weight"].sum(1, True))
    assert torch.equal(found["blocks.0.mlp.fc1.weight"], weights["blocks.0.mlp.fc1.weight"])
    assert "data.std = 0.5,0.5,0.5" in caplog.text


def test_pretrained_weights_that_do_not_fit_the_options_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    hub_weights(monkeypatch, timm.create_model("vit_tiny_patch16_224", depth=1).state_dict())
    with pytest.raises(SettingsError, match="timm's weights do not fit"):
        initial_state(make_settings("pretrained", options="depth=1,embed_dim=96"), make_spec(64, 3))


def test_without_a_network_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("no connection")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", offline)
    with pytest.raises(SettingsError) as caught:
        initial_state(make_settings("pretrained", options="depth=1"), make_spec(64, 3))
    assert str(caught.value).startswith('model.init = "pretrained": the weights of vit_tiny_patch16_224 are neither')
    assert "model.init = file:PATH" in str(caught.value)


def test_the_glyph_initialisation_is_left_to_its_module(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = {"head.bias": torch.zeros(3)}
    monkeypatch.setitem(sys.modules, "fedmitr_flwr.training.glyphs", SimpleNamespace(glyph_state=lambda *_: expected))
    assert initial_state(make_settings("glyphs"), make_spec()) is expected


@pytest.mark.parametrize(("width", "fused"), [(64, False), (128, True)])
def test_narrow_heads_have_their_attention_in_plain_products(width: int, fused: bool) -> None:
    settings = ModelSettings(name="vit_tiny_patch16_224", options=f"patch_size=4,embed_dim={width},depth=2,num_heads=4")
    spec = ImageSpec(("a", "b"), 1, 28, (0.5,), (0.5,))
    assert [block.attn.fused_attn for block in build_model(settings, spec).blocks] == [fused, fused]
