"""Local training of a part of the weights: the rest stays, and all weights train as they did before."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from fedmitr_flwr.data import load_source
from fedmitr_flwr.models.build import build_model
from fedmitr_flwr.models.trainable import CompletedState, trained_part
from fedmitr_flwr.models.vit import forward_images
from fedmitr_flwr.models.weights import seed_weights
from fedmitr_flwr.settings import DataSettings, ModelSettings, Settings, SettingsError, TrainSettings
from fedmitr_flwr.training import local
from fedmitr_flwr.training.augment import augment
from fedmitr_flwr.training.client import train_client
from fedmitr_flwr.training.initial import initial_state
from fedmitr_flwr.training.local import LocalResult, class_targets, total_steps, train_local
from fedmitr_flwr.training.optimizer import WarmupCosine
from fedmitr_flwr.training.upload import ClientTask

SOURCE = load_source(DataSettings(source="digits"))
IMAGES = SOURCE.train.subset(np.arange(40))
OPTIONS = "patch_size=4,embed_dim=32,depth=3,num_heads=2"
DROPOUT = f"{OPTIONS},drop_path_rate=0.3,proj_drop_rate=0.1,patch_drop_rate=0.3"
CPU = torch.device("cpu")
PARTS = ["head", "last-1", "last-3", "lora"]


def fresh(options: str = OPTIONS) -> nn.Module:
    model = build_model(ModelSettings(options=options), SOURCE.spec)
    seed_weights(model, 0)
    return model


def train(model: nn.Module, **settings: object) -> LocalResult:
    chosen = TrainSettings(**{"min_steps": 6, "batch_size": 16, "lora_rank": 4, **settings})
    return train_local(model, IMAGES, SOURCE.spec, chosen, seed=3, device=CPU)


def by_the_book(model: nn.Module, settings: TrainSettings, seed: int) -> None:
    """The training loop of all weights, without any notion of a frozen part."""
    targets, prior = class_targets(torch.from_numpy(IMAGES.histogram(10)), settings)
    model.train()
    steps = total_steps(len(IMAGES), settings)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, fused=True)
    schedule = WarmupCosine(steps, round(settings.warmup_fraction * steps))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    order = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        queue = torch.empty(0, dtype=torch.int64)
        for _ in range(steps):
            if len(queue) < settings.batch_size:
                queue = torch.cat([queue, torch.randperm(len(IMAGES), generator=order)])
            chosen, queue = queue[: settings.batch_size], queue[settings.batch_size :]
            x = augment(SOURCE.spec.normalise(IMAGES.images(chosen)), settings.augment, order)
            logits = forward_images(model, x).logits
            loss = nn.functional.cross_entropy(logits + prior, targets[torch.from_numpy(IMAGES.labels)[chosen]])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
    model.eval()


@pytest.mark.parametrize("options", [OPTIONS, DROPOUT])
@pytest.mark.parametrize("kind", ["none", "shift"])
def test_all_weights_train_bit_for_bit_as_without_parts(options: str, kind: str):
    found, expected = fresh(options), fresh(options)
    result = train(found, augment=kind)
    by_the_book(expected, TrainSettings(min_steps=6, batch_size=16, augment=kind), 3)
    state = expected.state_dict()
    assert [name for name, value in found.state_dict().items() if not torch.equal(value, state[name])] == []
    assert result.adapters == {}


@pytest.mark.parametrize("value", PARTS)
def test_what_is_not_trained_stays_bit_for_bit(value: str):
    model, initial = fresh(DROPOUT), fresh(DROPOUT).state_dict()
    part = trained_part(TrainSettings(trainable=value, lora_rank=4), initial)
    train(model, trainable=value)
    state = model.state_dict()
    assert {name for name in initial if not torch.equal(state[name], initial[name])} == set(part.changed)
    assert list(state) == list(initial)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not model.training


@pytest.mark.parametrize("value", [*PARTS, "all"])
def test_the_upload_completed_by_the_server_is_the_client_s_model(value: str):
    model, initial = fresh(), fresh().state_dict()
    result = train(model, trainable=value)
    part = trained_part(TrainSettings(trainable=value, lora_rank=4), initial)
    state = CompletedState(part, part.cut(model.state_dict(), result.adapters), initial)
    assert all(torch.allclose(state[name], value, atol=1e-6) for name, value in model.state_dict().items())


@pytest.mark.parametrize("value", PARTS)
def test_the_same_seed_gives_the_same_upload(value: str):
    torch.manual_seed(1)
    first, second = fresh(DROPOUT), fresh(DROPOUT)
    one = train(first, trainable=value)
    torch.manual_seed(2)
    two = train(second, trainable=value)
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    assert all(torch.equal(value, two.adapters[name]) for name, value in one.adapters.items())


@pytest.mark.parametrize("value", ["head", "last-1"])
def test_without_augmentation_the_frozen_blocks_run_once_for_each_image(value: str, monkeypatch: pytest.MonkeyPatch):
    kept, seen = fresh(), []
    handle = kept.blocks[0].register_forward_hook(lambda module, args, output: seen.append(len(output)))
    train(kept, trainable=value, augment="none", min_steps=20)
    handle.remove()
    assert sum(seen) <= len(IMAGES) + 16  # a batch that begins an epoch can hold an image twice
    monkeypatch.setattr(local, "CACHE_BYTES", 0)
    again = fresh()
    train(again, trainable=value, augment="none", min_steps=20)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(kept.parameters(), again.parameters(), strict=True))


def test_the_frozen_part_runs_without_autograd_and_without_dropout():
    model = fresh(DROPOUT)
    found = []
    handle = model.blocks[1].register_forward_hook(lambda module, args, output: found.append(output))
    train(model, trainable="last-1", augment="none", min_steps=1, learning_rate=1e-9)
    handle.remove()
    assert not any(tokens.requires_grad for tokens in found)
    assert found[0].shape[1] == 1 + 4  # patch dropout would leave fewer


def test_blocks_that_the_model_lacks_are_refused_before_training():
    model = fresh()
    with pytest.raises(SettingsError, match=r'train\.trainable = "last-4": the model has 3 blocks'):
        train(model, trainable="last-4")


def test_a_failed_training_leaves_a_plain_model(monkeypatch: pytest.MonkeyPatch):
    def broken(*args: object) -> None:
        raise ValueError("no memory")

    monkeypatch.setattr(local, "forward_tokens", broken)
    model = fresh()
    with pytest.raises(ValueError, match="no memory"):
        train(model, trainable="lora")
    assert list(model.state_dict()) == list(fresh().state_dict())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("value", [*PARTS, "all"])
def test_a_client_uploads_what_its_settings_name(value: str):
    changes = {"data.source": "digits", "model.init": "seeded", "model.options": OPTIONS, "train.min-steps": 2}
    changes |= {"train.max-steps": 2, "partition.alpha": 100.0, "train.trainable": value, "train.lora-rank": 4}
    settings = Settings().replace(**changes)
    initial = initial_state(settings, SOURCE.spec)
    upload = train_client(ClientTask(settings, SOURCE.spec, 1, initial), {"partition-id": 1, "num-partitions": 4}, "a")
    assert upload is not None
    expected = trained_part(settings.train, initial).uploaded(initial)
    assert {name: tensor.shape for name, tensor in upload.state.items()} == {n: t.shape for n, t in expected.items()}
    assert math.isfinite(upload.loss)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", ["none", "shift"])
@pytest.mark.parametrize("value", PARTS)
def test_a_part_trains_on_a_gpu(value: str, kind: str):
    model, initial = fresh(), fresh().state_dict()
    settings = TrainSettings(trainable=value, augment=kind, min_steps=6, batch_size=16, lora_rank=4)
    result = train_local(model, IMAGES, SOURCE.spec, settings, seed=3, device=torch.device("cuda"))
    state = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    changed = {name for name in initial if not torch.equal(state[name], initial[name])}
    assert changed == set(trained_part(settings, initial).changed)
    assert all(not tensor.is_cuda for tensor in result.adapters.values())
