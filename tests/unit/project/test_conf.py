"""The files in conf/: valid, explained, and true to what they say."""

import re
import tomllib
from pathlib import Path

import pytest

from fedmitr_flwr.launch.settings_files import federation_config, run_settings
from fedmitr_flwr.settings import Settings, flat_fields
from fedmitr_flwr.settings.docs import flatten

ROOT = Path(__file__).resolve().parents[3]
RUNS = sorted((ROOT / "conf").glob("*.toml"))
PUBLISHED = [path for path in RUNS if "_dir" in path.stem or path.stem == "office_home"]
OWN = [path for path in RUNS if path.stem in ("photographs", "cifar10_pretrained", "emojihome", "food12")]
FEDERATIONS = sorted((ROOT / "conf" / "federation").glob("*.toml"))


def by_name(path: Path) -> str:
    return path.stem


def comment(path: Path) -> str:
    lines = path.read_text("utf-8").splitlines()
    return "\n".join(line for line in lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])


@pytest.mark.parametrize("path", RUNS, ids=by_name)
def test_every_settings_file_is_valid(path: Path):
    settings = run_settings(ROOT, path)
    given = dict(flatten(tomllib.loads(path.read_text("utf-8"))))
    assert given.keys() <= flat_fields().keys()
    paths = ("run.output", "data.source", "model.init")
    shown = settings.flat()
    assert {key: shown[key] for key in given if key not in paths} == {k: v for k, v in given.items() if k not in paths}


@pytest.mark.parametrize("path", RUNS, ids=by_name)
def test_every_settings_file_begins_with_its_command_and_what_it_reproduces(path: Path):
    text = comment(path)
    assert f"fedmitr simulate conf/{path.name}" in text
    assert re.search(r"Reproduces:|Sets up:", text)
    assert re.search(r"README|measured with|not measured yet|mean nothing", text, flags=re.IGNORECASE)


@pytest.mark.parametrize("path", PUBLISHED, ids=by_name)
def test_a_published_run_does_not_change_with_a_recipe(path: Path):
    settings = run_settings(ROOT, path)
    assert (settings.model.init, settings.run.recipe) == ("pretrained", "scratch")
    assert settings == Settings().replace(**settings.flat())
    named = dict(flatten(tomllib.loads(path.read_text("utf-8")))) | {"run.output": settings.run.output}
    assert settings.flat() == Settings().flat() | named


@pytest.mark.parametrize("path", OWN, ids=by_name)
def test_a_run_on_own_images_with_a_pretrained_model_follows_the_recipe(path: Path):
    for overrides in ([], ["model.init=file:vit.safetensors"]):
        settings = run_settings(ROOT, path, overrides)
        recipe = settings.applied_recipe()
        assert recipe.name == "pretrained"
        # 55 classes need more images than the recipe has.
        assert recipe.named == (("inversion.images",) if path.stem == "emojihome" else ())
        assert settings.data.image_size % 14 == 0
    assert len(OWN) == 4


@pytest.mark.parametrize("path", [*RUNS, *FEDERATIONS], ids=by_name)
def test_the_files_that_a_comment_names_exist(path: Path):
    for name in re.findall(r"conf/[\w/.-]+\.toml", comment(path)):
        assert (ROOT / name).is_file(), name


def test_the_demo_file_has_the_defaults_a_name_and_three_quarters_of_the_distillation():
    demo = run_settings(ROOT, ROOT / "conf" / "demo.toml")
    plain = run_settings(ROOT)
    shorter = {"distill.steps": 3 * plain.distill.steps // 4, "distill.noise": 0.75 * plain.distill.noise}
    assert demo == plain.replace(**{"run.name": "demo", **shorter})
    assert plain == Settings().replace(**{"run.output": plain.run.output})


@pytest.mark.parametrize("path", FEDERATIONS, ids=by_name)
def test_every_federation_file_is_valid_and_holds_what_its_name_says(path: Path):
    number, _, gpu = path.stem.partition("-")
    config = federation_config(path)
    assert config["num-supernodes"] == int(number)
    assert (float(config["client-resources-num-gpus"]) > 0) == (gpu == "gpu")
    assert isinstance(config["client-resources-num-cpus"], int)


@pytest.mark.parametrize("path", FEDERATIONS, ids=by_name)
def test_the_resources_of_a_federation_are_ones_that_ray_can_give(path: Path):
    given = tomllib.loads(path.read_text("utf-8"))
    assert given.keys() == {"num-supernodes", "client-resources-num-cpus", "client-resources-num-gpus"}
    for cores in (1, 2, 64):  # a file that names no machine must fit each
        config = federation_config(path, cpus=cores)
        assert 1 <= config["client-resources-num-cpus"] <= config["init-args-num-cpus"]
    share = given["client-resources-num-gpus"]
    assert 0.0 <= share <= 1.0
    # Ray counts GPUs in ten-thousandths, and a share that does not divide a GPU leaves a part of it idle.
    assert share == round(share, 4)
    assert share == 0.0 or (1 / share).is_integer()


@pytest.mark.parametrize("path", FEDERATIONS, ids=by_name)
def test_the_comment_of_a_federation_says_what_it_holds(path: Path):
    config, text = federation_config(path), comment(path)
    assert text.startswith(f"# {config['num-supernodes']} simulated clients,")
    assert text.count(f"conf/federation/{path.name}") == 2
    share = config["client-resources-num-gpus"]
    assert (f"{share} of a GPU each" if share else "one CPU core each, no GPU") in text
    assert not share or f"{1 / share:.0f} on each GPU" in text


def test_the_federations_that_the_docs_promise_are_there_each_with_a_gpu_variant():
    names = {path.stem for path in FEDERATIONS}
    assert {"3", "10", "50", "100", "200", "500", "1000"} <= names
    assert {f"{name}-gpu" for name in names if "-" not in name} == {name for name in names if "-" in name}


@pytest.mark.parametrize(
    "path", [path for path in RUNS if "dir0" in path.stem or path.stem == "office_home"], ids=by_name
)
def test_published_runs_use_the_schedule_of_sparse_model_inversion(path: Path):
    inversion = run_settings(ROOT, path).inversion
    assert (inversion.iterations, inversion.stops, inversion.fractions) == (4000, (50, 100, 200, 300), (0.3,) * 4)
    assert (inversion.learning_rate, inversion.beta1, inversion.beta2) == (0.25, 0.5, 0.99)
    assert inversion.tv_weight == 1e-4
