"""Load image sources, split them into training, validation and test sets, and divide them among clients."""

from fedmitr_flwr.data.cache import cache_dir
from fedmitr_flwr.data.client_images import client_images
from fedmitr_flwr.data.images import ImageSet
from fedmitr_flwr.data.load import Source, load_source, load_spec
from fedmitr_flwr.data.partition import partition_indices
from fedmitr_flwr.data.spec import ImageSpec

__all__ = [
    "ImageSet",
    "ImageSpec",
    "Source",
    "cache_dir",
    "client_images",
    "load_source",
    "load_spec",
    "partition_indices",
]
