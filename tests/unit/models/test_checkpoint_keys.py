"""Checkpoints under other names than timm's: prefixes, wrappers, and the names of transformers and torchvision."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from fedmitr_flwr import ImageSpec
from fedmitr_flwr.models.timm_checkpoint import load_checkpoint
from fedmitr_flwr.settings import SettingsError

SPEC = ImageSpec(("a", "b", "c", "d", "e"), 3, 16, (0.5,) * 3, (0.5,) * 3)
SIZES = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "in_chans": 3}


def build(name: str = "vit_tiny_patch16_224", classes: int = 5, **options: object) -> VisionTransformer:
    """A small ViT whose weights are all random."""
    model = timm.create_model(name, **{**SIZES, "num_classes": classes, **options}).eval()
    draws = torch.Generator().manual_seed(classes)
    for value in model.state_dict().values():
        value.add_(0.1 * torch.randn(value.shape, generator=draws))
    return model


def write(path: Path, state: dict[str, Tensor]) -> str:
    save_file({key: value.contiguous().clone() for key, value in state.items()}, path)
    return f"file:{path}"


def load(init: str, name: str = "vit_tiny_patch16_224", *, replace_head: bool = False, **options: object) -> Callable:
    """The model that a checkpoint gives, after its own random weights were replaced."""
    model = timm.create_model(name, **{**SIZES, "num_classes": 5, **options}).eval()
    model.load_state_dict(load_checkpoint(init, model, SPEC, replace_head=replace_head))
    return model


def same_logits(one: Callable, other: Callable, tolerance: float = 1e-5) -> None:
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(one(images), other(images), rtol=tolerance, atol=tolerance)
        assert other(images).std() > 0.01


@pytest.mark.parametrize(
    "rename",
    [
        pytest.param(lambda key: f"_orig_mod.{key}", id="compiled"),
        pytest.param(lambda key: f"module._orig_mod.{key}", id="compiled-and-parallel"),
        pytest.param(lambda key: f"state_dict.model.{key}", id="flat"),
        pytest.param(lambda key: f"net.vision.encoder.{key}", id="any-words"),
        pytest.param(lambda key: f"0.{key}", id="sequential"),
        pytest.param(lambda key: re.sub(r"(blocks\.\d+)\.", r"\1._orig_mod.", key), id="compiled-blocks"),
        pytest.param(lambda key: f"_fsdp_wrapped_module.{key}".replace(".attn.", ".attn.module."), id="fsdp"),
        pytest.param(
            lambda key: "model." + re.sub(r"(blocks\.\d+)\.", r"\1._checkpoint_wrapped_module.", key), id="checkpointed"
        ),
        pytest.param(lambda key: key if key.startswith("head") else f"backbone.{key}", id="head-above"),
        pytest.param(lambda key: f"model.{key}" if key.startswith("head") else f"model.vit.{key}", id="head-between"),
    ],
)
def test_a_common_prefix_and_the_words_of_wrappers_are_removed(rename: Callable[[str], str], tmp_path: Path) -> None:
    model = build()
    init = write(tmp_path / "w.safetensors", {rename(key): value for key, value in model.state_dict().items()})
    same_logits(load(init), model, 0.0)


def test_weights_outside_of_the_prefix_are_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "fedmitr.models")
    model = build()
    state = {f"visual.trunk.{key}": value for key, value in model.state_dict().items()}
    state |= {"text.ln.weight": torch.ones(4), "logit_scale": torch.zeros(1)}
    same_logits(load(write(tmp_path / "w.safetensors", state)), model, 0.0)
    assert "the prefix visual.trunk. of its keys is removed" in caplog.text
    assert "2 other weights are not used, such as" in caplog.text


def test_a_head_inside_the_prefix_counts_and_not_one_above(tmp_path: Path) -> None:
    model = build()
    state = {f"backbone.{key}": value for key, value in model.state_dict().items()}
    for above in ({"head.weight": torch.zeros(5, 32), "head.bias": torch.zeros(5)}, {}):
        same_logits(load(write(tmp_path / "w.safetensors", {**above, **state})), model, 0.0)


def test_several_models_in_one_file_are_refused(tmp_path: Path) -> None:
    state = build().state_dict()
    both = {f"{who}.backbone.{key}": value for who in ("student", "teacher") for key, value in state.items()}
    with pytest.raises(SettingsError, match=r"several models \(student\.backbone\.\*, teacher\.backbone\.\*\)"):
        load(write(tmp_path / "w.safetensors", both))


def transformers_4(key: str) -> str:
    """The name that version 4 of transformers gives a weight, and that version 5 writes to its files."""
    for pattern, name in (
        (r"^(head)\.", "classifier."),
        (r"^(head_dist)\.", "distillation_classifier."),
        (r"^cls_token", "vit.embeddings.cls_token"),
        (r"^dist_token", "vit.embeddings.distillation_token"),
        (r"^pos_embed", "vit.embeddings.position_embeddings"),
        (r"^patch_embed\.proj", "vit.embeddings.patch_embeddings.projection"),
        (r"^norm\.", "vit.layernorm."),
        (r"\.norm1\.", ".layernorm_before."),
        (r"\.norm2\.", ".layernorm_after."),
        (r"\.attn\.proj\.", ".attention.output.dense."),
        (r"\.attn\.(query|key|value)\.", r".attention.attention.\1."),
        (r"\.mlp\.fc1\.", ".intermediate.dense."),
        (r"\.mlp\.fc2\.", ".output.dense."),
        (r"^blocks\.", "vit.encoder.layer."),
    ):
        key = re.sub(pattern, name, key)
    return key


def transformers_5(key: str) -> str:
    """The name in the state dict of version 5."""
    key = transformers_4(key).replace(".encoder.layer.", ".layers.")
    for old, new in (
        (".attention.output.dense.", ".attention.o_proj."),
        (".intermediate.dense.", ".mlp.fc1."),
        (".output.dense.", ".mlp.fc2."),
        (".attention.attention.query.", ".attention.q_proj."),
        (".attention.attention.key.", ".attention.k_proj."),
        (".attention.attention.value.", ".attention.v_proj."),
    ):
        key = key.replace(old, new)
    return key


def as_transformers(state: dict[str, Tensor], name: Callable[[str], str]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        if ".qkv." in key:
            parts = zip(("query", "key", "value"), value.chunk(3), strict=True)
            found |= {name(key.replace("qkv", part)): rows for part, rows in parts}
        else:
            found[name(key)] = value
    return found


@pytest.mark.parametrize("name", [transformers_4, transformers_5])
@pytest.mark.parametrize("prefix", ["vit.", "", "model.vit.", "module."])
def test_the_names_of_transformers_give_the_logits_of_timm(
    name: Callable[[str], str], prefix: str, tmp_path: Path
) -> None:
    model = build()
    state = as_transformers(model.state_dict(), name)
    assert "vit.embeddings.patch_embeddings.projection.weight" in state
    outer = prefix.removesuffix("vit.")
    state = {outer + (key if prefix.endswith("vit.") else key.removeprefix("vit.")): v for key, v in state.items()}
    same_logits(load(write(tmp_path / "w.safetensors", state | {f"{prefix}pooler.dense.bias": torch.ones(32)})), model)


def test_a_distilled_model_of_transformers_keeps_both_of_its_heads(tmp_path: Path) -> None:
    model = build("deit_tiny_distilled_patch16_224")
    state = as_transformers(model.state_dict(), lambda key: transformers_4(key).replace("vit.", "deit.", 1))
    state = {re.sub(r"^classifier", "cls_classifier", key): value for key, value in state.items()}
    same_logits(load(write(tmp_path / "w.safetensors", state), "deit_tiny_distilled_patch16_224"), model)


def test_a_folder_of_transformers_tells_its_classes_and_heads(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = build()
    write(tmp_path / "model.safetensors", as_transformers(model.state_dict(), transformers_4))
    config = {"num_attention_heads": 2, "hidden_act": "gelu", "id2label": {"1": "b", "0": "a", "2": "c"}}
    config["id2label"] |= {"3": "d", "4": "e"}
    for labels, kept in ((config["id2label"], True), ({str(n): f"LABEL_{n}" for n in range(5)}, True), ({}, False)):
        labels = labels or {str(n): name for n, name in enumerate("edcba")}
        (tmp_path / "config.json").write_text(json.dumps(config | {"id2label": labels}))
        found = load(f"file:{tmp_path}", replace_head=True).state_dict()
        assert torch.equal(found["head.weight"], model.state_dict()["head.weight"]) == kept
    for key, value, message in (
        ("num_attention_heads", 4, "num_heads: 4 in config.json, 2 in the model"),
        ("hidden_act", "quick_gelu", "hidden_act: quick_gelu in config.json, gelu in the model"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(SettingsError, match=re.escape(message)):
            load(f"file:{tmp_path}")


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_vit_of_torchvision_gives_the_same_logits(prefix: str, tmp_path: Path) -> None:
    model = torchvision.models.VisionTransformer(16, 4, 2, 2, 32, 128, num_classes=5).eval()
    for value in model.state_dict().values():
        value.add_(0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(value.numel())))
    state = {prefix + key: value for key, value in model.state_dict().items()}
    same_logits(load(write(tmp_path / "w.safetensors", state)), model)


def test_layer_scale_of_dinov2_is_converted(tmp_path: Path) -> None:
    model = build("vit_small_patch14_dinov2")

    def name(key: str) -> str:
        key = re.sub(r"\.ls([12])\.gamma", r".layer_scale\1.lambda1", transformers_5(key))
        key = key.replace("layernorm_before", "norm1").replace("layernorm_after", "norm2")
        return key.replace(".layers.", ".encoder.layer.")

    state = as_transformers(model.state_dict(), name) | {"vit.embeddings.mask_token": torch.zeros(1, 32)}
    same_logits(load(write(tmp_path / "w.safetensors", state), "vit_small_patch14_dinov2"), model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {f"trunk_{k}": v for k, v in s.items()}, "the file has the keys trunk_blocks.0.attn.proj.bias, "),
        (
            lambda s: {k.replace("attn.qkv", "attention.in"): v for k, v in s.items()},
            r"blocks.0.attn.qkv.weight: absent in the file",
        ),
        (lambda s: s | {"norm.bias": torch.ones(32, dtype=torch.int8)}, r"norm.bias is torch.int8"),
        (lambda s: {k: v for k, v in s.items() if not k.startswith("head")}, r"the file has no classifier head \(head"),
        (lambda s: s | {"head.weight": torch.ones(7, 32)}, r"head.weight is \(7, 32\) in the file and \(5, 32\)"),
        (lambda s: s | {"head.weight": torch.ones(5, 64)}, r"head.weight: \(5, 64\) in the file, \(5, 32\) in the"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_with_keys_of_the_file(
    change: Callable, message: str, tmp_path: Path
) -> None:
    init = write(tmp_path / "w.safetensors", change(build().state_dict()))
    with pytest.raises(SettingsError, match=message) as caught:
        load(init)
    assert "; the file has the keys " in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_replaced_head_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    init = write(tmp_path / "w.safetensors", build(classes=7).state_dict())
    load(init, replace_head=True)
    assert "the classifier head is replaced by a new one (the classifier head head.weight is (7, 32)" in caplog.text
