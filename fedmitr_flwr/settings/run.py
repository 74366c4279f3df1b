"""Settings of the whole run, and `Settings`, which combines the settings of all stages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, Self

from pydantic import Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from fedmitr_flwr.settings import recipes
from fedmitr_flwr.settings.choices import METHODS, MOMENT_METHODS, RECIPES, MethodName, RecipeName, described
from fedmitr_flwr.settings.client_stages import DataSettings, ModelSettings, PartitionSettings, TrainSettings
from fedmitr_flwr.settings.ensemble import EnsembleSettings, MomentsSettings
from fedmitr_flwr.settings.generator import GeneratorSettings
from fedmitr_flwr.settings.run_config import RunConfigValue, SettingsError, Stage, kebab, problems_of, unknown_hint
from fedmitr_flwr.settings.server_stages import (
    DensitySettings,
    DistillSettings,
    InversionSettings,
    RelabelSettings,
)


class RunSettings(Stage):
    """Settings of the whole run: method, device, results, clients and time limits."""

    method: MethodName = Field("fedmitr", description=described("Way from the uploads to one model.", METHODS))
    recipe: RecipeName = Field(
        "auto",
        description=described("Source of the values for keys of a recipe that are not named.", RECIPES)
        + " It applies when a run starts, and not again when the run is resumed.",
    )
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
    moments: MomentsSettings = MomentsSettings()
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
        if self.run.method in MOMENT_METHODS and not self.train.share_moments:
            allowed = "needs train.share-moments = true, so that the clients upload feature moments"
            problems.append(("run.method", self.run.method, allowed))
        if self.distill.start == "moments" and not self.train.share_moments:
            allowed = "needs train.share-moments = true, so that the clients upload feature moments"
            problems.append(("distill.start", "moments", allowed))
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

    @property
    def expert(self) -> Literal["", "moments", "merged"]:
        """Kind of the ensemble's expert, by `ensemble.moments-weight` and `ensemble.merged-weight`; empty: none."""
        if self.train.share_moments and self.ensemble.moments_weight > 0.0:
            return "moments"
        return "merged" if self.ensemble.merged_weight > 0.0 else ""

    @classmethod
    def from_run_config(cls, config: Mapping[str, RunConfigValue]) -> Settings:
        """Validate a flat run-config; missing keys get the value of the recipe (`run.recipe`), or else their default.

        `Settings(...)`, `replace` and `from_stored` apply no recipe.

        Parameters
        ----------
        config
            Dotted kebab-case keys with values of type int, float, bool or str, as in Flower's ``context.run_config``.
            A key of a recipe with the value `recipes.UNNAMED` counts as missing.

        Raises
        ------
        SettingsError
            If a key is unknown, has a value of the wrong type or out of range, or contradicts another key. The
            message has one line for each such key, with its value and what is allowed.
        """
        named = {key: value for key, value in config.items() if not recipes.is_unnamed(key, value)}
        init = named.get("model.init", ModelSettings().init)
        name, _ = recipes.choose(named.get("run.recipe", RunSettings().recipe), init)
        added = {key: value for key, value in recipes.RECIPES[name].items() if key not in named}
        try:
            settings = cls._validated({**named, **added})
        except SettingsError as error:
            note = f"; the value is from the recipe {name}, so name the key to set another"
            problems = ((key, value, allowed + note * (key in added)) for key, value, allowed in error.problems)
            raise SettingsError(*problems) from None
        settings._mark_unnamed(added)
        return settings

    @classmethod
    def from_stored(cls, config: Mapping[str, RunConfigValue]) -> Settings:
        """Validate settings that `flat` returned earlier; missing keys get their default and no recipe is applied.

        Keys are missing if an older version stored the settings. An older version also had no recipes.

        Raises
        ------
        SettingsError
            As for `from_run_config`.
        """
        return cls._validated({**Settings().flat(), "run.recipe": "scratch", **config})

    @classmethod
    def _validated(cls, config: Mapping[str, RunConfigValue]) -> Settings:
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
        """Return all values as a flat run-config in which every key is named."""
        out: dict[str, RunConfigValue] = {}
        for key in flat_fields():
            value = getattr(*self._place(key))
            out[key] = ",".join(str(item) for item in value) if isinstance(value, tuple) else value
        return out

    def run_config(self) -> dict[str, RunConfigValue]:
        """Return the run-config from which `from_run_config` makes these settings, with the same keys named."""
        values = self.flat()
        follow = {**Settings().flat(), **recipes.RECIPES[self.applied_recipe().name]}
        free = {key: recipes.UNNAMED for key in self.unnamed() if values[key] == follow[key]}
        return {**values, **free}

    def unnamed(self) -> frozenset[str]:
        """Return the keys of recipes that were not named: they have the recipe's value or their default."""
        places = {key: self._place(key) for key in recipes.KEYS}
        return frozenset(key for key, (stage, name) in places.items() if name not in stage.model_fields_set)

    def applied_recipe(self) -> recipes.Recipe:
        """Return the recipe, the reason for it, and the keys that have their values from it."""
        name, reason = recipes.choose(self.run.recipe, self.model.init)
        values, unnamed = self.flat(), self.unnamed()
        wanted = recipes.RECIPES[name]
        keys = tuple(key for key in wanted if key in unnamed and values[key] == wanted[key])
        return recipes.Recipe(name, reason, keys, tuple(key for key in wanted if key not in keys))

    def replace(self, **changes: RunConfigValue) -> Settings:
        """Return validated settings with some keys changed, as in ``replace(**{"run.seed": 7})``.

        All other values stay as they are: no recipe is applied again. To give a key of a recipe the recipe's value,
        change it to `recipes.UNNAMED`.
        """
        settings = Settings.from_run_config({**self.flat(), **changes})
        settings._mark_unnamed(self.unnamed() - changes.keys())
        return settings

    def _place(self, key: str) -> tuple[Stage, str]:
        """Return the stage and the field of a key."""
        stage, name = key.split(".", 1)
        return getattr(self, stage), name.replace("-", "_")

    def _mark_unnamed(self, keys: Iterable[str]) -> None:
        """Take keys out of pydantic's record of the fields that were given; it is not part of a comparison."""
        for key in keys:
            stage, name = self._place(key)
            stage.model_fields_set.discard(name)


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
