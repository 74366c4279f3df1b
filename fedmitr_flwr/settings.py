"""Run settings: one frozen pydantic model a stage, composed into one.

The classes below are the only place where keys, types, ranges and defaults are defined; the defaults are the
demo. ``pyproject.toml`` repeats them because Flower accepts only keys that stand there, and
``docs/settings.md`` is generated from them; a test compares all three.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Self

from pydantic import Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from fedmitr_flwr.run_config import (
    FloatList,
    IntList,
    RunConfigValue,
    SettingsError,
    Stage,
    kebab,
    problems_of,
    unknown_hint,
)

__all__ = ["RunConfigValue", "Settings", "SettingsError", "flat_fields"]


class RunSettings(Stage):
    """What concerns the run as a whole."""

    seed: int = Field(42, ge=0, le=2**31 - 1, description="Seed of everything random except the partition.")
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        description="Device of the server's stages: `auto` (a GPU when there is one), `cpu`, `cuda` or `cuda:N`.",
    )
    output: str = Field(
        "outputs",
        min_length=1,
        description="Directory of the run's results. Without a fixed `run.name` each run gets a folder of its own in "
        "it. A relative path counts from the working directory of the ServerApp (Flower decides where that is); "
        "`fedmitr simulate` makes it absolute.",
    )
    name: str = Field("", description="Name of the run's folder; empty: date, time and a random suffix.")
    rounds: int = Field(
        1,
        ge=1,
        le=100,
        description="Rounds; 1 is one-shot, later rounds start from the previous global model.",
    )
    evaluate_on: Literal["test", "validation", "none"] = Field(
        "test",
        description="Server-side split the accuracies are measured on. Choose settings on `validation`; "
        "`none` when the server has no data at all.",
    )
    min_clients: int = Field(1, ge=1, description="The run fails when fewer clients than this upload a usable model.")
    min_fraction: float = Field(
        0.5,
        ge=0.0,
        le=1.0,
        description="The run fails when a smaller fraction of the asked clients uploads or says "
        "that it has no data; 0 leaves it to `run.min-clients`.",
    )
    wait_nodes_seconds: float = Field(
        120.0,
        ge=0.0,
        description="How long to wait for `run.min-clients` nodes to connect before asking them to train.",
    )
    deadline_seconds: float = Field(
        3600.0,
        gt=0.0,
        description="How long to wait for the clients' uploads, from the moment they are asked.",
    )


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
        "patch_size=4,embed_dim=64,depth=4,num_heads=4",
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
        200,
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
    augment: Literal["none", "shift", "flip", "strong"] = Field(
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
    upload_dtype: Literal["fp32", "fp16", "bf16"] = Field("fp32", description="Number format of uploaded weights.")


class EnsembleSettings(Stage):
    """How the teachers' predictions are combined (A(x) = sum_k w_k(c) p_k(c|x))."""

    weighting: Literal["uniform", "examples", "histogram", "competence"] = Field(
        "competence",
        description="Weight of a teacher for a class: equal, by its number of examples, by its label histogram, or by "
        "the class competence estimated from how its classifier head moved (needs nothing but the upload).",
    )
    power: float = Field(
        0.5, ge=0.0, le=4.0, description="Exponent on the weights before they are normalised; 0 is uniform."
    )


