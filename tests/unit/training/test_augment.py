import pytest
import torch

from fedmitr_flwr.training.augment import augment

IMAGES = torch.rand(8, 3, 28, 28, generator=torch.Generator().manual_seed(0))


def run(kind, seed=1):
    return augment(IMAGES, kind, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["shift", "flip", "strong"])
def test_augmentation_keeps_the_shape_changes_pixels_and_repeats_with_its_seed(kind):
    assert run(kind).shape == IMAGES.shape
    assert torch.equal(run(kind), run(kind))
    assert not torch.equal(run(kind), IMAGES)
    assert not torch.equal(run(kind), run(kind, seed=2))


def test_none_returns_the_images():
    assert torch.equal(run("none"), IMAGES)


def test_shift_moves_each_image_by_at_most_two_of_28_pixels():
    for image, moved in zip(IMAGES, run("shift"), strict=True):
        inner = image[:, 4:24, 4:24]
        found = [
            (dy, dx)
            for dy in range(-2, 3)
            for dx in range(-2, 3)
            if torch.equal(moved[:, 4 - dy : 24 - dy, 4 - dx : 24 - dx], inner)
        ]
        assert len(found) == 1


def test_flip_mirrors_about_half_of_the_images():
    constant_rows = torch.arange(28.0).expand(200, 1, 28, 28)
    flipped = augment(constant_rows, "flip", torch.Generator().manual_seed(0))
    share = float((flipped[:, 0, 14, 20] < flipped[:, 0, 14, 8]).float().mean())
    assert 0.4 < share < 0.6
