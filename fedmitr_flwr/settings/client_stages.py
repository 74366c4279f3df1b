"""Settings of what a client sees: its data, the partition, the model and local training."""

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
        description="`mnist-5k`, `digits`, `hub:ID`, `npz:PATH` or `folder:PATH`. A site's own `data-path` in its "
        "node config wins over it on that client.",
    )
    image_size: int = Field(0, ge=0, le=1024, description="Side of the square images in pixels; 0: the source's own.")
    classes: int = Field(0, ge=0, description="Number of classes C, the first C of the source; 0: all it has.")
    class_names: str = Field(
        "",
        description="Names of the classes in order, separated by commas. Needed only when the server has no data "
        "(`run.evaluate-on = none`); sites map their class folders by these names.",
    )
    image_column: str = Field("", description="Image column of a `hub:` dataset; empty: the preset's.")
    label_column: str = Field("", description="Label column of a `hub:` dataset; empty: the preset's.")
    mean: FloatList = Field(
        (), description="Normalisation mean for each channel, in 0..1, as `0.5,0.5,0.5`; empty: the source's."
    )
    std: FloatList = Field((), description="Normalisation standard deviation for each channel; empty: the source's.")
    test_fraction: float = Field(
        0.2,
        gt=0.0,
        lt=1.0,
        description="Fraction of each class held out as test set when the source has no test split.",
    )
    validation_fraction: float = Field(
        0.1,
        gt=0.0,
        lt=1.0,
        description="Fraction of each class of the training split held out as validation set, for choosing settings, "
        "when the source has none.",
    )
    split_seed: int = Field(0, ge=0, description="Seed of the train, validation and test split.")


class PartitionSettings(Stage):
    """How the training images are divided among simulated clients (flwr-datasets partitioners)."""

    kind: Literal["dirichlet", "iid", "pathological", "natural"] = Field(
        "dirichlet", description="Partitioner; `natural`: one client for each value of `partition.column`."
    )
    alpha: float = Field(0.1, gt=0.0, le=1e6, description="Dirichlet concentration; smaller is more skewed.")
    classes_per_client: int = Field(2, ge=1, description="Classes of each client for `pathological`.")
    column: str = Field("domain", description="Column for `natural`.")
    min_size: int = Field(0, ge=0, description="Smallest partition that `dirichlet` may make; 0 allows empty clients.")
    seed: int = Field(42, ge=0, description="Seed of the partition.")


class ModelSettings(Stage):
    """The Vision Transformer that clients and server share, and its common initialisation."""

    name: str = Field("vit_tiny_patch16_224", min_length=1, description="timm name of a ViT with a [CLS] token.")
    options: str = Field(
        "patch_size=4,embed_dim=64,depth=4,num_heads=4,mlp_ratio=2",
        description="Keyword overrides for timm, `key=value` separated by commas. Image size, channels and classes "
        "come from the data.",
    )
    init: str = Field(
        "glyphs",
        pattern=r"^(glyphs|seeded|pretrained|file:.+)$",
        description="Common initialisation: `glyphs` (pretrained here on letters rendered from fonts, cached), "
        "`seeded` (random), `pretrained` (timm weights from the Hub) or `file:PATH` (a local checkpoint).",
    )
    glyph_images: int = Field(16000, ge=100, le=1_000_000, description="Rendered letters for `model.init = glyphs`.")
    glyph_epochs: int = Field(6, ge=1, le=100, description="Epochs of training on them.")


class TrainSettings(Stage):
    """Local training of each client, once."""

    epochs: int = Field(1, ge=0, le=10_000, description="Passes over the client's images (at least; see min-steps).")
    min_steps: int = Field(
        300,
        ge=0,
        le=1_000_000,
        description="Optimiser steps that a client makes at least, so that small ones learn too.",
    )
    max_steps: int = Field(100_000, ge=1, description="Optimiser steps that a client makes at most.")
    batch_size: int = Field(32, ge=1, le=65_536, description="Images in a step (all of them if a client has fewer).")
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="Optimiser.")
    learning_rate: float = Field(1e-3, gt=0.0, le=10.0, description="Peak learning rate.")
    weight_decay: float = Field(0.05, ge=0.0, le=10.0, description="Decoupled weight decay.")
    warmup_fraction: float = Field(0.1, ge=0.0, le=1.0, description="Part of the steps with rising learning rate.")
    schedule: Literal["cosine", "constant"] = Field("cosine", description="Learning rate after the warm-up.")
    augment: Augmentation = Field(
        "shift",
        description="`shift`: random shifts by up to 1/14 of the side; `flip`: shifts and horizontal flips; `strong`: "
        "random resized crop, flip and colour jitter.",
    )
    label_smoothing: float = Field(0.0, ge=0.0, lt=1.0, description="Label smoothing.")
    balanced_softmax: bool = Field(
        True,
        description="Add log class counts to the logits in training (Ren et al. 2020), against label skew.",
    )
    share_label_histogram: bool = Field(
        False,
        description="Upload the number of examples of each class; needed by `ensemble.weighting = histogram`.",
    )
    time_limit_seconds: float = Field(
        0.0,
        ge=0.0,
        description="A client that trains for longer gives up with an error, and its process is ended if it hangs; "
        "0: `run.deadline-seconds`.",
    )
    upload_dtype: UploadDtype = Field("fp32", description="Number format of uploaded weights.")
