import numpy as np
import pytest
import torch

from fedmitr_flwr.data import load_source
from fedmitr_flwr.ensemble.averaging import fedavg
from fedmitr_flwr.models.build import build_model
from fedmitr_flwr.models.moments import feature_moments
from fedmitr_flwr.models.patch_grid import PatchGrid
from fedmitr_flwr.models.vit import forward_images
from fedmitr_flwr.pipeline.checkpoints import Checkpoints, Progress
from fedmitr_flwr.pipeline.inputs import PipelineInputs, Upload
from fedmitr_flwr.pipeline.methods.fedmitr import run_pipeline
from fedmitr_flwr.results.evaluate import evaluate
from fedmitr_flwr.results.figures import save_synthetic, shown
from fedmitr_flwr.settings import Settings
from fedmitr_flwr.stages.distillation.losses import loss_terms
from fedmitr_flwr.training.initial import initial_state
from fedmitr_flwr.training.local import train_local

CPU = torch.device("cpu")
SETTINGS = Settings.from_run_config(
    {
        "data.source": "digits",
        "model.init": "seeded",
        "model.options": "patch_size=2,embed_dim=32,depth=2,num_heads=2",
        "train.min-steps": 60,
        "train.learning-rate": 3e-3,
        "train.share-label-histogram": True,
        "train.share-moments": True,
        "ensemble.weighting": "histogram",
        "inversion.images": 25,
        "inversion.batch-size": 10,
        "inversion.iterations": 8,
        "inversion.stops": "2,4",
        "inversion.fractions": "0.3,0.3",
        "distill.steps": 15,
        "distill.batch-size": 16,
        "distill.mix": 1.0,
        "distill.noise": 1.0,
        "generator.rounds": 3,
        "generator.batch-size": 8,
        "generator.iterations": 3,
        "generator.latent": 8,
        "generator.width": 4,
    }
)
SOURCE = load_source(SETTINGS.data)


@pytest.fixture(scope="module")
def clients():
    """Two clients: one has the digits 0 to 5, the other 4 to 8; nobody has a 9."""
    uploads = []
    for seed, classes in enumerate((range(6), range(4, 9))):
        rows = np.flatnonzero(np.isin(SOURCE.train.labels, list(classes)))[:300]
        model = build_model(SETTINGS.model, SOURCE.spec)
        model.load_state_dict(initial_state(SETTINGS, SOURCE.spec))
        images = SOURCE.train.subset(rows)
        moments = feature_moments(model, images, SOURCE.spec, batch_size=32, device=CPU)
        result = train_local(model, images, SOURCE.spec, SETTINGS.train, seed=seed, device=CPU)
        uploads.append(Upload(model.state_dict(), result.num_examples, result.histogram, moments=moments))
    return uploads


def run(clients, seed=5, checkpoints=None, **changes):
    settings = SETTINGS.replace(**changes)
    initial = initial_state(settings, SOURCE.spec)
    return run_pipeline(PipelineInputs(settings, SOURCE.spec, clients, initial, seed, checkpoints=checkpoints))


class CutOffError(RuntimeError):
    """The process was killed here."""


def cut_after(monkeypatch, method, times):
    """Kill the process in its call number `times` of a method, after it did its work."""
    owner, name = method
    original, calls = getattr(owner, name), []

    def counted(*arguments, **keywords):
        result = original(*arguments, **keywords)
        calls.append(1)
        if len(calls) == times:
            raise CutOffError
        return result

    monkeypatch.setattr(owner, name, counted)


@pytest.mark.parametrize(
    ("method", "times"),
    [
        ((Checkpoints, "batch"), 2),
        ((Progress, "offer"), 1),
        ((Progress, "offer"), 14),
        ((Checkpoints, "save_model"), 1),
    ],
)
def test_a_pipeline_that_was_cut_off_goes_on_to_the_same_model(clients, tmp_path, monkeypatch, method, times):
    whole = run(clients)
    with monkeypatch.context() as patch:
        cut_after(patch, method, times)
        with pytest.raises(CutOffError):
            run(clients, checkpoints=Checkpoints(tmp_path, 0.0))
    # The state of distillation is there to be replaced; batches and the model are not.
    done = {path: path.stat().st_mtime_ns for path in tmp_path.glob("[im]*.safetensors")}
    assert done
    resumed = run(clients, checkpoints=Checkpoints(tmp_path, 0.0))
    assert all(torch.equal(whole.state[name], resumed.state[name]) for name in whole.state)
    assert torch.equal(whole.synthetic.images, resumed.synthetic.images)
    assert {path: path.stat().st_mtime_ns for path in done} == done


