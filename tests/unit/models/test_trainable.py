"""What `train.trainable` trains and uploads, and that a small upload is the model that was trained."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import pytest
import timm
import torch
from torch import Tensor

from fedmitr_flwr.data import ImageSpec
from fedmitr_flwr.federation.uploads.layout import Layout
from fedmitr_flwr.models import lora
from fedmitr_flwr.models.build import build_model, outline
from fedmitr_flwr.models.lora import add_adapters, check_peft, merge_adapters
from fedmitr_flwr.models.trainable import CompletedState, TrainedPart, adapter_names, freeze, rate_factor, trained_part
from fedmitr_flwr.models.vit import forward_images, forward_tokens, leading_tokens
from fedmitr_flwr.settings import ModelSettings, Settings, SettingsError, TrainSettings
from fedmitr_flwr.training.optimizer import make_optimizer
from tests.unit.tiny import SIZE, tiny_vit

VIT_S = ModelSettings(name="vit_small_patch14_dinov2", options="")


def part_of(model: torch.nn.Module, value: str, **more: float) -> TrainedPart:
    return trained_part(TrainSettings(trainable=value, **more), model.state_dict())


def share(model: torch.nn.Module, value: str) -> float:
    state = model.state_dict()
    return Layout.of(part_of(model, value).uploaded(state)).size("fp32") / Layout.of(state).size("fp32")


def pixels(seed: int = 0) -> Tensor:
    return torch.randn(3, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def random_adapters(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(0.0, 0.1, generator=generator)


def test_an_upload_of_two_blocks_of_a_vit_s_is_at_most_a_fifth_of_all_weights():
    model = outline(VIT_S)
    assert model is not None
    assert share(model, "all") == 1.0
    assert 0.1 < share(model, "last-2") <= 0.2
    assert share(model, "lora") < 0.1
    assert share(model, "head") < 0.03


@pytest.mark.parametrize(
    ("value", "names", "frozen"),
    [
        ("head", {"head.weight", "head.bias"}, 2),
        ("last-1", {"blocks.1", "norm", "head"}, 1),
        ("last-2", {"blocks.0", "blocks.1", "norm", "head"}, 0),
    ],
)
def test_the_last_blocks_are_uploaded_with_norm_and_head(value: str, names: set[str], frozen: int):
    model = tiny_vit()
    part = part_of(model, value)
    wanted = [
        name for name in model.state_dict() if any(name == start or name.startswith(f"{start}.") for start in names)
    ]
    assert list(part.trained) == wanted
    assert (part.frozen_blocks, part.whole, part.adapted) == (frozen, False, ())


def test_all_is_the_whole_state():
    model = tiny_vit()
    part = part_of(model, "all")
    assert part.changed == tuple(model.state_dict())
    assert part.whole


def test_a_distilled_deit_uploads_both_heads():
    model = timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, depth=1, num_classes=3)
    assert {name.split(".")[0] for name in part_of(model, "head").trained} == {"head", "head_dist"}


def test_adapters_belong_to_every_matrix_of_every_block():
    model = tiny_vit()
    part = part_of(model, "lora", lora_rank=2, lora_alpha=3.0)
    maps = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert part.adapted == tuple(f"blocks.{block}.{name}.weight" for block in range(2) for name in maps)
    assert part.scale == 1.5
    uploaded = part.uploaded(model.state_dict())
    down, up = adapter_names("blocks.0.attn.qkv.weight")
    assert (uploaded[down].shape, uploaded[up].shape) == ((2, 24), (72, 2))
    assert set(part.trained) == {"norm.weight", "norm.bias", "head.weight", "head.bias"}


def test_both_input_maps_of_a_swiglu_are_adapted():
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        depth=1,
        mlp_layer=timm.layers.SwiGLU,
        num_classes=3,
        embed_dim=24,
        num_heads=3,
    )
    part = part_of(model, "lora", lora_rank=2)
    assert {"blocks.0.mlp.fc1_g.weight", "blocks.0.mlp.fc1_x.weight"} <= set(part.adapted)
    assert set(add_adapters(model, part, 0).targeted_module_names) == {
        name.removesuffix(".weight") for name in part.adapted
    }


@pytest.mark.parametrize("value", ["last-13", "last-999"])
def test_more_blocks_than_the_model_has_are_refused_with_their_number(value: str):
    model = outline(VIT_S)
    assert model is not None
    with pytest.raises(
        SettingsError, match=f'train.trainable = "{value}": the model has 12 blocks; must be .* 1 to 12'
    ):
        part_of(model, value)
    part_of(model, "last-12")


def test_a_rank_above_the_width_is_refused():
    with pytest.raises(SettingsError, match=r"train\.lora-rank = 25: must be at most 24"):
        part_of(tiny_vit(), "lora", lora_rank=25)


@pytest.mark.parametrize(
    "value", ["last-0", "last-", "last-01", "last--1", "last-1.5", "last-99999", "LAST-2", "blocks", "", "last-2\n"]
)
def test_a_value_of_no_known_kind_is_refused_with_the_settings(value: str):
    with pytest.raises(SettingsError, match=r"train\.trainable = "):
        Settings().replace(**{"train.trainable": value})


@pytest.mark.parametrize("decay", [0.0, 1.1, -0.5])
def test_the_decay_lies_between_zero_and_one(decay: float):
    with pytest.raises(SettingsError, match=r"train\.layer-decay"):
        Settings().replace(**{"train.layer-decay": decay})


def test_frozen_parameters_get_no_gradient_and_frozen_blocks_no_dropout():
    model = tiny_vit()
    part = part_of(model, "last-1")
    freeze(model, part)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == set(part.trained)
    assert [block.training for block in model.blocks] == [False, True]
    assert not any(module.training for module in (model.patch_embed, model.pos_drop, model.norm_pre))
    assert model.head_drop.training
    freeze(model, part_of(model, "all"))
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("blocks", [0, 1, 2])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_a_forward_pass_can_be_cut_after_any_block(name: str, blocks: int):
    spec = ImageSpec(("a", "b"), 1, SIZE, (0.5,), (0.5,))
    model = build_model(ModelSettings(name=name, options="patch_size=4,embed_dim=24,depth=2,num_heads=3"), spec).eval()
    images = pixels()
    whole, tokens = forward_images(model, images), leading_tokens(model, images, blocks)
    assert torch.equal(forward_tokens(model, tokens, blocks).logits, whole.logits)
    assert torch.equal(forward_tokens(model, tokens, blocks).features, whole.features)
    with pytest.raises(ValueError, match="the model takes 16 x 16 pixels"):
        leading_tokens(model, images[..., :8], blocks)


def test_the_learning_rate_falls_from_the_head_to_the_embedding():
    model = tiny_vit(depth=3)
    optimizer, _ = make_optimizer(model, TrainSettings(layer_decay=0.5, learning_rate=0.8, warmup_fraction=0.0), 10)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    decayed = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    expected = {"head": 0.8, "norm": 0.8, "blocks.2": 0.4, "blocks.1": 0.2, "blocks.0": 0.1}
    for name, parameter in model.named_parameters():
        start = ".".join(name.split(".")[:2]) if name.startswith("blocks") else name.split(".")[0]
        assert rates.pop(id(parameter)) == pytest.approx(expected.get(start, 0.05)), name
        assert (decayed[id(parameter)] > 0) == (parameter.ndim > 1)
    assert not rates


def test_the_decay_of_a_part_is_that_of_the_same_weights_in_the_whole():
    model = tiny_vit(depth=3)
    part = part_of(model, "lora", lora_rank=2)
    add_adapters(model, part, 0)
    freeze(model, part)
    optimizer, _ = make_optimizer(model, TrainSettings(layer_decay=0.5, learning_rate=0.8, warmup_fraction=0.0), 10)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.8, 0.8, 0.4, 0.4, 0.2, 0.2, 0.1, 0.1])
    assert rate_factor("blocks.1.attn.qkv.lora_A.default.weight", 3, 0.5) == 0.25
    assert rate_factor("norm_pre.weight", 3, 0.5) == rate_factor("reg_token", 3, 0.5) == 0.0625


def test_without_decay_there_are_two_groups_of_one_rate():
    optimizer, _ = make_optimizer(tiny_vit(), TrainSettings(warmup_fraction=0.0), 10)
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(1e-3, 0.05), (1e-3, 0.0)]


def test_the_adapters_count_in_every_block_of_a_forward_pass():
    model = tiny_vit()
    add_adapters(model, part_of(model, "lora", lora_rank=3), 1)
    plain = forward_images(model, pixels()).logits
    random_adapters(model)
    found = forward_images(model, pixels()).logits
    assert torch.allclose(found, model(pixels()), atol=1e-5)
    assert not torch.allclose(found, plain, atol=1e-2)


def test_a_completed_upload_of_adapters_is_the_model_that_peft_trained():
    model, initial = tiny_vit(), tiny_vit().state_dict()
    part = part_of(model, "lora", lora_rank=3, lora_alpha=7.0)
    adapted = add_adapters(model, part, 1)
    random_adapters(model)
    with torch.no_grad():
        model.head.bias += 1.0
        trained = model(pixels())
    adapters = merge_adapters(model, adapted, part)
    upload = part.cut(model.state_dict(), adapters)
    assert Layout.of(upload) == Layout.of(part.uploaded(initial))
    server = tiny_vit()
    server.load_state_dict(CompletedState(part, upload, initial))
    assert torch.allclose(server(pixels()), trained, atol=1e-5)
    assert torch.allclose(model(pixels()), trained, atol=1e-5)
    assert list(model.state_dict()) == list(initial)


def test_adapters_start_from_a_seed_and_leave_the_global_random_state():
    models, drawn = [tiny_vit() for _ in range(3)], []
    state = torch.get_rng_state()
    for model, seed in zip(models, (1, 1, 2), strict=True):
        part = part_of(model, "lora", lora_rank=3)
        drawn.append(merge_adapters(model, add_adapters(model, part, seed), part)["blocks.0.attn.qkv.lora_A"])
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_weights_that_were_not_trained_are_the_tensors_of_the_initialisation():
    initial = tiny_vit().state_dict()
    part = part_of(tiny_vit(), "last-1")
    upload = part.cut(tiny_vit(seed=1).state_dict(), {})
    state = CompletedState(part, upload, initial)
    assert list(state) == list(initial)
    for name, start in initial.items():
        assert state[name] is (upload[name] if name in part.trained else start)
    with pytest.raises(KeyError):
        state["more"]


def test_a_missing_peft_is_told_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch):
    real = importlib.util.find_spec

    def without_peft(name: str, package: str | None = None) -> ModuleType | None:
        return None if name == "peft" else real(name, package)

    monkeypatch.setattr(lora, "find_spec", without_peft)
    with pytest.raises(SettingsError, match=r'run pip install "fedmitr-flwr\[lora\]"'):
        check_peft()
