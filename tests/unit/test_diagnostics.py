import pytest
import torch

from fedmitr_flwr.diagnostics import diagnose, diversity
from fedmitr_flwr.inversion import SyntheticImages, invert
from fedmitr_flwr.settings import InversionSettings
from tests.unit.tiny import tiny_ensemble, tiny_grid

SETTINGS = InversionSettings(iterations=60, stops="10,20", fractions="0.3,0.3")
LABELS = torch.tensor([0, 1, 2, 3, 4] * 2)


def synthetic(images=None, kept=7):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(10, 1, 16, 16, generator=generator).clamp(-0.9, 1.9) if images is None else images
    return SyntheticImages(images, LABELS, torch.arange(kept).repeat(10, 1), torch.zeros(10))


def look(images=None, kept=7):
    return diagnose(tiny_ensemble(), synthetic(images, kept), tiny_grid(), SETTINGS)


def test_black_and_saturated_pixels_are_counted_and_named():
    images = torch.full((10, 1, 16, 16), -1.0)
    images[..., :8] = 2.0
    found = look(images)
    assert (found.black, found.saturated) == (0.5, 0.5)
    black = look(torch.full((10, 1, 16, 16), -1.0))
    assert any("black" in line for line in black.warnings())
    assert any("nearly the same" in line for line in black.warnings())
    assert look().black == look().saturated == 0


def test_inverted_images_agree_with_their_labels_and_noise_does_not():
    made = invert(tiny_ensemble(), LABELS, tiny_grid(), SETTINGS, generator=torch.Generator().manual_seed(0))
    good = diagnose(tiny_ensemble(), made, tiny_grid(), SETTINGS)
    assert good.ensemble_agrees > look().ensemble_agrees
    assert good.teachers_agree > look().teachers_agree
    assert good.kept == good.expected == 7
    assert good.cost == pytest.approx(8 / 17)


def test_patches_left_in_the_graph_against_the_schedule_are_named():
    assert not any("graph" in line for line in look(kept=7).warnings())
    assert any(
        "16 patches were in the graph at the end, the schedule leaves 7" in line for line in look(kept=16).warnings()
    )


def test_diversity_is_zero_for_copies_and_one_for_unrelated_images():
    noise = torch.randn(40, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(40) % 4
    assert diversity(noise[:4][labels], labels) == 0
    assert diversity(noise, labels) == pytest.approx(1, abs=0.05)
    assert diversity(noise, torch.arange(40)) == 1


def test_values_are_plain_numbers_for_json():
    assert set(map(type, look().as_dict().values())) <= {int, float}
