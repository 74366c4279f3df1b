"""Settings that a client uses: data, partition, model and local training."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fedmitr_flwr.settings.choices import Augmentation, UploadDtype
from fedmitr_flwr.settings.run_config import FloatList, Stage


class DataSettings(Stage):
    """Which images the clients train on and the server evaluates on."""

    source: str = Field(
        "mnist-5k",
        pattern=r"^(mnist-5k|digits|hub:.+|npz:.+|folder:.+)$",
        description="Source of the images. `mnist-5k` (5,000 images) and `digits` come with the installation. "
        "`hub:ID`: a dataset of the Hugging Face Hub, or a local copy of one. `npz:PATH`: a NumPy archive. "
        "`folder:PATH`: image files in one folder per class. A client whose node config has a `data-path` trains on "
        "that instead.",
    )
    image_size: int = Field(
        0, ge=0, le=1024, description="Side of the square images in pixels. 0: the source's own size."
    )
    classes: int = Field(
        0, ge=0, description="Number of classes C; the first C classes of the source are used. 0: all classes."
    )
    class_names: str = Field(
        "",
        description="Names of the classes in order, separated by commas. Required only if the server has no data "
        "(`run.evaluate-on = none`). Sites match their class folders to these names. Empty: the source's names. Labels "
        "that are numbers get other names only if they are 0 to C-1.",
    )
    image_column: str = Field(
        "",
        description="Image column of a `hub:` dataset. Empty: that of the dataset's preset, else its only image "
        "column.",
    )
    label_column: str = Field(
        "",
        description="Label column of a `hub:` dataset. Empty: that of the dataset's preset, else `label` or `labels`.",
    )
    mean: FloatList = Field(
        (),
        description="Mean of each channel for the normalisation, for pixels from 0 to 1, such as `0.5,0.5,0.5`. "
        "Empty: the source's values.",
    )
    std: FloatList = Field(
        (),
        description="Standard deviation of each channel for the normalisation, for pixels from 0 to 1. Empty: the "
        "source's values.",
    )
    test_fraction: float = Field(
        0.2,
        gt=0.0,
        lt=1.0,
        description="Fraction of each class's training images that becomes the test set if the source has none.",
    )
    validation_fraction: float = Field(
        0.1,
        gt=0.0,
        lt=1.0,
        description="Fraction of each class's training images, after the test set is taken out, that becomes the "
        "validation set if the source has none. Choose settings on the validation set.",
    )
    split_seed: int = Field(0, ge=0, description="Seed of the split into training, validation and test set.")


class PartitionSettings(Stage):
    """Division of the training images among simulated clients, by the partitioners of flwr-datasets."""

    kind: Literal["dirichlet", "iid", "pathological", "natural"] = Field(
        "dirichlet",
        description="How images are assigned to clients. `dirichlet`: the clients' shares of each class are drawn "
        "from a Dirichlet distribution. `iid`: at random, in equal numbers. `pathological`: each client has images of "
        "`partition.classes-per-client` classes. `natural`: one client for each value of `partition.column`.",
    )
    alpha: float = Field(
        0.1,
        gt=0.0,
        le=1e6,
        description="For `dirichlet`: concentration of the distribution. The smaller it is, the more the clients' "
        "labels differ.",
    )
    classes_per_client: int = Field(2, ge=1, description="For `pathological`: number of classes of each client.")
    column: str = Field("domain", description="For `natural`: column of the source by which images are divided.")
    min_size: int = Field(
        0,
        ge=0,
        description="For `dirichlet`: smallest number of images that a client may get. 0: clients may be empty.",
    )
    seed: int = Field(42, ge=0, description="Seed of the partition.")


class ModelSettings(Stage):
    """The Vision Transformer of clients and server, and the common initialisation of its weights."""

    name: str = Field("vit_tiny_patch16_224", min_length=1, description="Name in timm of a ViT with a [CLS] token.")
    options: str = Field(
        "patch_size=4,embed_dim=64,depth=4,num_heads=4,mlp_ratio=2",
        description="Arguments of timm's VisionTransformer to override, as `key=value` separated by commas. Image "
        "size, channels and number of classes are taken from the data.",
    )
    init: str = Field(
        "glyphs",
        pattern=r"^(glyphs|seeded|pretrained|file:.+)$",
        description="Common initialisation, the weights from which all clients start. `glyphs`: pretrained on this "
        "machine on letters rendered from fonts, and cached. `seeded`: random weights from `run.seed`. `pretrained`: "
        "timm's weights from the Hugging Face Hub. `file:PATH`: a local safetensors file, or a folder with one.",
    )
    glyph_images: int = Field(
        16000, ge=100, le=1_000_000, description="Number of rendered letters for `model.init = glyphs`."
    )
    glyph_epochs: int = Field(
        6, ge=1, le=100, description="Passes over the rendered letters for `model.init = glyphs`."
    )


class TrainSettings(Stage):
    """Local training, which each client runs once per round."""

    trainable: str = Field(
        "all",
        pattern=r"^(all|head|last-[1-9][0-9]{0,3}|lora)$",
        description="Weights that a client trains and uploads. All others stay those of the common initialisation and "
        "are not uploaded. `all`: all weights. `head`: the classifier head. `last-N`: the last N transformer blocks, "
        "the last norm and the head; N is at least 1 and at most the number of blocks. `lora`: low-rank adapters of "
        "the matrices of attention and MLP in every block, the last norm and the head; needs "
        '`pip install "fedmitr-flwr[lora]"` on every client. `head`, `last-N` and `lora` are meant for pretrained '
        "weights (`model.init`).",
    )
    lora_rank: int = Field(
        8,
        ge=1,
        le=4096,
        description="For `train.trainable = lora`: rank of the adapters, at most the embedding width of the model.",
    )
    lora_alpha: float = Field(
        16.0,
        gt=0.0,
        le=1e4,
        description="For `train.trainable = lora`: the product of an adapter's two matrices is multiplied by this "
        "number divided by `train.lora-rank`.",
    )
    epochs: int = Field(
        1,
        ge=0,
        le=10_000,
        description="Passes over the client's images. The resulting number of steps is raised to `train.min-steps` and "
        "limited to `train.max-steps`. 0: `train.min-steps` alone.",
    )
    min_steps: int = Field(
        300,
        ge=0,
        le=1_000_000,
        description="Smallest number of optimiser steps of a client, so that clients with few images train enough. "
        "0: no lower limit.",
    )
    max_steps: int = Field(100_000, ge=1, description="Largest number of optimiser steps of a client.")
    batch_size: int = Field(
        32, ge=1, le=65_536, description="Number of images in a step. A client with fewer images uses all of them."
    )
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="Optimiser: AdamW, or SGD with momentum 0.9.")
    learning_rate: float = Field(1e-3, gt=0.0, le=10.0, description="Peak learning rate.")
    layer_decay: float = Field(
        1.0,
        gt=0.0,
        le=1.0,
        description="Factor by which the learning rate falls from one block to the block before it. The head and the "
        "last norm have the full learning rate, the last block this factor, the block before it its square, and the "
        "embeddings the smallest. 1: the same learning rate everywhere.",
    )
    weight_decay: float = Field(
        0.05,
        ge=0.0,
        le=10.0,
        description="Weight decay of the parameters with two or more dimensions, decoupled for `adamw`. 0: off.",
    )
    warmup_fraction: float = Field(
        0.1,
        ge=0.0,
        le=1.0,
        description="Fraction of the steps in which the learning rate rises linearly to its peak. 0: no warm-up; 1: it "
        "rises to the last step.",
    )
    schedule: Literal["cosine", "constant"] = Field(
        "cosine", description="Learning rate after the warm-up: falling to 0 along a cosine, or constant."
    )
    augment: Augmentation = Field(
        "shift",
        description="Random augmentation of the training images. `shift`: shift by up to 1/14 of the side. `flip`: "
        "the same, and half of the images mirrored left to right. `strong`: zoom from 0.7 to 1.3, shift by up to 1/7 "
        "of the side, half of the images mirrored, brightness and contrast changed by up to a fifth.",
    )
    label_smoothing: float = Field(
        0.0,
        ge=0.0,
        lt=1.0,
        description="Fraction of the target probability that is spread evenly over the classes; with "
        "`train.balanced-softmax`, over the client's own classes. 0: off.",
    )
    balanced_softmax: bool = Field(
        True,
        description="In training, add the logarithm of the client's number of images of a class to that class's logit "
        "(balanced softmax, Ren et al. 2020). The upload is used without that term, so the client's label skew does "
        "not shift its predictions.",
    )
    head_start: Literal["initial", "discriminant"] = Field(
        "initial",
        description="Weights from which a client's classifier head starts in the first round. `initial`: those of the "
        "common initialisation. `discriminant`: a linear discriminant of the client's images on the features of the "
        "common initialisation, with a covariance that all clients share. The server computes the covariance on random "
        "images. For a pretrained model.",
    )
    share_label_histogram: bool = Field(
        False,
        description="Upload the client's number of images of each class. Required by `ensemble.weighting = histogram`.",
    )
    share_moments: bool = Field(
        False,
        description="Upload feature moments: the client's number of images of each class, the sum of their features, "
        "and one matrix with the sum of the products of all features. A feature is what the classifier head of the "
        "common initialisation reads from an image. Required by `run.method = lda` and `ridge` and by "
        "`distill.start = moments`; `ensemble.moments-weight` uses them for all other methods. They reveal more than "
        "weights do; see the page on the method.",
    )
    time_limit_seconds: float = Field(
        0.0,
        ge=0.0,
        description="Time limit of a client's training in seconds. A client above it reports an error; if its process "
        "hangs, the process is ended. 0: the value of `run.deadline-seconds`.",
    )
    upload_dtype: UploadDtype = Field(
        "fp32", description="Number format of the uploaded weights. `fp16` and `bf16` halve the size of an upload."
    )
