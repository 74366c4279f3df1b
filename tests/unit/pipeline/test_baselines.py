import pytest
import torch

from fedmitr_flwr.ensemble.averaging import fedavg, merged
from fedmitr_flwr.models.build import build_model
from fedmitr_flwr.models.patch_grid import PatchGrid
from fedmitr_flwr.pipeline import steps
from fedmitr_flwr.pipeline.inputs import PipelineInputs
from fedmitr_flwr.pipeline.methods import METHODS
from fedmitr_flwr.pipeline.starts import STARTS, student_start
from fedmitr_flwr.pipeline.steps import make_ensemble
from fedmitr_flwr.results.evaluate import evaluate
from fedmitr_flwr.runs.observer import Observer
from fedmitr_flwr.training.initial import initial_state
from tests.unit.pipeline.test_pipeline import CPU, SETTINGS, SOURCE, clients  # noqa: F401 - a fixture

INITIAL = initial_state(SETTINGS, SOURCE.spec)


def run(method, uploads, seed=5, observer=None, **changes):
    settings = SETTINGS.replace(**{"run.method": method, **changes})
    inputs = PipelineInputs(settings, SOURCE.spec, uploads, INITIAL, seed, observer=observer or Observer())
    return METHODS[method](inputs)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_a_model_that_can_be_evaluated_and_repeats(clients, method):  # noqa: F811
    a, b = run(method, clients), run(method, clients)
    build_model(SETTINGS.model, SOURCE.spec).load_state_dict(a.state)
    assert all(torch.equal(a.state[name], b.state[name]) for name in a.state)
    found = evaluate(a, SOURCE.validation, SOURCE.spec, SETTINGS.model, CPU)
    assert 0.0 <= found.global_model <= 1.0


def test_methods_differ(clients):  # noqa: F811
    states = [run(method, clients).state for method in METHODS]
    weights = [torch.cat([value.flatten() for value in state.values()]) for state in states]
    for number, one in enumerate(weights):
        assert not any(torch.equal(one, other) for other in weights[:number])


@pytest.mark.parametrize("start", STARTS)
def test_the_student_can_start_from_each_of_the_starts(clients, start):  # noqa: F811
    inputs = PipelineInputs(SETTINGS.replace(**{"distill.start": start}), SOURCE.spec, clients, INITIAL)
    state = student_start(inputs, make_ensemble(inputs)[0])
    build_model(SETTINGS.model, SOURCE.spec).load_state_dict(state)
    if start in METHODS:
        expected = run(start, clients).state
        assert all(torch.equal(state[name], expected[name]) for name in state)


def test_averages_are_those_of_the_library(clients):  # noqa: F811
    states = [client.state for client in clients]
    counts = torch.tensor([client.num_examples for client in clients])
    average = run("fedavg", clients)
    assert all(torch.equal(average.state[name], value) for name, value in fedavg(states, counts).items())
    ensemble, _ = make_ensemble(PipelineInputs(SETTINGS, SOURCE.spec, clients, INITIAL))
    expected = merged(INITIAL, states, ensemble.weights, SETTINGS.distill.merge_scale)
    heads = run("head-aggregation", clients)
    assert all(torch.equal(heads.state[name], value) for name, value in expected.items())


@pytest.mark.parametrize("method", ["dense-inversion", "dense-inversion-kl"])
def test_dense_inversion_stops_no_patch_and_does_not_split(clients, method):  # noqa: F811
    result = run(method, clients)
    patches = result.split.high.shape[1]
    assert result.synthetic.kept.shape == (25, patches)
    assert bool(result.split.high.all())


def test_dense_inversion_by_kl_ignores_the_pseudo_labels(clients):  # noqa: F811
    ce = {"distill.ce-weight": 5.0}
    plain, heavy = run("dense-inversion-kl", clients), run("dense-inversion-kl", clients, **ce)
    assert torch.equal(plain.state["head.weight"], heavy.state["head.weight"])
    assert not torch.equal(
        run("dense-inversion", clients).state["head.weight"],
        run("dense-inversion", clients, **ce).state["head.weight"],
    )


def test_hard_labels_are_the_most_probable_class(clients, monkeypatch):  # noqa: F811
    seen = {}

    def keep(student, pool, *args, **kwargs):
        seen["pool"] = pool

    monkeypatch.setattr("fedmitr_flwr.pipeline.steps.distill", keep)
    run("fedmitr", clients)
    soft = everything(seen["pool"])
    run("hard-labels", clients)
    hard = everything(seen["pool"])
    assert torch.equal(hard.patches, soft.patches)
    best = soft.targets.probabilities.argmax(1)
    assert torch.equal(hard.targets.probabilities, torch.nn.functional.one_hot(best, 10).float())
    assert hard.targets.features is None
    assert set(seen["pool"].low_targets.probabilities.unique().tolist()) == {0.0, 1.0}


