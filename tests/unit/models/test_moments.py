"""A client's moments are plain sums over the features of its images under the common initialisation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fedmitr_flwr.data import load_source
from fedmitr_flwr.models.build import build_model
from fedmitr_flwr.models.moments import Moments, feature_moments
from fedmitr_flwr.models.vit import forward_images, head_input
from fedmitr_flwr.settings import Settings, SettingsError
from fedmitr_flwr.training.initial import initial_state
from tests.unit.models.test_vit import FAMILIES, make, make_images

CPU = torch.device("cpu")
ONE_HEAD = [family for family in FAMILIES if family != "distilled"]
SETTINGS = Settings().replace(
    **{
        "data.source": "digits",
        "model.init": "seeded",
        "model.options": "patch_size=2,embed_dim=32,depth=2,num_heads=2,drop_rate=0.5,proj_drop_rate=0.5",
    }
)
SOURCE = load_source(SETTINGS.data)
IMAGES = SOURCE.train.subset(np.arange(100))


def moments_of(batch_size: int = 32) -> Moments:
    model = build_model(SETTINGS.model, SOURCE.spec)
    model.load_state_dict(initial_state(SETTINGS, SOURCE.spec))
    return feature_moments(model, IMAGES, SOURCE.spec, batch_size=batch_size, device=CPU)


@pytest.mark.parametrize("family", ONE_HEAD)
def test_the_head_of_its_input_gives_the_logits_of_the_model(family: str) -> None:
    model = make(family)
    out = forward_images(model, make_images(model))
    assert torch.allclose(model.head(head_input(model, out.features)), out.logits, atol=1e-5)


def test_moments_are_the_sums_over_the_features_of_a_plain_loop() -> None:
    model = build_model(SETTINGS.model, SOURCE.spec).eval()
    model.load_state_dict(initial_state(SETTINGS, SOURCE.spec))
    sums, second = torch.zeros(10, 32, dtype=torch.float64), torch.zeros(32, 32, dtype=torch.float64)
    with torch.no_grad():
        for row in range(100):
            x = SOURCE.spec.normalise(IMAGES.images(np.array([row])))
            feature = model.forward_head(model.forward_features(x), pre_logits=True)[0].double()
            sums[IMAGES.labels[row]] += feature
            second += torch.outer(feature, feature)
    found = moments_of()
    assert found.counts.tolist() == list(IMAGES.histogram(10))
    assert torch.allclose(found.sums.double(), sums, rtol=1e-5, atol=1e-4)
    assert torch.allclose(found.second(), second, rtol=1e-5, atol=1e-3)
    assert torch.equal(found.second(), found.second().T)


def test_moments_repeat_bit_for_bit_and_leave_the_global_random_state_alone() -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, again = moments_of(), moments_of()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, again.tensors()[name]) for name, value in first.tensors().items())


def test_the_size_of_a_batch_changes_only_rounding() -> None:
    def far(one: Tensor, other: Tensor) -> float:
        return float((one.double() - other.double()).abs().max() / one.abs().max())

    first, other = moments_of(100).tensors(), moments_of(7).tensors()
    assert all(far(value, other[name]) < 1e-6 for name, value in first.items())


def test_blank_moments_have_the_shapes_of_real_ones_and_no_memory() -> None:
    blank, real = Moments.blank(10, 32), moments_of()
    for name, value in real.tensors().items():
        assert (blank.tensors()[name].shape, blank.tensors()[name].dtype) == (value.shape, value.dtype)
        assert blank.tensors()[name].is_meta
    assert blank.size() == real.size() == 8 * 10 + 4 * 10 * 32 + 4 * 32 * 33 // 2


def test_a_model_with_two_heads_is_refused() -> None:
    model = make("distilled")
    with pytest.raises(SettingsError, match=r"model\.name = .*distilled.*two classifier heads"):
        feature_moments(model, IMAGES, SOURCE.spec, batch_size=8, device=CPU)


def test_features_that_are_not_finite_are_an_error() -> None:
    model = build_model(SETTINGS.model, SOURCE.spec)
    torch.nn.init.constant_(model.norm.bias, torch.inf)
    with pytest.raises(ValueError, match=r"not finite; check model\.init"):
        feature_moments(model, IMAGES, SOURCE.spec, batch_size=8, device=CPU)
