import numpy as np
import pytest
import torch

from fedmitr_flwr.data import load_source
from fedmitr_flwr.models.build import build_model
from fedmitr_flwr.models.weights import seed_weights
from fedmitr_flwr.settings import DataSettings, ModelSettings, TrainSettings
from fedmitr_flwr.training.local import class_targets, total_steps, train_local
from fedmitr_flwr.training.optimizer import WarmupCosine

SOURCE = load_source(DataSettings(source="digits"))
MODEL = ModelSettings(options="patch_size=4,embed_dim=32,depth=2,num_heads=2")
CPU = torch.device("cpu")


def fresh():
    model = build_model(MODEL, SOURCE.spec)
    seed_weights(model, 0)
    return model


def train(rows, seed=0, **settings):
    model = fresh()
    images = SOURCE.train.subset(np.asarray(rows))
    result = train_local(model, images, SOURCE.spec, TrainSettings(**settings), seed=seed, device=CPU)
    return model, result


def test_training_learns_and_reports_examples_and_histogram():
    _, result = train(range(300), min_steps=150, batch_size=32, learning_rate=3e-3)
    assert result.num_examples == 300
    assert sum(result.histogram) == 300
    assert result.accuracy > 0.6
    assert 0 < result.loss < 1.5


def test_same_seed_gives_the_same_weights_whatever_the_global_random_state():
    torch.manual_seed(1)
    a, _ = train(range(50), min_steps=5)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    b, _ = train(range(50), min_steps=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    c, _ = train(range(50), seed=1, min_steps=5)
    assert not torch.equal(a.head.weight, c.head.weight)


def test_one_class_and_one_image_are_enough():
    only = [int(np.flatnonzero(SOURCE.train.labels == 3)[0])]
    _, result = train(only, min_steps=3)
    assert result.num_examples == 1
    assert np.isfinite(result.loss)


def test_no_images_are_refused():
    with pytest.raises(ValueError, match="needs at least one image"):
        train([])


def test_zero_epochs_upload_the_initialisation():
    model, _ = train(range(20), epochs=0, min_steps=0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh().parameters(), strict=True))


def test_a_loss_that_is_not_finite_names_the_key_to_lower():
    with pytest.raises(ValueError, match=r"lower train\.learning-rate"):
        train(range(50), optimizer="sgd", learning_rate=10.0, min_steps=60, warmup_fraction=0.0, weight_decay=10.0)


@pytest.mark.parametrize(
    ("images", "settings", "steps"),
    [(100, {"epochs": 3, "min_steps": 0, "batch_size": 40}, 9), (10, {"min_steps": 50}, 50), (10, {"max_steps": 7}, 7)],
)
def test_steps_are_epochs_within_limits(images, settings, steps):
    assert total_steps(images, TrainSettings(**settings)) == steps


def test_balanced_softmax_adds_the_log_counts():
    histogram = torch.tensor([9, 0, 99])
    targets, prior = class_targets(histogram, TrainSettings(balanced_softmax=True))
    assert torch.allclose(prior, torch.tensor([9.0, 1.0, 99.0]).log() + torch.tensor([0.0, -1e4, 0.0]))
    assert torch.equal(targets, torch.eye(3))
    assert not bool(class_targets(histogram, TrainSettings(balanced_softmax=False))[1].any())


def test_label_smoothing_keeps_targets_distributions():
    targets, _ = class_targets(torch.tensor([5, 0, 5]), TrainSettings(label_smoothing=0.2))
    assert torch.allclose(targets.sum(1), torch.ones(3))
    assert targets[0].tolist() == pytest.approx([0.9, 0.0, 0.1])


def test_learning_rate_rises_and_falls():
    factor = WarmupCosine(steps=100, warmup=10)
    assert factor(0) == pytest.approx(0.1)
    assert factor(9) == factor(10) == 1.0
    assert factor(55) == pytest.approx(0.5)
    assert factor(99) < 0.01
    assert WarmupCosine(100, 10, cosine=False)(90) == 1.0
