"""Settings of the run as a whole, and all stages composed into one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Self

from pydantic import Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from fedmitr_flwr.settings.choices import MethodName
from fedmitr_flwr.settings.client_stages import DataSettings, ModelSettings, PartitionSettings, TrainSettings
from fedmitr_flwr.settings.generator import GeneratorSettings
from fedmitr_flwr.settings.run_config import RunConfigValue, SettingsError, Stage, kebab, problems_of, unknown_hint
from fedmitr_flwr.settings.server_stages import (
    DensitySettings,
    DistillSettings,
    EnsembleSettings,
    InversionSettings,
    RelabelSettings,
)


class RunSettings(Stage):
    """What concerns the run as a whole."""

    method: MethodName = Field(
        "fedmitr",
        description="How the uploads become one model: `fedmitr`, or a baseline: one-shot averages (`fedavg`, "
        "`head-aggregation`), dense inversion with or without cross-entropy (`dense-inversion`, `dense-inversion-kl`), "
        "hard labels everywhere (`hard-labels`), no inversion at all (`random-images`, labelled by the ensemble), or a "
        "generator in its place (`dense`: DENSE; `co-boosting`: Co-Boosting).",
    )
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
    resume: str = Field(
        "",
        description="Directory of a run that was cut off, to go on with from what it has finished. Its settings apply; "
        "keys given here change them where that contradicts nothing finished. `fedmitr resume` sets this.",
    )
    checkpoint_seconds: float = Field(
        30.0, ge=0.0, description="Least time between two checkpoints of distillation; 0: one after each step."
    )
    window: int = Field(
        0,
        ge=0,
        description="How many clients may be asked and not have answered yet: uploads wait in memory until the server "
        "takes them. 0: twice the CPU cores in a simulation, all sites at once in a deployment.",
    )
    retries: int = Field(
        2,
        ge=0,
        le=100,
        description="How often a client is asked again whose process died or that lost its connection. One that "
        "raised an error, or does not answer, is not asked again.",
    )
    max_update_norm: float = Field(
        10.0,
        ge=0.0,
        description="An upload is refused when its weights lie further from the common initialisation than this many "
        "times the initialisation's own L2 norm; 0: no limit.",
    )
    memory_mb: int = Field(
        0,
        ge=0,
        description="Memory that the ServerApp's process may take, in MiB; `inversion.teacher-memory-mb` and "
        "`inversion.activation-memory-mb` are lowered until it is enough, and a run that cannot do with it is refused "
        "before any client is asked. On a GPU only what the host holds counts. 0: no limit.",
    )
    tensorboard: bool = Field(
        False,
        description="Also write losses, agreement and image grids for TensorBoard, into the run's `tensorboard` folder "
        "(needs `pip install tensorboard`).",
    )
    roster: str = Field(
        "",
        pattern=r"^([^=,]+=\d+(,[^=,]+=\d+)*)?$",
        description="In a deployment: each site's name (`site` in its node config) and the node id that `flwr "
        "supernode register` printed for its key, `north=123,south=456`. An upload from another node, or under another "
        "site's name, is refused. Empty: names are believed.",
    )


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
    generator: GeneratorSettings = GeneratorSettings()

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
