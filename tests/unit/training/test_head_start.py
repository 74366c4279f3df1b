"""A client's classifier head can start from a discriminant that is comparable with those of other clients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedmitr_flwr.data import load_spec
from fedmitr_flwr.models.feature_prior import FeaturePrior
from fedmitr_flwr.models.moments import Moments
from fedmitr_flwr.settings import Settings, SettingsError
from fedmitr_flwr.stages.feature_prior import feature_prior
from fedmitr_flwr.training import head_start
from fedmitr_flwr.training.client import train_client
from fedmitr_flwr.training.head_start import discriminant
from fedmitr_flwr.training.initial import initial_state
from fedmitr_flwr.training.upload import ClientTask

C, D = 4, 6
SETTINGS = Settings().replace(
    **{
        "data.source": "digits",
        "model.init": "seeded",
        "model.options": "patch_size=2,embed_dim=32,depth=1,num_heads=2",
        "train.epochs": 0,
        "train.min-steps": 0,
        "partition.alpha": 100.0,
        "train.head-start": "discriminant",
    }
)


def prior() -> FeaturePrior:
    draws = torch.randn(500, D, generator=torch.Generator().manual_seed(9)) @ torch.diag(torch.arange(1.0, D + 1))
    return FeaturePrior.of_features([draws[:200], draws[200:] + 3])


def client(seed: int, labels: list[int]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.tensor(labels)
    return torch.randn(len(y), D, generator=generator) + y[:, None], y


def test_the_prior_is_the_covariance_within_the_families_of_random_images() -> None:
    families = [torch.randn(100, D) + 5 * k for k in range(3)]
    found = FeaturePrior.of_features(families)
    within = sum(torch.cov(part.T, correction=0) for part in families) / 3
    torch.testing.assert_close(found.covariance, within, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(FeaturePrior.from_tensors(found.tensors()).mean, torch.cat(families).mean(0))


def test_heads_of_clients_with_other_classes_average_to_the_discriminant_of_all_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(head_start, "PRIOR_IMAGES", 1e12)
    monkeypatch.setattr(head_start, "MEAN_IMAGES", 1e-9)
    parts = [client(1, [0] * 30 + [1] * 10), client(2, [2] * 20 + [3] * 5), client(3, [1] * 15 + [3] * 40)]
    moments = [Moments.of_features(x, y, C) for x, y in parts]
    heads = torch.stack([discriminant(own, prior())[0] for own in moments])
    counts = torch.stack([own.counts for own in moments]).float()
    merged = (heads * (counts / counts.sum(0))[..., None]).sum(0)
    everything = Moments.of_features(torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts]), C)
    torch.testing.assert_close(merged, discriminant(everything, prior())[0], rtol=1e-3, atol=1e-5)


def test_the_bias_puts_the_boundary_halfway_between_two_means(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_start, "MEAN_IMAGES", 1e-9)
    x, y = client(1, [0] * 50 + [1] * 50)
    weight, bias = discriminant(Moments.of_features(x, y, 2), prior())
    halfway = (x[y == 0].mean(0) + x[y == 1].mean(0)) / 2
    scores = weight @ halfway + bias
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-3, atol=1e-4)


def test_a_class_without_images_has_the_score_of_the_mean_image() -> None:
    x, y = client(4, [0] * 7 + [1] * 9)
    weight, bias = discriminant(Moments.of_features(x, y, C), prior())
    torch.testing.assert_close(weight[2], weight[3])
    torch.testing.assert_close(bias[2], bias[3])
    scores = x @ weight.T + bias
    assert float((scores.argmax(1) == y).float().mean()) > 0.8


def test_one_image_is_enough() -> None:
    weight, bias = discriminant(Moments.of_features(torch.randn(1, D), torch.tensor([2]), C), prior())
    assert bool(torch.isfinite(weight).all())
    assert bool(torch.isfinite(bias).all())


def test_a_client_that_trains_no_step_uploads_its_discriminant() -> None:
    spec = load_spec(SETTINGS.data)
    initial = initial_state(SETTINGS, spec)
    found = feature_prior(SETTINGS, spec, initial, torch.device("cpu"), images=20)
    node = {"partition-id": 1, "num-partitions": 4}
    started = train_client(ClientTask(SETTINGS, spec, 1, initial, found), node, "partition-1")
    plain = train_client(ClientTask(SETTINGS, spec, 1, initial), node, "partition-1")
    assert started is not None
    assert plain is not None
    changed = {name for name in initial if not torch.equal(started.state[name], plain.state[name])}
    assert changed == {"head.weight", "head.bias"}
    assert started.moments is None


def test_the_prior_depends_on_the_seed_alone() -> None:
    spec = load_spec(SETTINGS.data)
    initial = initial_state(SETTINGS, spec)
    first, again = (feature_prior(SETTINGS, spec, initial, torch.device("cpu"), images=20) for _ in range(2))
    torch.testing.assert_close(first.covariance, again.covariance, rtol=0, atol=0)


def test_a_model_with_two_heads_is_refused() -> None:
    settings = SETTINGS.replace(**{"model.name": "deit_tiny_distilled_patch16_224"})
    spec = load_spec(settings.data)
    with pytest.raises(SettingsError, match=r"train\.head-start"):
        feature_prior(settings, spec, initial_state(settings, spec), torch.device("cpu"), images=2)
