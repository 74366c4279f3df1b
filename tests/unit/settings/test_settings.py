"""Settings: what is accepted, what each mistake is told, and that all places that show them agree."""

import json
import tomllib
from pathlib import Path

import pytest

from fedmitr_flwr.settings import RunConfigValue, Settings, SettingsError, flat_fields
from fedmitr_flwr.settings import docs as settings_docs

ROOT = Path(__file__).resolve().parents[3]


def message(**config: RunConfigValue) -> str:
    with pytest.raises(SettingsError) as caught:
        Settings.from_run_config(config)
    return str(caught.value)


def test_an_empty_run_config_gives_the_defaults():
    assert Settings.from_run_config({}) == Settings()


def test_flat_is_the_inverse_of_from_run_config():
    settings = Settings.from_run_config({"inversion.stops": "3,9", "inversion.fractions": "0.5,0.25", "run.seed": 7})
    assert settings.inversion.stops == (3, 9)
    assert settings.inversion.fractions == (0.5, 0.25)
    assert Settings.from_run_config(settings.flat()) == settings


def test_flat_has_every_key_in_flower_s_types_only():
    flat = Settings().flat()
    assert list(flat) == list(flat_fields())
    assert {type(value) for value in flat.values()} <= {bool, int, float, str}


def test_pyproject_declares_exactly_the_defaults():
    table = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["flwr"]["app"]["config"]
    declared = dict(settings_docs.flatten(table))
    expected = Settings().run_config()
    assert declared == expected, "run `make settings`"
    assert {key: type(value) for key, value in declared.items()} == {k: type(v) for k, v in expected.items()}


def test_pyproject_has_no_deprecated_federations_table():
    assert "federations" not in tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["flwr"]


def test_the_settings_page_is_what_the_fields_say():
    assert (ROOT / "docs" / "settings.md").read_text("utf-8") == settings_docs.to_markdown(), "run `make settings`"


@pytest.mark.parametrize("entry", settings_docs.entries(), ids=lambda entry: entry.key)
def test_every_key_says_what_it_does_and_what_it_takes(entry: settings_docs.Entry):
    assert entry.description.strip().endswith((".", "`"))
    assert entry.allowed
    assert f"`{entry.key}`" in settings_docs.to_markdown()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"inversion.iteration": 9}, "inversion.iteration = 9: unknown key; did you mean inversion.iterations?"),
        ({"seed": 1}, "seed = 1: unknown key; did you mean run.seed?"),
        ({"zzz": True}, "zzz = true: unknown key; see docs/settings.md for all keys"),
        ({"run.seed": "x"}, 'run.seed = "x": must be an integer >= 0 and <= 2147483647'),
        ({"run.seed": 1.5}, "run.seed = 1.5: must be an integer >= 0"),
        ({"run.seed": True}, "run.seed = true: must be an integer >= 0"),
        ({"run.seed": -1}, "run.seed = -1: must be an integer >= 0"),
        ({"train.balanced-softmax": 1}, "train.balanced-softmax = 1: must be true or false"),
        ({"model.name": 3}, "model.name = 3: must be a string"),
        ({"data.source": "mnist"}, 'data.source = "mnist": must be a string matching'),
        ({"data.source": "hub:"}, 'data.source = "hub:": must be a string matching'),
        ({"data.source": "folder:caf\udce9"}, "must be valid UTF-8; rename the file or folder that it names"),
        ({"partition.alpha": 0.0}, "partition.alpha = 0.0: must be a number > 0"),
        ({"inversion.beta1": 1.0}, "inversion.beta1 = 1.0: must be a number >= 0.0 and < 1.0"),
        ({"partition.kind": "iif"}, 'partition.kind = "iif": must be one of "dirichlet", "iid"'),
        ({"inversion.learning-rate": float("nan")}, "inversion.learning-rate = nan: must be a number"),
        ({"inversion.stops": "a,b"}, "inversion.stops = "),
    ],
)
def test_a_wrong_key_or_value_is_named_with_what_is_allowed(config: dict[str, RunConfigValue], expected: str):
    assert expected in message(**config)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"inversion.stops": "9,3"}, 'inversion.stops = "9,3": must be strictly increasing'),
        ({"inversion.stops": "3,3"}, 'inversion.stops = "3,3": must be strictly increasing'),
        ({"inversion.iterations": 18}, 'inversion.stops = "6,10,14,18": must be below inversion.iterations = 18'),
        ({"inversion.stops": "5,10"}, "must have as many entries as inversion.stops (2), has 4"),
        ({"inversion.fractions": "0.3,0.3,0.3,1.0"}, "every entry must be above 0 and below 1"),
        ({"inversion.stops": "", "inversion.fractions": ""}, 'density.rule = "survival": needs inversion.stops'),
        ({"ensemble.weighting": "histogram"}, 'ensemble.weighting = "histogram": needs train.share-label-histogram'),
        ({"run.method": "lda"}, 'run.method = "lda": needs train.share-moments = true'),
        ({"run.method": "ridge"}, 'run.method = "ridge": needs train.share-moments = true'),
        ({"data.mean": "0.5,0.5", "data.std": "0.5"}, "data.std = "),
        ({"data.mean": "0.5", "data.std": "0.0"}, "data.std = "),
        ({"distill.kl-weight": 0.0, "distill.ce-weight": 0.0, "distill.low-weight": 0.0}, "must not all be 0"),
    ],
)
def test_a_contradiction_names_the_keys(config: dict[str, RunConfigValue], expected: str):
    assert expected in message(**config)


