"""Settings of a run: one frozen pydantic model for each stage, and `Settings`, which combines them.

The models alone define keys, types, ranges and defaults; the defaults are those of the demo. `settings.docs` copies
them to ``pyproject.toml``, because Flower accepts only keys that are declared there, and to ``docs/settings.md``. A
test compares all three.
"""

from fedmitr_flwr.settings.choices import (
    Augmentation,
    Combination,
    InversionName,
    MethodName,
    Precision,
    RandomFamily,
    StudentStart,
    UploadDtype,
    Weighting,
)
from fedmitr_flwr.settings.client_stages import DataSettings, ModelSettings, PartitionSettings, TrainSettings
from fedmitr_flwr.settings.ensemble import EnsembleSettings, MomentsSettings
from fedmitr_flwr.settings.generator import GeneratorSettings
from fedmitr_flwr.settings.run import RunSettings, Settings, flat_fields
from fedmitr_flwr.settings.run_config import RunConfigValue, SettingsError
from fedmitr_flwr.settings.server_stages import (
    DensitySettings,
    DistillSettings,
    InversionSettings,
    RelabelSettings,
)

__all__ = [
    "Augmentation",
    "Combination",
    "DataSettings",
    "DensitySettings",
    "DistillSettings",
    "EnsembleSettings",
    "GeneratorSettings",
    "InversionName",
    "InversionSettings",
    "MethodName",
    "ModelSettings",
    "MomentsSettings",
    "PartitionSettings",
    "Precision",
    "RandomFamily",
    "RelabelSettings",
    "RunConfigValue",
    "RunSettings",
    "Settings",
    "SettingsError",
    "StudentStart",
    "TrainSettings",
    "UploadDtype",
    "Weighting",
    "flat_fields",
]