class InversionSettings(Stage):
    """Stage 1, sparse model inversion (SMI, arXiv 2510.27186)."""

    images: int = Field(120, ge=1, le=10_000_000, description="Synthetic images, spread evenly over the classes.")
    batch_size: int = Field(40, ge=1, description="Images inverted at a time.")
    iterations: int = Field(40, ge=1, le=1_000_000, description="Optimisation steps for each batch.")
    stops: IntList = Field(
        (6, 10, 14, 18), description="Iterations before which patches are stopped; empty: dense inversion."
    )
    fractions: FloatList = Field(
        (0.3, 0.3, 0.3, 0.3), description="Fraction of the remaining patches stopped at each of them."
    )
    learning_rate: float = Field(0.1, gt=0.0, le=100.0, description="Adam learning rate, in normalised pixels.")
    beta1: float = Field(0.5, ge=0.0, lt=1.0, description="Adam beta 1.")
    beta2: float = Field(0.99, ge=0.0, lt=1.0, description="Adam beta 2.")
    tv_weight: float = Field(0.05, ge=0.0, description="Weight of the total variation.")
    l2_weight: float = Field(
        0.0, ge=0.0, description="Weight of the mean squared pixel: a pull towards the normalisation mean."
    )
    jitter: int = Field(
        0, ge=0, le=64, description="Largest random shift in whole patches at dense iterations; 0: none."
    )
    start: Literal["white", "smooth"] = Field(
        "smooth",
        description="Starting noise: `white` (Gaussian, around the normalisation mean) or `smooth` (random coarseness, "
        "contrast and mean, as the noise of `distill.noise`).",
    )
    start_std: float = Field(0.5, ge=0.0, le=10.0, description="Standard deviation of `white` starting noise.")

    @model_validator(mode="after")
    def _schedule(self) -> Self:
        problems: list[tuple[str, object, str]] = []
        if any(b <= a for a, b in zip(self.stops, self.stops[1:], strict=False)) or any(s < 1 for s in self.stops):
            problems.append(("inversion.stops", self.stops, "must be strictly increasing and at least 1"))
        elif self.stops and self.stops[-1] >= self.iterations:
            allowed = f"must lie below inversion.iterations = {self.iterations}"
            problems.append(("inversion.stops", self.stops, allowed))
        if len(self.fractions) != len(self.stops):
            allowed = f"must have as many entries as inversion.stops ({len(self.stops)}), has {len(self.fractions)}"
            problems.append(("inversion.fractions", self.fractions, allowed))
        if any(not 0.0 < r < 1.0 for r in self.fractions):
            problems.append(("inversion.fractions", self.fractions, "must lie between 0 and 1, both excluded"))
        if problems:
            raise SettingsError(*problems)
        return self


class DensitySettings(Stage):
    """Stage 2, which patches count as dense."""

    rule: Literal["survival", "quantile", "mass", "otsu"] = Field(
        "survival",
        description="High density: patches that survived inversion, the top quantile of the attention, the fewest "
        "patches that hold a share of the attention mass, or above Otsu's threshold for each image.",
    )
    quantile: float = Field(0.75, gt=0.0, lt=1.0, description="Fraction of the patches that is low for `quantile`.")
    mass: float = Field(0.5, gt=0.0, lt=1.0, description="Share of the attention mass that is high for `mass`.")


class RelabelSettings(Stage):
    """Stage 3, ensemble labels for the low-density patches."""

    labels: Literal["soft", "hard", "off"] = Field(
        "soft",
        description="What the low-density patches learn: the ensemble's soft label, its arg max, or nothing.",
    )
    temperature: float = Field(1.0, gt=0.0, le=100.0, description="Temperature of the soft labels; 1 leaves them.")


class DistillSettings(Stage):
    """Stage 4, distillation into the global model."""

    start: Literal["fedavg", "initial", "merged"] = Field(
        "merged",
        description="The student's first weights: one-shot average, common initialisation, or the initialisation plus "
        "`distill.merge-scale` times the mean client update with class-wise weights for the head.",
    )
    merge_scale: float = Field(1.0, ge=0.0, le=10.0, description="Scale of the mean update for `merged`.")
    steps: int = Field(1500, ge=1, le=10_000_000, description="Optimiser steps.")
    batch_size: int = Field(64, ge=1, description="Images in a step.")
    learning_rate: float = Field(3e-4, gt=0.0, le=10.0, description="Peak learning rate (AdamW, warm-up, cosine).")
    weight_decay: float = Field(0.05, ge=0.0, le=10.0, description="Decoupled weight decay.")
    temperature: float = Field(1.0, gt=0.0, le=100.0, description="Temperature of KL(A(x) || s(x)).")
    ce_on: Literal["full", "high"] = Field(
        "full",
        description="Where CE(s(.), y) looks: the full image, or its high-density patches alone (the paper's words).",
    )
    kl_weight: float = Field(1.0, ge=0.0, description="Weight of KL(A(x) || s(x)) on full images.")
    ce_weight: float = Field(0.2, ge=0.0, description="Weight of the cross-entropy with the pseudo-label y.")
    low_weight: float = Field(1.0, ge=0.0, description="Weight of KL(q_low || s(x_low)) on the low-density patches.")
    augment: Literal["none", "shift", "flip", "strong"] = Field(
        "shift", description="Augmentation of the synthetic images' further views, as `train.augment`."
    )
    views: int = Field(
        2,
        ge=1,
        le=1000,
        description="Views of each synthetic image: itself and augmented ones, each labelled by the ensemble.",
    )
    mix: float = Field(
        0.0,
        ge=0.0,
        le=1000.0,
        description="Further images for each synthetic one, whose patches are mixed from two of them; labelled by the "
        "ensemble (KL term only). 0: none.",
    )
    noise: float = Field(
        90.0,
        ge=0.0,
        le=1000.0,
        description="Further images for each synthetic one, of random noise; labelled by the ensemble (KL term only). "
        "0: none. The pool of all images stays in memory: 0.6 MB for each at 224 px in colour.",
    )

    @model_validator(mode="after")
    def _something_to_learn(self) -> Self:
        if self.kl_weight == self.ce_weight == self.low_weight == 0.0:
            raise SettingsError(("distill.kl-weight", 0.0, "kl-weight, ce-weight and low-weight must not all be 0"))
        return self


