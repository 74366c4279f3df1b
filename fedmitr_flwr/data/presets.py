"""Known properties of sources: image size, classes, columns, splits and normalisation."""

from __future__ import annotations

from dataclasses import dataclass

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Geometry:
    """Shape and normalisation of a source's images before the settings are applied.

    Attributes
    ----------
    channels, image_size
        Number of channels and side in pixels: those of the source, or the default to which its images are converted.
    mean, std
        Mean and standard deviation of each channel, for pixels from 0 to 1.
    """

    channels: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Preset:
    """A dataset of the Hugging Face Hub.

    Attributes
    ----------
    classes
        Number of classes.
    image_column, label_column
        Names of the columns of the images and of the labels.
    train, test, validation
        Names of the splits. None: the dataset has no such split, and it is made from the training split.
    geometry
        Shape and normalisation of the images.
    """

    classes: int
    geometry: Geometry
    image_column: str = "image"
    label_column: str = "label"
    train: str = "train"
    test: str | None = "test"
    validation: str | None = None


MNIST = Geometry(1, 28, (0.1307,), (0.3081,))
DIGITS = Geometry(1, 8, (0.3053,), (0.3760,))
FOLDER = Geometry(3, 224, IMAGENET_MEAN, IMAGENET_STD)

CIFAR10 = Preset(
    classes=10,
    image_column="img",
    geometry=Geometry(3, 32, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
)
CIFAR100 = Preset(
    classes=100,
    image_column="img",
    label_column="fine_label",
    geometry=Geometry(3, 32, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
)
# The labels of Tiny-ImageNet's test set are not public, so its validation set is the test set here.
TINY_IMAGENET = Preset(
    classes=200,
    test="valid",
    geometry=Geometry(3, 64, (0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821)),
)
MINI_IMAGENET = Preset(classes=100, validation="validation", geometry=FOLDER)
# Has one split and a column `domain`: Art, Clipart, Product, Real World.
OFFICE_HOME = Preset(classes=65, test=None, geometry=FOLDER)

PRESETS = {
    "uoft-cs/cifar10": CIFAR10,
    "uoft-cs/cifar100": CIFAR100,
    "zh-plus/tiny-imagenet": TINY_IMAGENET,
    "timm/mini-imagenet": MINI_IMAGENET,
    "flwrlabs/office-home": OFFICE_HOME,
}


def find_preset(name: str) -> Preset | None:
    """Return the preset of a Hub ID, or of a local copy whose path ends in that ID (``…/uoft-cs/cifar10``)."""
    return PRESETS.get("/".join(name.replace("\\", "/").rstrip("/").lower().split("/")[-2:]))


def default_geometry(channels: int, image_size: int) -> Geometry:
    """Return a geometry with ImageNet's normalisation for colour images, and mean and std 0.5 for others."""
    if channels == 3:
        return Geometry(3, image_size, IMAGENET_MEAN, IMAGENET_STD)
    return Geometry(channels, image_size, (0.5,) * channels, (0.5,) * channels)