def test_steps_that_were_kept_are_not_made_again(clients, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        cut_after(patch, (Progress, "offer"), 14)
        with pytest.raises(CutOffError):
            run(clients, checkpoints=Checkpoints(tmp_path, 0.0))
    steps = []
    monkeypatch.setattr(
        "fedmitr_flwr.stages.distillation.distill.loss_terms", lambda *a: steps.append(1) or loss_terms(*a)
    )
    run(clients, checkpoints=Checkpoints(tmp_path, 0.0))
    assert len(steps) == 1


def test_pipeline_repeats_bit_for_bit_and_leaves_uploads_alone(clients):
    before = [{name: value.clone() for name, value in client.state.items()} for client in clients]
    a, b = run(clients), run(clients)
    assert all(torch.equal(a.state[name], b.state[name]) for name in a.state)
    assert torch.equal(a.synthetic.images, b.synthetic.images)
    for client, state in zip(clients, before, strict=True):
        assert all(torch.equal(client.state[name], state[name]) for name in state)
    assert set(a.seconds) == {"invert", "relabel", "distill"}


def test_seed_changes_images_and_model(clients):
    a, b = run(clients), run(clients, seed=6)
    assert not torch.equal(a.synthetic.images, b.synthetic.images)
    assert not torch.equal(a.state["head.weight"], b.state["head.weight"])


def test_only_classes_that_a_client_has_are_inverted(clients):
    result = run(clients)
    assert sorted(result.synthetic.labels.unique().tolist()) == list(range(9))
    counts = result.synthetic.labels.bincount(minlength=10)[:9]
    assert int(counts.max() - counts.min()) <= 1


def test_split_is_the_inverted_set(clients):
    result = run(clients)
    expected = torch.zeros_like(result.split.high).scatter(1, result.synthetic.kept, True)
    assert torch.equal(result.split.high, expected)


@pytest.mark.parametrize("weighting", ["uniform", "examples", "histogram", "competence"])
@pytest.mark.parametrize("start", ["fedavg", "initial", "merged"])
def test_every_weighting_and_start_runs(clients, weighting, start):
    result = run(clients, **{"ensemble.weighting": weighting, "distill.start": start, "distill.steps": 1})
    assert all(bool(torch.isfinite(value).all()) for value in result.state.values())


@pytest.mark.parametrize(
    "changes",
    [
        {"inversion.stops": "", "inversion.fractions": "", "density.rule": "otsu"},
        {"density.rule": "mass"},
        {"density.rule": "quantile", "relabel.labels": "hard"},
        {"relabel.labels": "off", "distill.ce-on": "high"},
        {"distill.kl-weight": 0.0},
    ],
)
def test_every_alternative_of_the_stages_runs(clients, changes):
    result = run(clients, **changes, **{"distill.steps": 2})
    assert all(bool(torch.isfinite(value).all()) for value in result.state.values())


def test_withheld_histogram_is_an_error_under_histogram_weighting(clients):
    withheld = [Upload(client.state, client.num_examples, None, moments=client.moments) for client in clients]
    with pytest.raises(ValueError, match=r"ensemble\.weighting"):
        run(withheld)
    run(withheld, **{"ensemble.weighting": "competence", "distill.steps": 1})


def test_evaluation_equals_a_plain_count(clients):
    result = run(clients, **{"ensemble.moments-weight": 0.0})
    images = SOURCE.validation
    found = evaluate(result, images, SOURCE.spec, SETTINGS.model, CPU, batch_size=50)
    x = SOURCE.spec.normalise(images.images(range(len(images))))
    y = torch.from_numpy(images.labels)
    model = build_model(SETTINGS.model, SOURCE.spec).eval()

    def plain(state):
        model.load_state_dict(state)
        return forward_images(model, x).logits.argmax(1)

    guess = plain(result.state)
    assert found.global_model == pytest.approx(float((guess == y).float().mean()))
    for c, accuracy in enumerate(found.per_class["global"]):
        assert accuracy == pytest.approx(float((guess[y == c] == c).float().mean()))
    local = [float((plain(client.state) == y).float().mean()) for client in clients]
    assert found.local == pytest.approx(local)
    assert found.local_mean == pytest.approx(sum(local) / 2)
    average = fedavg([client.state for client in clients], torch.tensor([client.num_examples for client in clients]))
    assert found.fedavg == pytest.approx(float((plain(average) == y).float().mean()))
    weights = result.ensemble.weights
    parts = [weights[k] * _soft(model, client.state, x) for k, client in enumerate(clients)]
    assert found.ensemble == pytest.approx(float((sum(parts).argmax(1) == y).float().mean()))
    assert sum(map(sum, found.confusion)) == found.num_images == len(images)


def _soft(model, state, x):
    model.load_state_dict(state)
    return forward_images(model, x).logits.softmax(-1)


def test_evaluating_on_nothing_is_an_error(clients):
    result = run(clients, **{"distill.steps": 1})
    with pytest.raises(ValueError, match="no images"):
        evaluate(result, SOURCE.validation.subset([]), SOURCE.spec, SETTINGS.model, CPU)


def test_figure_shows_stopped_patches_tinted(clients, tmp_path):
    result = run(clients, **{"distill.steps": 1})
    low, high = SOURCE.spec.valid_range()
    grid = PatchGrid(1, 8, (2, 2), low, high)
    pixels = grid.to_patches(shown(result.synthetic, SOURCE.spec, grid)[:, :1])
    plain = grid.to_patches(SOURCE.spec.denormalise(result.synthetic.images).float() / 255)
    kept = result.split.high
    assert torch.allclose(pixels[kept], plain[kept])
    assert not torch.allclose(pixels[~kept], plain[~kept])
    save_synthetic(result.synthetic, SOURCE.spec, grid, tmp_path / "synthetic.png")
    assert (tmp_path / "synthetic.png").read_bytes().startswith(b"\x89PNG")