class Settings(Stage):
    """All settings of a run."""

    run: RunSettings = RunSettings()
    data: DataSettings = DataSettings()
    partition: PartitionSettings = PartitionSettings()
    model: ModelSettings = ModelSettings()
    train: TrainSettings = TrainSettings()
    ensemble: EnsembleSettings = EnsembleSettings()
    inversion: InversionSettings = InversionSettings()
    density: DensitySettings = DensitySettings()
    relabel: RelabelSettings = RelabelSettings()
    distill: DistillSettings = DistillSettings()

    @model_validator(mode="after")
    def _across_stages(self) -> Self:
        problems: list[tuple[str, object, str]] = []
        if self.ensemble.weighting == "histogram" and not self.train.share_label_histogram:
            allowed = 'needs train.share-label-histogram = true; else "competence", "examples" or "uniform"'
            problems.append(("ensemble.weighting", "histogram", allowed))
        if bool(self.data.mean) != bool(self.data.std) or len(self.data.mean) != len(self.data.std):
            allowed = f"must have as many entries as data.mean ({len(self.data.mean)})"
            problems.append(("data.std", self.data.std, allowed))
        if any(s <= 0.0 for s in self.data.std):
            problems.append(("data.std", self.data.std, "must be above 0"))
        if self.density.rule == "survival" and not self.inversion.stops and self.relabel.labels != "off":
            allowed = 'needs inversion.stops; for dense inversion choose another rule, or relabel.labels = "off"'
            problems.append(("density.rule", "survival", allowed))
        if problems:
            raise SettingsError(*problems)
        return self

    @classmethod
    def from_run_config(cls, config: Mapping[str, RunConfigValue]) -> Settings:
        """Validate a flat run-config; keys that are absent take their defaults.

        Parameters
        ----------
        config
            Dotted kebab-case keys, values int, float, bool or str, as in Flower's ``context.run_config``.

        Raises
        ------
        SettingsError
            Names every key that is unknown, of the wrong type, out of range or in contradiction to
            another one, with its value and what is allowed.
        """
        known = flat_fields()
        unknown = [key for key in config if key not in known]
        if unknown:
            raise SettingsError(*((key, config[key], unknown_hint(key, known)) for key in unknown))
        nested: dict[str, dict[str, RunConfigValue]] = {}
        for key, value in config.items():
            stage, name = key.split(".", 1)
            nested.setdefault(stage, {})[name] = value
        try:
            return cls.model_validate(nested)
        except ValidationError as error:
            raise SettingsError(*problems_of(error, known)) from None

    def flat(self) -> dict[str, RunConfigValue]:
        """Return the settings as a flat run-config: the inverse of `from_run_config`."""
        out: dict[str, RunConfigValue] = {}
        for key in flat_fields():
            stage, name = key.split(".", 1)
            value = getattr(getattr(self, stage), name.replace("-", "_"))
            out[key] = ",".join(str(item) for item in value) if isinstance(value, tuple) else value
        return out

    def replace(self, **changes: RunConfigValue) -> Settings:
        """Return settings with some keys changed, ``replace(**{"run.seed": 7})``, validated anew."""
        return Settings.from_run_config({**self.flat(), **changes})


def flat_fields() -> dict[str, FieldInfo]:
    """Every key of the run-config, in order, with its pydantic field."""
    out = {}
    for stage, field in Settings.model_fields.items():
        model = field.annotation
        assert isinstance(model, type)
        assert issubclass(model, Stage)
        for name, sub in model.model_fields.items():
            out[f"{stage}.{kebab(name)}"] = sub
    return out
