"""Recipes: sets of values for keys that the user did not name.

Good values differ between a small model that is trained from scratch and a pretrained one. The setting `run.recipe`
chooses the set; by default the choice follows `model.init`. A key that the user names keeps the user's value, even if
that equals the default.

Flower merges the defaults in ``pyproject.toml`` with a user's run-config, so an app cannot tell a named key from a
default. In ``pyproject.toml`` the keys of the recipes therefore have the value `UNNAMED` in place of a default.
`Settings.from_run_config` replaces it.

To add a key to a recipe, add its line here and run ``make settings``. Keys of ``run``, ``data``, ``partition`` and
``model`` cannot be part of a recipe.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

Value = bool | int | float | str

UNNAMED = "recipe"
"""Value of a recipe's key that stands for "not named": the recipe applies, or else the default."""

SCRATCH: Mapping[str, Value] = {}
"""For a small model that starts from rendered letters or random weights. The defaults are made for it."""

PRETRAINED: Mapping[str, Value] = {
    "train.trainable": "last-2",  # the first blocks are good as they are; a small upload; one trunk for all teachers
    "train.head-start": "discriminant",  # heads of clients with other classes fit together
    "train.epochs": 5,  # a pretrained ViT needs few passes, and forgets with many
    "train.min-steps": 60,  # few steps for clients with few images, for the same reason
    "train.learning-rate": 1e-4,  # keeps what the weights already know
    "train.weight-decay": 0.0,  # would pull weights to 0 and not to the common initialisation
    "train.augment": "none",  # the frozen blocks then run once for each image; mirrored images did not help
    "ensemble.merged-weight": 1.0,  # the merged model is often better than the ensemble
    "inversion.start": "shapes",  # as for distill.noise-kind
    "inversion.images": 80,  # each costs much more than one of a small model, and they were worth little
    "distill.views": 3,  # two further views of each synthetic image
    "distill.noise": 10.0,  # random images for each synthetic image; each costs much more than one of a small model
    "distill.steps": 300,  # the student starts close to its goal
    "distill.feature-weight": 0.0,  # off, together with the next one: not measured with frozen blocks
    "distill.teacher-weight": 0.0,
    "distill.learning-rate": 1e-4,  # keeps what the student's start already knows
    "distill.noise-kind": "shapes",  # better than fields on CIFAR-10
    "distill.augment": "strong",  # the pool has few images, so each needs many different views
}
"""For a ViT with pretrained weights and photographs; `benchmarks/results/pretrained-notes.md` has the measurements."""

RECIPES: Mapping[str, Mapping[str, Value]] = {"scratch": SCRATCH, "pretrained": PRETRAINED}

KEYS = frozenset(key for values in RECIPES.values() for key in values)
"""Keys that at least one recipe sets."""


@dataclass(frozen=True)
class Recipe:
    """The recipe of a run.

    Attributes
    ----------
    name
        Name of the recipe in `RECIPES`.
    reason
        The key and value by which it was chosen.
    keys
        Keys that have their values from it.
    named
        Its other keys, which keep the values that they were given.
    """

    name: str
    reason: str
    keys: tuple[str, ...]
    named: tuple[str, ...] = ()

    def __str__(self) -> str:
        total = len(self.keys) + len(self.named)
        if total == 0:
            what = "keys that are not named have their defaults"
        elif self.named:
            what = f"it sets {len(self.keys)} of its {total} keys, because the others are named"
        else:
            what = f"it sets {total} keys"
        return f"Recipe {self.name}, because {self.reason}: {what}"


def choose(asked: object, init: object) -> tuple[str, str]:
    """Return the name of the recipe for `run.recipe` and `model.init`, and the reason for the choice.

    The recipe for wrong values is ``scratch``, because the validation of the settings reports them.
    """
    if asked != "auto":
        return (str(asked) if asked in RECIPES else "scratch"), f"run.recipe = {json.dumps(asked)}"
    pretrained = init == "pretrained" or (isinstance(init, str) and init.startswith("file:"))
    return ("pretrained" if pretrained else "scratch"), f"model.init = {json.dumps(init, ensure_ascii=False)}"


def is_unnamed(key: str, value: object) -> bool:
    """Return whether a value of a run-config says that its key is not named."""
    return key in KEYS and value == UNNAMED