def test_random_images_inverts_nothing_and_distils_as_many_images(clients, monkeypatch):  # noqa: F811
    seen, true = {}, steps.distill

    def keep(student, pool, settings, **kwargs):
        seen.update(pool=pool, settings=settings)
        true(student, pool, settings, **kwargs)

    monkeypatch.setattr(steps, "distill", keep)
    observer = Observer()
    result = run("random-images", clients, observer=observer)
    assert result.synthetic is None
    assert set(observer.seconds) == {"distill"}
    distill = SETTINGS.distill
    assert len(seen["pool"]) == round(25 * (distill.views + distill.mix + distill.noise))
    assert seen["settings"].steps == distill.steps
    images = everything(seen["pool"])
    ensemble = result.ensemble(images.patches).probabilities
    assert torch.allclose(images.targets.probabilities, ensemble, atol=1e-6)
    assert not torch.equal(result.state["head.weight"], run("head-aggregation", clients).state["head.weight"])


def everything(pool):
    return pool.batch(torch.arange(len(pool))).images


@pytest.fixture
def pools(monkeypatch):
    """Every pool that the student learns from, with the step from which it does."""
    seen, true = [], steps.distill

    def watch(student, pool, settings, *, grow, **kwargs):
        def watched(step):
            grown = grow(step)
            if grown is not None:
                seen.append((step, grown))
            return grown

        seen.append((0, pool))
        true(student, pool, settings, grow=watched, **kwargs)

    monkeypatch.setattr(steps, "distill", watch)
    return seen


@pytest.mark.parametrize("method", ["dense", "co-boosting"])
def test_generated_images_join_the_pool_between_the_students_steps(clients, pools, method):  # noqa: F811
    observer = Observer()
    result = run(method, clients, observer=observer)
    assert [step for step, _ in pools] == [0, 2, 8]  # 15 steps by 1 : 2 : 3
    assert result.synthetic.images.shape == (24, 1, 8, 8)
    assert set(result.synthetic.labels.tolist()) <= set(range(9))  # nobody has a 9
    assert bool(result.split.high.all())
    assert set(observer.seconds) == {"distill"}


def test_dense_labels_all_images_so_far_with_the_ensemble(clients, pools):  # noqa: F811
    result = run("dense", clients)
    views, mix, noise = SETTINGS.distill.views, SETTINGS.distill.mix, SETTINGS.distill.noise
    sizes = [round(number * 8 * (views + mix) + 25 * noise) for number in (1, 2, 3)]
    assert [len(pool) for _, pool in pools] == sizes
    last = everything(pools[-1][1])
    assert torch.allclose(last.targets.probabilities, result.ensemble(last.patches).probabilities, atol=1e-6)
    grid = PatchGrid.of(result.ensemble.teachers[0], SOURCE.spec)
    assert torch.equal(last.patches[:8], grid.to_patches(result.synthetic.images[:8]))


def test_co_boosting_learns_weights_and_shows_as_many_images_as_the_student_takes(clients, pools):  # noqa: F811
    alone = {"distill.noise": 0.0, "distill.mix": 0.0}
    plain, result = run("dense", clients).ensemble, run("co-boosting", clients, **alone)
    assert not torch.equal(plain.weights, result.ensemble.weights)
    assert torch.allclose(result.ensemble.weights.sum(0), plain.weights.sum(0), atol=1e-5)
    assert torch.equal(result.ensemble.weights == 0, plain.weights == 0)
    assert [len(pool) for _, pool in pools[3:]] == [2 * 16, 6 * 16, 7 * 16]
    last = everything(pools[-1][1])
    assert torch.allclose(last.targets.probabilities, result.ensemble(last.patches).probabilities, atol=1e-6)
    grid = PatchGrid.of(plain.teachers[0], SOURCE.spec)
    shown = {patches.numpy().tobytes() for patches in last.patches}
    assert not shown & {patches.numpy().tobytes() for patches in grid.to_patches(result.synthetic.images)}


def test_the_students_start_weighting_and_further_images_are_those_of_the_settings(clients):  # noqa: F811
    for change in ({"distill.start": "fedavg"}, {"ensemble.weighting": "uniform"}, {"distill.noise": 0.0}):
        for method in ("dense", "co-boosting"):
            changed = run(method, clients, **change).state["head.weight"]
            assert not torch.equal(changed, run(method, clients).state["head.weight"]), (method, change)
