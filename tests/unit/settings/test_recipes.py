"""Recipes: values for keys that are not named, whichever way the settings reach the run."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from flwr.common.config import get_fused_config_from_dir, parse_config_args
from typer.testing import CliRunner

from fedmitr_flwr import cli
from fedmitr_flwr.launch.settings_files import given_settings, run_settings
from fedmitr_flwr.runs.atomic import write_json
from fedmitr_flwr.runs.resume import changes_in, resumed_recipe, resumed_settings
from fedmitr_flwr.settings import RunConfigValue, Settings, SettingsError, docs, flat_fields, recipes

ROOT = Path(__file__).resolve().parents[3]
DEFAULTS = Settings().flat()
KEYS = sorted(recipes.KEYS)
CHANGED = [key for key, value in recipes.PRETRAINED.items() if value != DEFAULTS[key]]
PHOTOGRAPHS: dict[str, RunConfigValue] = {"model.init": "file:vit.safetensors", "data.source": "folder:photographs"}


def flower(*run_config: str) -> dict[str, Any]:
    """The run-config that an app gets from ``flwr run . --run-config ...``."""
    return dict(get_fused_config_from_dir(ROOT, parse_config_args(list(run_config))))


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_the_values_of_a_recipe_are_valid_together_and_written_as_settings_return_them(name: str) -> None:
    settings = Settings.from_run_config({"run.recipe": name})
    values = settings.flat()
    for key, value in recipes.RECIPES[name].items():
        assert (values[key], type(values[key])) == (value, type(value)), key
    assert settings.applied_recipe().keys == tuple(recipes.RECIPES[name])
    assert {key: value for key, value in values.items() if key not in recipes.RECIPES[name]} == {
        key: value for key, value in DEFAULTS.items() if key not in recipes.RECIPES[name]
    } | {"run.recipe": name}


@pytest.mark.parametrize("key", KEYS)
def test_a_recipe_has_no_key_that_decides_on_the_recipe_or_belongs_to_the_data(key: str) -> None:
    assert key in flat_fields()
    assert key.split(".")[0] not in ("run", "data", "partition", "model")


@pytest.mark.parametrize("key", KEYS)
def test_no_key_of_a_recipe_has_a_value_that_reads_as_not_named(key: str) -> None:
    with pytest.raises(SettingsError):
        Settings._validated({key: recipes.UNNAMED})


@pytest.mark.parametrize("init", ["glyphs", "seeded"])
def test_the_recipe_for_models_from_scratch_changes_nothing(init: str) -> None:
    assert recipes.RECIPES["scratch"] == {}
    for asked in ({}, {"run.recipe": "scratch"}):
        settings = Settings.from_run_config({"model.init": init, **asked})
        assert settings.flat() == {**DEFAULTS, "model.init": init, **asked}
        assert settings.applied_recipe().name == "scratch"


@pytest.mark.parametrize(
    ("config", "name", "reason"),
    [
        ({}, "scratch", 'model.init = "glyphs"'),
        ({"model.init": "seeded"}, "scratch", 'model.init = "seeded"'),
        ({"model.init": "pretrained"}, "pretrained", 'model.init = "pretrained"'),
        ({"model.init": "file:a.safetensors"}, "pretrained", 'model.init = "file:a.safetensors"'),
        ({"model.init": "pretrained", "run.recipe": "scratch"}, "scratch", 'run.recipe = "scratch"'),
        ({"model.init": "seeded", "run.recipe": "pretrained"}, "pretrained", 'run.recipe = "pretrained"'),
    ],
)
def test_the_recipe_follows_the_model_unless_it_is_named(config: dict[str, Any], name: str, reason: str) -> None:
    settings = Settings.from_run_config(config)
    recipe = settings.applied_recipe()
    assert (recipe.name, recipe.reason) == (name, reason)
    assert {key: settings.flat()[key] for key in KEYS} == {
        key: recipes.RECIPES[name].get(key, DEFAULTS[key]) for key in KEYS
    }


@pytest.mark.parametrize("config", [{"run.recipe": "best"}, {"model.init": "imagenet"}])
def test_a_wrong_choice_is_refused_by_its_key(config: dict[str, Any]) -> None:
    (key,) = config
    with pytest.raises(SettingsError, match=rf'{key} = "\w+": must be') as caught:
        Settings.from_run_config(config)
    assert len(caught.value.problems) == 1


def test_the_sentence_says_which_recipe_why_and_how_many_keys() -> None:
    total = len(recipes.PRETRAINED)
    say = [
        str(Settings.from_run_config(config).applied_recipe())
        for config in ({}, {"model.init": "pretrained"}, {"model.init": "pretrained", "train.epochs": 1})
    ]
    assert say == [
        'Recipe scratch, because model.init = "glyphs": keys that are not named have their defaults',
        f'Recipe pretrained, because model.init = "pretrained": it sets {total} keys',
        f'Recipe pretrained, because model.init = "pretrained": it sets {total - 1} of its {total} keys, because the '
        "others are named",
    ]


def test_an_error_says_that_the_value_is_from_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(recipes.RECIPES, "pretrained", {"inversion.stops": "9,12,15,18"})  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match=r"inversion\.stops = .*must be below.*from the recipe pretrained, so name"):
        Settings.from_run_config({"model.init": "pretrained", "inversion.iterations": 10})
    with pytest.raises(SettingsError) as caught:
        Settings.from_run_config({"model.init": "pretrained", "inversion.stops": "3,50,51,52"})
    assert "recipe" not in str(caught.value)


# A named key keeps its value in each way of naming it, also if the value is the default.


@pytest.mark.parametrize("key", CHANGED)
def test_a_key_that_the_library_names_wins(key: str) -> None:
    settings = Settings.from_run_config({**PHOTOGRAPHS, key: DEFAULTS[key]})
    assert settings.flat()[key] == DEFAULTS[key]
    assert settings.applied_recipe().named == (key,)


@pytest.mark.parametrize("key", CHANGED)
def test_a_key_that_a_file_or_the_command_line_names_wins(key: str, tmp_path: Path) -> None:
    named = docs.to_toml({key: DEFAULTS[key]})
    (tmp_path / "named.toml").write_text('model.init = "pretrained"\n' + named)
    (tmp_path / "plain.toml").write_text('model.init = "pretrained"\n')
    ways: list[tuple[str, list[str], str]] = [
        ("named.toml", [], str(tmp_path / "named.toml")),
        ("plain.toml", [f"{key}={DEFAULTS[key]}"], "--set"),
    ]
    for file, overrides, origin in ways:
        settings, origins = given_settings(ROOT, tmp_path / file, overrides)
        assert (settings.flat()[key], origins[key]) == (DEFAULTS[key], origin)
        others = [other for other in KEYS if other != key]
        assert {origins[other] for other in others} == {"recipe pretrained"}
        assert {k: settings.flat()[k] for k in others} == {k: recipes.PRETRAINED[k] for k in others}


@pytest.mark.parametrize("key", CHANGED)
def test_a_key_that_a_run_config_of_flower_names_wins(key: str, tmp_path: Path) -> None:
    line = f"{key} = {docs.toml_value(DEFAULTS[key])}"
    file = tmp_path / "run.toml"
    file.write_text(f'model.init = "pretrained"\n{line}\n')
    for told in (flower(str(file)), flower(f"model.init='pretrained' {line.replace(' ', '')}")):
        settings = Settings.from_run_config(told)
        assert settings.flat()[key] == DEFAULTS[key]
        assert settings.applied_recipe().named == (key,)
    plain = Settings.from_run_config(flower("model.init='pretrained'"))
    assert plain.flat() == DEFAULTS | recipes.PRETRAINED | {"model.init": "pretrained"}
    assert Settings.from_run_config(flower()) == Settings()


@pytest.mark.parametrize("key", CHANGED)
def test_a_key_that_an_app_s_pyproject_names_wins(key: str, tmp_path: Path) -> None:
    line = f'{key} = "{recipes.UNNAMED}"\n'
    text = docs.pyproject_block()
    assert line in text
    (tmp_path / "pyproject.toml").write_text(text.replace(line, docs.to_toml({key: DEFAULTS[key]})))
    assert run_settings(tmp_path, None, ["model.init=pretrained"]).flat()[key] == DEFAULTS[key]


def test_a_key_can_be_given_back_to_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "named.toml").write_text('model.init = "pretrained"\ntrain.epochs = 9\n')
    settings, origins = given_settings(ROOT, tmp_path / "named.toml", ["train.epochs=recipe"])
    assert settings.train.epochs == recipes.PRETRAINED["train.epochs"]
    assert origins["train.epochs"] == "recipe pretrained"
    with pytest.raises(SettingsError, match=r'train\.max-steps = "recipe": must be an integer'):
        given_settings(ROOT, None, ["train.max-steps=recipe"])


# The values stay the same on the way to the server, to the clients and through a resumed run.


@pytest.mark.parametrize("config", [{}, PHOTOGRAPHS, {**PHOTOGRAPHS, "train.epochs": 1, "train.augment": "strong"}])
def test_the_server_gets_the_settings_that_the_launcher_checked(config: dict[str, Any]) -> None:
    launched = Settings.from_run_config(config).replace(**{"run.name": "a", "run.output": "/tmp/x"})
    told = dict(docs.flatten(tomllib.loads(docs.to_toml(launched.run_config()))))
    assert told.keys() == DEFAULTS.keys()
    served = Settings.from_run_config(told)
    assert served == launched
    assert served.applied_recipe() == launched.applied_recipe() == Settings.from_run_config(config).applied_recipe()


def test_values_of_another_recipe_reach_the_server_as_they_are() -> None:
    launched = Settings().replace(**{"model.init": "pretrained"})
    assert launched.flat() == {**DEFAULTS, "model.init": "pretrained"}
    assert Settings.from_run_config(launched.run_config()) == launched


def test_replacing_values_applies_no_recipe_and_keeps_the_values_of_the_first() -> None:
    settings = Settings.from_run_config(PHOTOGRAPHS)
    scratch = settings.replace(**{"model.init": "glyphs"})
    assert scratch.flat() == {**settings.flat(), "model.init": "glyphs"}
    changed = settings.replace(**{"train.epochs": 3})
    assert changed.train.epochs == 3
    assert changed.applied_recipe().named == ("train.epochs",)
    assert changed.replace(**{"train.epochs": recipes.UNNAMED}) == settings
    assert Settings(model=settings.model).train == Settings().train


def test_clients_get_the_values_that_the_server_resolved() -> None:
    settings = Settings.from_run_config(PHOTOGRAPHS)
    sent = json.dumps(settings.flat())
    assert recipes.UNNAMED not in json.loads(sent).values()
    received = Settings.from_stored(json.loads(sent))
    assert received == settings
    assert json.dumps(received.flat()) == sent


def started(folder: Path, config: dict[str, Any]) -> Settings:
    """Leave the files of a run that started with a run-config and has one upload."""
    settings = Settings.from_run_config(config)
    recipe = json.loads(json.dumps(vars(settings.applied_recipe())))
    (folder / "uploads" / "round-1").mkdir(parents=True)
    (folder / "uploads" / "round-1" / "partition-0.safetensors").touch()
    write_json(folder / "config.json", {"settings": dict(settings.flat()), "recipe": recipe})
    return settings


def without_place(settings: Settings) -> dict[str, RunConfigValue]:
    return {k: v for k, v in settings.flat().items() if k not in ("run.output", "run.name", "run.resume")}


def test_a_resumed_run_keeps_its_values_when_the_recipe_has_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    before = started(run, {**PHOTOGRAPHS, "train.min-steps": 300})
    changed = {key: DEFAULTS[key] for key in recipes.PRETRAINED} | {"distill.steps": 7}
    monkeypatch.setitem(recipes.RECIPES, "pretrained", changed)  # type: ignore[arg-type]
    monkeypatch.setattr(recipes, "KEYS", frozenset(changed))
    settings = resumed_settings(run, {})
    assert without_place(settings) == without_place(before)
    # As `fedmitr resume` passes them on, and as `flwr run` does.
    for told in (settings.run_config(), {**flower(), **PHOTOGRAPHS, "run.resume": str(run)}):
        again = resumed_settings(run, changes_in(Settings.from_run_config(told), run))
        assert without_place(again) == without_place(before)
        recipe = resumed_recipe(run, again)
        assert (recipe.name, recipe.named) == ("pretrained", ("train.min-steps",))
        assert set(recipe.keys) == recipes.PRETRAINED.keys() - {"train.min-steps"}


@pytest.mark.parametrize("key", CHANGED)
def test_a_resumed_run_takes_a_named_key_even_with_its_default(key: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    started(run, PHOTOGRAPHS)
    value = docs.toml_value(DEFAULTS[key])
    given = Settings.from_run_config(flower(f"run.resume='{run}' {key}={value}"))
    assert changes_in(given, run) == {"run.resume": str(run), key: DEFAULTS[key]}
    if key.startswith("train."):
        with pytest.raises(SettingsError, match=rf"{key} = .*cannot change, because the run has finished uploads"):
            resumed_settings(run, changes_in(given, run))
    else:
        settings = resumed_settings(run, changes_in(given, run))
        assert settings.flat()[key] == DEFAULTS[key]
        assert key in resumed_recipe(run, settings).named


def test_the_recipe_of_a_run_cannot_change_when_it_is_resumed(tmp_path: Path) -> None:
    before = started(tmp_path / "run", PHOTOGRAPHS)
    with pytest.raises(SettingsError, match=r'run\.recipe = "scratch": cannot change, because a recipe applies only'):
        resumed_settings(tmp_path / "run", {"run.recipe": "scratch"})
    settings = resumed_settings(tmp_path / "run", {"run.recipe": "auto", "train.epochs": recipes.UNNAMED})
    assert without_place(settings) == without_place(before)


def test_a_run_of_a_version_without_recipes_keeps_its_values(tmp_path: Path) -> None:
    stored = {k: v for k, v in {**DEFAULTS, **PHOTOGRAPHS}.items() if k not in ("run.recipe", "train.augment")}
    (tmp_path / "run").mkdir()
    write_json(tmp_path / "run" / "config.json", {"settings": stored})
    settings = resumed_settings(tmp_path / "run", {})
    assert without_place(settings) == without_place(Settings().replace(**PHOTOGRAPHS, **{"run.recipe": "scratch"}))
    assert resumed_recipe(tmp_path / "run", settings).name == "scratch"


# What people see.


def test_the_command_lists_values_and_where_each_comes_from(tmp_path: Path) -> None:
    conf = tmp_path / "my.toml"
    conf.write_text('model.init = "pretrained"\ntrain.min-steps = 300\n')
    ask = ["settings", str(conf), "--set", "train.epochs=2"]
    lines = CliRunner().invoke(cli.app, ask).stdout.splitlines()
    total = len(recipes.PRETRAINED)
    assert lines[0].endswith(f"it sets {total - 2} of its {total} keys, because the others are named")
    assert "train.epochs = 2    [an integer >= 0 and <= 10000; default 1; from --set]" in lines
    assert f"train.min-steps = 300    [an integer >= 0 and <= 1000000; from {conf}]" in lines
    assert 'train.augment = "none"    [one of "none", "shift", "flip", "strong"; default "shift"; from recipe pre' in (
        "\n".join(lines)
    )
    assert "train.max-steps = 100000    [an integer >= 1; the default]" in lines
    entries = {entry["key"]: entry for entry in json.loads(CliRunner().invoke(cli.app, [*ask, "-f", "json"]).stdout)}
    assert (entries["train.augment"]["value"], entries["train.augment"]["origin"]) == ("none", "recipe pretrained")
    assert entries["train.augment"]["recipes"] == {"pretrained": "none"}
    assert entries["run.seed"]["origin"] == "default"
    text = CliRunner().invoke(cli.app, [*ask, "-f", "toml"]).stdout
    assert 'train.augment = "none"  # recipe pretrained' in text
    assert (
        dict(docs.flatten(tomllib.loads(text))) == run_settings(ROOT, conf, ["train.epochs=2"], absolute=False).flat()
    )


def test_the_settings_page_shows_the_recipe_s_value_where_it_differs() -> None:
    page = docs.to_markdown()
    for key, value in recipes.PRETRAINED.items():
        shown = f"`{docs.toml_value(DEFAULTS[key])}`"
        shown += f"; `pretrained`: `{docs.toml_value(value)}`" if key in CHANGED else ""
        assert f"| `{key}` | {shown} |" in page
