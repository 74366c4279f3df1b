"""Run settings: one frozen pydantic model a stage, composed into one.

The models are the only place where keys, types, ranges and defaults are defined; the defaults are the
demo. ``pyproject.toml`` repeats them because Flower accepts only keys that stand there, and
``docs/settings.md`` is generated from them; a test compares all three.
"""

from fedmitr_flwr.settings.choices import (
    Augmentation,
    InversionName,
    MethodName,
    Precision,
    RandomFamily,
    UploadDtype,
    Weighting,
)
from fedmitr_flwr.settings.client_stages import DataSettings, ModelSettings, PartitionSettings, TrainSettings
from fedmitr_flwr.settings.generator import GeneratorSettings
from fedmitr_flwr.settings.run import RunSettings, Settings, flat_fields
from fedmitr_flwr.settings.run_config import RunConfigValue, SettingsError
from fedmitr_flwr.settings.server_stages import (
    DensitySettings,
    DistillSettings,
    EnsembleSettings,
    InversionSettings,
    RelabelSettings,
)

__all__ = [
    "Augmentation",
    "DataSettings",
    "DensitySettings",
    "DistillSettings",
    "EnsembleSettings",
    "GeneratorSettings",
    "InversionName",
    "InversionSettings",
    "MethodName",
    "ModelSettings",
    "PartitionSettings",
    "Precision",
    "RandomFamily",
    "RelabelSettings",
    "RunConfigValue",
    "RunSettings",
    "Settings",
    "SettingsError",
    "TrainSettings",
    "UploadDtype",
    "Weighting",
    "flat_fields",
]
