"""What a forgotten step would break is found here: each name has its implementation and its description."""

from __future__ import annotations

from collections.abc import Iterable
from typing import get_args

import pytest

from fedmitr_flwr.ensemble.combining import COMBINATIONS
from fedmitr_flwr.ensemble.weighting import WEIGHTINGS
from fedmitr_flwr.pipeline.methods import METHODS
from fedmitr_flwr.pipeline.starts import STARTS
from fedmitr_flwr.results.metrics import METRICS
from fedmitr_flwr.settings import (
    Combination,
    InversionName,
    MethodName,
    RandomFamily,
    Settings,
    StudentStart,
    Weighting,
    choices,
)
from fedmitr_flwr.settings.choices import RecipeName
from fedmitr_flwr.settings.recipes import RECIPES
from fedmitr_flwr.stages.inversion.methods import INVERSION
from fedmitr_flwr.stages.random_images.families import FAMILIES
from fedmitr_flwr.training.reported import REPORTED
from tests.pages import ROOT

LISTS = {
    "run.method": (MethodName, METHODS, choices.METHODS),
    "run.recipe": (RecipeName, ("auto", *RECIPES), choices.RECIPES),
    "ensemble.weighting": (Weighting, WEIGHTINGS, choices.WEIGHTINGS),
    "ensemble.combine": (Combination, COMBINATIONS, choices.COMBINATIONS),
    "inversion.method": (InversionName, INVERSION, choices.INVERSIONS),
    "distill.start": (StudentStart, STARTS, choices.STUDENT_STARTS),
    "distill.noise-kind": (RandomFamily, FAMILIES, choices.RANDOM_FAMILIES),
}


@pytest.mark.parametrize("key", LISTS)
def test_names_implementations_and_descriptions_agree(key: str) -> None:
    names, registry, described = LISTS[key]
    assert get_args(names) == tuple(registry) == tuple(choice.name for choice in described)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_says_what_the_server_did_and_fixes_settings_that_are_valid(name: str) -> None:
    method = METHODS[name]
    settings = method.resolve(Settings().replace(**{"run.method": name, "train.share-moments": True}))
    assert method.resolve(settings) == settings
    assert method.title
    assert method.server_part(settings).startswith("It ")
    assert method.server_part(settings).endswith(".")


def test_methods_that_need_moments_are_methods() -> None:
    assert set(choices.MOMENT_METHODS) <= METHODS.keys()


@pytest.mark.parametrize("name", METHODS)
def test_the_page_on_comparing_explains_each_method(name: str) -> None:
    assert f"`{name}`" in (ROOT / "docs" / "comparing.md").read_text("utf-8")


@pytest.mark.parametrize("names", [[metric.name for metric in METRICS], [number.name for number in REPORTED]])
def test_names_of_numbers_are_unique_identifiers(names: Iterable[str]) -> None:
    names = list(names)
    assert len(set(names)) == len(names)
    assert all(name.isidentifier() for name in names)
