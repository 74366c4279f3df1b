import pytest
import torch

from fedmitr_flwr.data import ImageSpec

SPEC = ImageSpec(("cat", "dog"), 3, 4, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))


def test_normalising_is_the_textbook_formula():
    images = torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for channel in range(3):
        expected = (images[:, channel] / 255 - SPEC.mean[channel]) / SPEC.std[channel]
        assert torch.allclose(SPEC.normalise(images)[:, channel], expected, atol=1e-6)


def test_denormalising_gives_every_pixel_value_back():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    normalised = SPEC.normalise(images)
    assert normalised.dtype == torch.float32
    assert torch.equal(SPEC.denormalise(normalised), images)


def test_denormalising_clips_what_no_pixel_can_show():
    wild = torch.tensor([-100.0, 100.0]).view(2, 1, 1, 1).expand(2, 3, 1, 1)
    assert SPEC.denormalise(wild)[:, 0, 0, 0].tolist() == [0, 255]


def test_valid_range_is_black_and_white_in_each_channel():
    low, high = SPEC.valid_range()
    ends = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 1, 1)
    assert torch.allclose(SPEC.normalise(ends)[:, :, 0, 0], torch.stack([low, high]), atol=1e-6)
    assert low.dtype == torch.float32
    assert low.shape == (3,)


def test_a_spec_survives_its_journey_as_json():
    assert ImageSpec.from_json(SPEC.to_json()) == SPEC


@pytest.mark.parametrize("text", ['{"channels": 3}', "[]", "not json"])
def test_json_that_is_no_spec_is_refused(text):
    with pytest.raises(ValueError, match=r"spec|Expecting"):
        ImageSpec.from_json(text)


@pytest.mark.parametrize(
    "fields",
    [
        (("cat", "cat"), 1, 4, (0.5,), (0.5,)),
        ((), 1, 4, (0.5,), (0.5,)),
        (("cat",), 1, 0, (0.5,), (0.5,)),
        (("cat",), 3, 4, (0.5,), (0.5,)),
        (("cat",), 1, 4, (0.5,), (0.0,)),
    ],
)
def test_contradictory_specs_are_refused(fields):
    with pytest.raises(ValueError, match=r"must|need"):
        ImageSpec(*fields)
