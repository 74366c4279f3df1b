"""Whole pipelines on uploads that share their first blocks: what is trained, what stays, and how a run resumes."""

import pytest
import torch

from fedmitr_flwr.federation.prepare import prepare
from fedmitr_flwr.models.build import build_model
from fedmitr_flwr.models.flops import count_parts
from fedmitr_flwr.models.patch_grid import PatchGrid
from fedmitr_flwr.models.vit import in_trunk
from fedmitr_flwr.pipeline.checkpoints import Checkpoints, Progress
from fedmitr_flwr.pipeline.inputs import PipelineInputs, PipelineResult, Upload
from fedmitr_flwr.pipeline.methods import METHODS
from fedmitr_flwr.pipeline.steps import images_in_memory
from fedmitr_flwr.results import evaluate as results_evaluate
from fedmitr_flwr.results.flops import stage_flops
from fedmitr_flwr.runs.observer import Observer
from fedmitr_flwr.settings import Settings, SettingsError
from fedmitr_flwr.training.initial import initial_state
from tests.unit.pipeline.test_pipeline import SETTINGS, SOURCE, CutOffError, cut_after

DEPTH, SHARED = 3, 2
RUN = SETTINGS.replace(
    **{
        "model.options": f"patch_size=2,embed_dim=32,depth={DEPTH},num_heads=2",
        "ensemble.weighting": "examples",
        "train.share-moments": False,
        "distill.ce-on": "high",
        "density.rule": "mass",
    }
)
INITIAL = initial_state(RUN, SOURCE.spec)


class Noted(Observer):
    """An observer that notes its events."""

    def __init__(self):
        super().__init__()
        self.found = {}

    def event(self, stage, **fields):
        self.found.update(fields)
        super().event(stage, **fields)


def uploads(shared=SHARED, count=3):
    """Uploads of clients that trained all that comes after the first blocks."""
    made = []
    for k in range(count):
        draws = torch.Generator().manual_seed(k)
        moved = {
            name: value
            if in_trunk(name, shared) and shared
            else value + 0.1 * torch.randn(value.shape, generator=draws)
            for name, value in INITIAL.items()
        }
        made.append(Upload(moved, 100 + 10 * k, None))
    return made


def run(settings: Settings = RUN, checkpoints=None, observer=None, shared=SHARED, **changes) -> PipelineResult:
    settings = settings.replace(**changes)
    inputs = PipelineInputs(settings, SOURCE.spec, uploads(shared), INITIAL, 5, checkpoints=checkpoints)
    inputs = inputs if observer is None else PipelineInputs(**{**vars(inputs), "observer": observer})
    return METHODS[settings.run.method](inputs)


def changed(result: PipelineResult) -> set[str]:
    """Names of the weights of the global model that differ from the common initialisation."""
    return {name for name, value in result.state.items() if not torch.equal(value, INITIAL[name])}


AFTER = {name for name in INITIAL if not in_trunk(name, SHARED)}
HEAD = {"head.weight", "head.bias"}


BY_METHOD = [
    (method, "merged") for method in ("dense-inversion", "hard-labels", "random-images", "dense", "co-boosting")
]


@pytest.mark.parametrize(
    ("method", "start"), [*BY_METHOD, *(("fedmitr", start) for start in ("merged", "fedavg", "initial"))]
)
def test_every_method_leaves_the_blocks_that_no_client_trained_as_they_are(method, start):
    observer = Noted()
    found = run(observer=observer, **{"run.method": method, "distill.start": start})
    assert changed(found) == AFTER
    assert observer.found["blocks_that_no_client_trained"] == observer.found["frozen_blocks"] == "2 of 3"
    assert observer.found["kept_tokens"] == "float32"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("all", set(INITIAL)),
        ("last-1", AFTER),
        ("last-3", {name for name in INITIAL if not in_trunk(name, 0)}),
        ("head", HEAD),
    ],
)
def test_the_setting_says_what_the_student_trains(value, expected):
    assert changed(run(**{"distill.trainable": value, "distill.start": "initial"})) == expected


def test_without_shared_blocks_all_weights_are_trained_and_nothing_is_said():
    observer = Noted()
    assert changed(run(shared=0, observer=observer)) == set(INITIAL)
    assert not {"blocks_that_no_client_trained", "frozen_blocks"} & set(observer.found)


