import numpy as np
import pytest
import torch
from PIL import Image

from fedmitr_flwr.data.images import ArrayReader, ImageSet
from fedmitr_flwr.data.sources.decode import fit_image
from tests.unit.data.data_fixtures import labelled, patterned


@pytest.fixture
def images() -> ImageSet:
    pixels = patterned(6, 8).transpose(0, 3, 1, 2)
    domain = np.array(["a", "b", "a", "b", "a", "b"])
    return ImageSet(np.array([2, 0, 1, 2, 2, 0]), ArrayReader(pixels), np.arange(6), 3, 8, {"domain": domain})


@pytest.mark.parametrize("index", [[4, 1, 1], np.array([4, 1, 1]), torch.tensor([4, 1, 1])])
def test_images_come_in_the_order_asked_for(images, index):
    batch = images.images(index)
    assert batch.dtype == torch.uint8
    assert batch[:, 0, 0, 0].tolist() == [4, 1, 1]


def test_a_subset_keeps_images_labels_and_columns_together(images):
    part = images.subset([5, 2]).subset([1, 0, 1])
    assert part.labels.tolist() == [1, 0, 1]
    assert part.columns["domain"].tolist() == ["a", "b", "a"]
    assert part.images([0, 1])[:, 0, 0, 0].tolist() == [2, 5]


def test_an_empty_set_yields_empty_batches(images):
    nobody = images.subset([])
    assert len(nobody) == 0
    assert nobody.images(torch.empty(0, dtype=torch.int64)).shape == (0, 3, 8, 8)
    assert nobody.histogram(4).tolist() == [0, 0, 0, 0]


def test_the_histogram_counts_absent_classes_as_zero(images):
    assert images.histogram(5).tolist() == [2, 1, 3, 0, 0]


@pytest.mark.parametrize("index", [[6], [-1]])
def test_positions_outside_the_set_are_refused(images, index):
    with pytest.raises(IndexError, match="outside a set of 6 images"):
        images.images(index)


def test_a_mask_is_not_mistaken_for_positions(images):
    with pytest.raises(TypeError, match="integers"):
        images.subset(np.array([True, False, True, False, True, False]))


def test_columns_of_another_length_are_refused():
    with pytest.raises(ValueError, match="domain"):
        labelled([0, 1, 1], domain=np.array(["a"]))


def test_resizing_in_memory_averages_the_pixels_that_it_merges():
    pixels = np.repeat(np.repeat(np.array([[0, 200], [100, 40]], np.uint8), 8, 0), 8, 1)[None, None]
    image = ArrayReader(pixels).read(np.array([0]), 1, 8)
    assert image.shape == (1, 1, 8, 8)
    assert image[0, 0, 0, 0] == 0
    assert image[0, 0, 7, 0] == 100
    assert abs(image.float().mean() - 85) < 1


def test_grey_and_colour_are_converted_into_each_other():
    grey = np.full((1, 1, 4, 4), 77, np.uint8)
    assert ArrayReader(grey).read(np.array([0]), 3, 4).unique().tolist() == [77]
    red = np.zeros((1, 3, 4, 4), np.uint8)
    red[:, 0] = 255
    assert ArrayReader(red).read(np.array([0]), 1, 4).unique().tolist() == [76]


def test_a_wide_photograph_is_cut_to_its_central_square():
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = 255
    fitted = fit_image(Image.fromarray(pixels), 3, 10)
    assert fitted.shape == (3, 10, 10)
    assert fitted.min() == 255


def test_transparent_parts_become_white():
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert fit_image(clear, 3, 4).min() == 255


def test_sixteen_bit_grey_keeps_its_brightness():
    deep = Image.fromarray(np.full((4, 4), 128 * 256, np.uint16))
    assert np.unique(fit_image(deep, 1, 4)).tolist() == [128]
