"""Settings of the whole run, and `Settings`, which combines the settings of all stages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Self

from pydantic import Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from fedmitr_flwr.settings.choices import METHODS, MethodName, described
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
    """Settings of the whole run: method, device, results, clients and time limits."""

    method: MethodName = Field("fedmitr", description=described("Way from the uploads to one model.", METHODS))
    seed: int = Field(
        42, ge=0, le=2**31 - 1, description="Seed of all random draws but the partition and the data split."
    )
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        description="Device of the server's stages: `auto` (a GPU if there is one, else the CPU), `cpu`, `cuda` or "
        "`cuda:N`.",
    )
    output: str = Field(
        "outputs",
        min_length=1,
        description="Directory in which each run makes a folder for its results. A relative path is relative to the "
        "working directory of the ServerApp, which Flower sets; `fedmitr simulate` makes it absolute.",
    )
    name: str = Field(
        "",
        description="Name of the run's folder in `run.output`. A folder with uploads of an earlier run is refused; "
        "results of a run without uploads are replaced. Empty: date, time and a random suffix.",
    )
    rounds: int = Field(
        1,
        ge=1,
        le=100,
        description="Number of rounds. 1: one-shot; each further round starts from the previous global model.",
    )
    evaluate_on: Literal["test", "validation", "none"] = Field(
        "test",
        description="Images on which the server measures accuracies: the test set or the validation set. Choose "
        "settings on `validation`. `none`: nothing is measured, for a server without data.",
    )
    min_clients: int = Field(
        1,
        ge=1,
        description="Smallest number of clients. The run waits for this many nodes to connect, and fails if fewer "
        "clients upload a valid model.",
    )
    min_fraction: float = Field(
        0.5,
        ge=0.0,
        le=1.0,
        description="Smallest fraction of the asked clients that must upload a valid model or report that they have no "
        "data; the run fails below it. 0: only `run.min-clients` counts; 1: every client must answer.",
    )
    wait_nodes_seconds: float = Field(
        120.0,
        ge=0.0,
        description="Time in seconds to wait for `run.min-clients` nodes to connect, and for a client that lost its "
        "connection to come back. 0: no waiting.",
    )
    deadline_seconds: float = Field(
        3600.0,
        gt=0.0,
        description="Time in seconds to wait for the uploads of a round, counted from the request to train.",
    )
    resume: str = Field(
        "",
        description="Directory of an interrupted run to resume from its last finished work. Its own settings apply. A "
        "key that is given here replaces one of them; it is refused if finished work depends on the old value. "
        "`fedmitr resume` sets this key. Empty: a new run.",
    )
    checkpoint_seconds: float = Field(
        30.0,
        ge=0.0,
        description="Shortest time in seconds between two checkpoints of distillation. 0: a checkpoint after each "
        "step.",
    )
    window: int = Field(
        0,
        ge=0,
        description="Largest number of clients that are asked to train and have not replied yet. It limits the uploads "
        "that wait in memory. 0: twice the number of CPU cores in a simulation, all sites in a deployment.",
    )
    retries: int = Field(
        2,
        ge=0,
        le=100,
        description="Number of times that a client is asked again after its process died or its connection was lost. "
        "A client that reports an error or does not answer is not asked again. 0: never.",
    )
    max_update_norm: float = Field(
        10.0,
        ge=0.0,
        description="Largest L2 distance of an upload's weights from the common initialisation, as a multiple of the "
        "initialisation's L2 norm; an upload above it is refused. 0: no limit.",
    )
    update_limit: float = Field(
        4.0,
        ge=0.0,
        description="Limit of the length of an upload's update, as a multiple of the median length of the other "
        "clients' updates; a single tensor's update may reach twice that multiple of its own median. Used from three "
        "clients on. 0: no limit.",
    )
    update_limit_action: Literal["clip", "refuse"] = Field(
        "clip",
        description="What the server does with an update above `run.update-limit`. `clip`: it shortens the update to "
        "the limit. `refuse`: it leaves the upload out of the model.",
    )
    memory_mb: int = Field(
        0,
        ge=0,
        description="Memory limit of the ServerApp's process in MiB. To stay within it, the run lowers "
        "`inversion.teacher-memory-mb` and `inversion.activation-memory-mb`; a run that needs more even so is refused "
        "before any client is asked. Memory of a GPU is not counted. 0: no limit.",
    )
    tensorboard: bool = Field(
        False,
        description="Also write losses, agreement and image grids for TensorBoard to the run's folder `tensorboard`. "
        "Requires `pip install tensorboard`.",
    )
    roster: str = Field(
        "",
        pattern=r"^([^=,]+=\d+(,[^=,]+=\d+)*)?$",
        description="For a deployment: each site's name (`site` in its node config) with the node id that `flwr "
        "supernode register` printed for its key, such as `north=123,south=456`. An upload from another node or under "
        "another site's name is refused. Empty: site names are not checked.",
    )


class Settings(Stage):
    """All settings of a run, one field for each stage."""

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
            allowed = 'needs train.share-label-histogram = true; without it use "competence", "examples" or "uniform"'
            problems.append(("ensemble.weighting", "histogram", allowed))
        if bool(self.data.mean) != bool(self.data.std) or len(self.data.mean) != len(self.data.std):
            allowed = f"must have as many entries as data.mean ({len(self.data.mean)})"
            problems.append(("data.std", self.data.std, allowed))
        if any(s <= 0.0 for s in self.data.std):
            problems.append(("data.std", self.data.std, "every entry must be above 0"))
        if self.density.rule == "survival" and not self.inversion.stops and self.relabel.labels != "off":
            allowed = 'needs inversion.stops; without stops use another rule or relabel.labels = "off"'
            problems.append(("density.rule", "survival", allowed))
        if problems:
            raise SettingsError(*problems)
        return self

    @classmethod
    def from_run_config(cls, config: Mapping[str, RunConfigValue]) -> Settings:
        """Validate a flat run-config; missing keys get their defaults.

        Parameters
        ----------
        config
            Dotted kebab-case keys with values of type int, float, bool or str, as in Flower's ``context.run_config``.

        Raises
        ------
        SettingsError
            If a key is unknown, has a value of the wrong type or out of range, or contradicts another key. The
            message has one line for each such key, with its value and what is allowed.
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
        """Return the settings as a flat run-config, the inverse of `from_run_config`."""
        out: dict[str, RunConfigValue] = {}
        for key in flat_fields():
            stage, name = key.split(".", 1)
            value = getattr(getattr(self, stage), name.replace("-", "_"))
            out[key] = ",".join(str(item) for item in value) if isinstance(value, tuple) else value
        return out

    def replace(self, **changes: RunConfigValue) -> Settings:
        """Return validated settings with some keys changed, as in ``replace(**{"run.seed": 7})``."""
        return Settings.from_run_config({**self.flat(), **changes})


def flat_fields() -> dict[str, FieldInfo]:
    """Return the pydantic field of every key of the run-config, in order."""
    out = {}
    for stage, field in Settings.model_fields.items():
        model = field.annotation
        assert isinstance(model, type)
        assert issubclass(model, Stage)
        for name, sub in model.model_fields.items():
            out[f"{stage}.{kebab(name)}"] = sub
    return out