@pytest.mark.parametrize("shared", [SHARED, DEPTH])
@pytest.mark.parametrize("changes", [{}, {"distill.adversarial-rounds": 2, "distill.adversarial-images": 5}])
def test_a_student_distilled_from_kept_tokens_is_that_of_one_that_computes_them(shared, changes):
    kept, computed = (run(shared=shared, **{"distill.cache-memory-mb": limit, **changes}) for limit in (100, 0))
    assert torch.equal(kept.synthetic.images, computed.synthetic.images)
    x = SOURCE.spec.normalise(SOURCE.validation.images(range(50)))
    said = []
    for result in (kept, computed):
        model = result.ensemble.teachers[0]
        model.load_state_dict(result.state)
        said.append(model(x))
    assert torch.allclose(said[0], said[1], atol=1e-3)


@pytest.mark.parametrize("times", [1, 14])
def test_a_run_that_was_cut_off_goes_on_to_the_same_model(times, tmp_path, monkeypatch):
    whole = run()
    with monkeypatch.context() as patch:
        cut_after(patch, (Progress, "offer"), times)
        with pytest.raises(CutOffError):
            run(checkpoints=Checkpoints(tmp_path, 0.0))
    resumed = run(checkpoints=Checkpoints(tmp_path, 0.0))
    assert all(torch.equal(whole.state[name], resumed.state[name]) for name in whole.state)


def test_a_part_that_the_model_does_not_have_is_refused_before_a_client_is_asked():
    settings = RUN.replace(**{"distill.trainable": "last-4"})
    with pytest.raises(SettingsError, match=r"distill\.trainable = \"last-4\": the model has 3 blocks"):
        prepare(settings, None)


def test_the_images_in_memory_are_those_of_the_pool():
    observer = Noted()
    run(observer=observer)
    images, inverted = images_in_memory(RUN)
    assert inverted == 25
    assert images - 1 == observer.found["labelled_images"]


def test_the_arithmetic_counts_shared_blocks_once():
    model = build_model(RUN.model, SOURCE.spec)
    grid = PatchGrid.of(model, SOURCE.spec)
    apart, shared = (stage_flops(RUN, model, grid, 50, blocks) for blocks in (0, SHARED))
    trunk, tail = count_parts(model, grid, grid.num_patches, SHARED)
    assert shared["relabel"] == 2 * 25 * (trunk + 50 * tail)
    assert apart["relabel"] == 2 * 25 * 50 * (trunk + tail)
    assert shared["invert"] < apart["invert"] / 2
    steps, pool = RUN.distill.steps * RUN.distill.batch_size, 25 * 4
    assert shared["distill"] == pytest.approx(pool * (trunk + 50 * tail) + 3 * steps * tail)
    computed = stage_flops(RUN.replace(**{"distill.cache-memory-mb": 0}), model, grid, 50, SHARED)
    assert computed["distill"] - shared["distill"] == pytest.approx(steps * trunk)


@pytest.mark.parametrize(("trainable", "full"), [("auto", 0), ("all", 1)])
def test_evaluation_runs_shared_blocks_once_and_finds_what_a_plain_count_finds(trainable, full, monkeypatch):
    result, ran = run(**{"distill.trainable": trainable}), []
    images = SOURCE.validation
    original = results_evaluate.forward_images
    monkeypatch.setattr(results_evaluate, "forward_images", lambda *a: ran.append(len(a[1])) or original(*a))
    found = results_evaluate.evaluate(result, images, SOURCE.spec, RUN.model, torch.device("cpu"), batch_size=50)
    assert sum(ran) == full * len(images)  # the global model, if it does not have these blocks
    x, y = SOURCE.spec.normalise(images.images(range(len(images)))), torch.from_numpy(images.labels)
    model = build_model(RUN.model, SOURCE.spec).eval()

    def right(state) -> float:
        model.load_state_dict(state)
        return float((model(x).argmax(1) == y).float().mean())

    assert found.global_model == pytest.approx(right(result.state))
    assert found.fedavg == pytest.approx(right(result.fedavg))
    assert found.local == pytest.approx([right(upload.state) for upload in uploads()])
    said = sum(
        result.ensemble.weights[k] * teacher(x).softmax(-1) for k, teacher in enumerate(result.ensemble.teachers)
    )
    assert found.ensemble == pytest.approx(float((said.argmax(1) == y).float().mean()))