def test_all_mistakes_are_told_at_once():
    lines = message(**{"run.seed": -1, "train.epochs": -2, "distill.steps": "many"}).splitlines()
    assert [line.split(" = ")[0] for line in lines] == ["run.seed", "train.epochs", "distill.steps"]


@pytest.mark.parametrize("text", ["3,7", "3, 7", "[3, 7]", " [3,7,] "])
def test_lists_are_read_with_and_without_brackets(text: str):
    settings = Settings().replace(**{"inversion.stops": text, "inversion.fractions": "[0.3, 0.3]"})
    assert settings.inversion.stops == (3, 7)


def test_settings_cannot_be_changed_in_place():
    with pytest.raises(ValueError, match="frozen"):
        Settings().run.seed = 1


def test_toml_of_settings_reads_back_as_the_same_values():
    config: dict[str, RunConfigValue] = {
        "a.text": 'quotes " and \\ and ä and\nlines',
        "a.true": True,
        "a.whole": 3,
        "b.small": 1e-05,
        "b.large": 1e22,
        "b.whole-float": 2.0,
    }
    read = dict(settings_docs.flatten(tomllib.loads(settings_docs.to_toml(config))))
    assert read == config
    assert [type(value) for value in read.values()] == [type(value) for value in config.values()]


def test_the_json_form_lists_every_key():
    assert [entry["key"] for entry in json.loads(settings_docs.to_json())] == list(flat_fields())


@pytest.mark.parametrize("rest", ["\n[tool.ruff]\nline-length = 1\n", ""])
def test_writing_the_block_into_pyproject_twice_changes_nothing_and_keeps_the_rest(rest: str):
    before = '[tool.flwr.app.components]\nserverapp = "a:b"\n' + rest
    once = settings_docs.with_config(before)
    assert settings_docs.with_config(once) == once
    tools = tomllib.loads(once)["tool"]
    assert tools["flwr"]["app"]["components"] == {"serverapp": "a:b"}
    assert dict(settings_docs.flatten(tools["flwr"]["app"]["config"])) == Settings().run_config()
    assert ("ruff" in tools) == bool(rest)


DIGITS: dict[str, RunConfigValue] = {
    "data.source": "digits",
    "model.options": "patch_size=2,embed_dim=16,depth=1,num_heads=1",
    "model.init": "seeded",
}


@pytest.mark.parametrize(
    ("config", "clients", "expected"),
    [
        ({"model.options": "patch_size=3,embed_dim=16,depth=1,num_heads=1"}, 3, ("patch", "8")),
        ({"data.classes": 11}, 3, ("data.classes = 11", "10")),
        ({"model.name": "no_such_vit"}, 3, ('model.name = "no_such_vit"',)),
        ({"partition.kind": "iid"}, 5000, ("5000", "images")),
        ({"partition.kind": "natural"}, 3, ("partition.column", "domain")),
        ({"run.device": "cuda:99"}, 3, ('run.device = "cuda:99"',)),
        ({"data.source": "folder:no/such/place"}, 3, ("data.source", "no/such/place")),
    ],
)
def test_what_data_model_and_machine_contradict_is_told_before_a_client_starts(
    config: dict[str, RunConfigValue], clients: int, expected: tuple[str, ...]
):
    from fedmitr_flwr.federation.prepare import prepare

    assert prepare(Settings.from_run_config(DIGITS), 3).spec.num_classes == 10
    with pytest.raises(SettingsError) as caught:
        prepare(Settings.from_run_config({**DIGITS, **config}), clients)
    for words in expected:
        assert words in str(caught.value)
