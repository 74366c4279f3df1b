"""On a GPU: the same numbers as on a CPU, graphs that change nothing, no waiting, and all stages to the end."""

import logging

import pytest
import torch
from torch.nn import functional as F

from fedmitr_flwr.ensemble.engine.teachers import MemoryLimits
from fedmitr_flwr.ensemble.ensemble import Ensemble
from fedmitr_flwr.models.build import build_model
from fedmitr_flwr.pipeline.inputs import PipelineInputs, Upload
from fedmitr_flwr.pipeline.methods import METHODS
from fedmitr_flwr.settings import InversionSettings
from fedmitr_flwr.stages.inversion import cuda_graphs
from fedmitr_flwr.stages.inversion.batch import InversionBatch, InversionDivergedError, InversionTask, Watch
from fedmitr_flwr.stages.inversion.cuda_graphs import WARM_UP, GraphRunner
from fedmitr_flwr.stages.inversion.schedule import most_attended
from fedmitr_flwr.stages.inversion.sparse import invert
from fedmitr_flwr.training.initial import initial_state
from fedmitr_flwr.training.local import train_local
from tests.unit.ensemble.test_engine import GRID, LABELS, batch, variant
from tests.unit.pipeline.test_pipeline import SETTINGS, SOURCE
from tests.unit.tiny import CLASSES, tiny_ensemble, tiny_grid

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
CUDA = torch.device("cuda")
SIX = torch.tensor([0, 1, 2, 3, 4, 0])
LONG = InversionSettings(iterations=70, stops="2,30", fractions="0.3,0.3", tv_weight=0.1, learning_rate=0.05)


@pytest.fixture(autouse=True)
def _exact():
    before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture
def recorded(monkeypatch):
    """What was recorded as a graph."""
    found, record = [], GraphRunner._record

    def noting(runner):
        out = record(runner)
        found.append(runner)
        return out

    monkeypatch.setattr(GraphRunner, "_record", noting)
    return found


def there(ensemble: Ensemble, limits: MemoryLimits | None = None) -> Ensemble:
    return Ensemble([teacher.to(CUDA) for teacher in ensemble.teachers], ensemble.weights.to(CUDA), limits)


def run(ensemble: Ensemble | None = None, settings: InversionSettings = LONG, **more):
    ensemble = ensemble or there(tiny_ensemble())
    generator = torch.Generator().manual_seed(3)
    return invert(InversionTask(ensemble, tiny_grid(), settings), SIX.to(CUDA), generator=generator, **more)


def tiny_batch(settings: InversionSettings = LONG) -> InversionBatch:
    start = torch.randn(6, 1, 16, 16, generator=torch.Generator().manual_seed(0)).to(CUDA)
    return InversionBatch(InversionTask(there(tiny_ensemble()), tiny_grid(), settings), SIX.to(CUDA), start)


def both(K: int, tokens: int, dtype: torch.dtype, **size: int):
    """Losses and gradients of the CPU in fp32, and of the GPU."""
    teachers, weights, images, kept, _ = batch(K, tokens, **size)
    patches = GRID.to_patches(images).gather(1, kept[..., None].expand(-1, -1, 768))
    ensemble = Ensemble(teachers, weights)
    expected = ensemble.loss_gradient(patches, kept, LABELS)
    got = there(ensemble).loss_gradient(patches.to(CUDA), kept.to(CUDA), LABELS.to(CUDA), dtype)
    return expected, got


@pytest.mark.parametrize("K", [1, 5])
@pytest.mark.parametrize("tokens", [197, 97, 47])
def test_loss_and_gradient_equal_those_of_the_cpu(tokens, K):
    expected, got = both(K, tokens, torch.float32)
    assert torch.allclose(got.loss.cpu(), expected.loss, rtol=1e-5, atol=0)
    assert torch.allclose(got.gradient.cpu(), expected.gradient, rtol=0, atol=1e-6)
    assert torch.allclose(got.attention.cpu(), expected.attention, rtol=0, atol=1e-6)


@pytest.mark.parametrize("K", [1, 5])
def test_bf16_gradients_point_the_same_way(K):
    expected, got = both(K, 47, torch.bfloat16, width=192, depth=6)
    likeness = F.cosine_similarity(got.gradient.cpu().flatten(1), expected.gradient.flatten(1))
    assert float(likeness.min()) >= 0.999
    assert torch.allclose(got.loss.cpu(), expected.loss, rtol=0.02)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("activations", [640, 0])
def test_graphs_replay_exactly_what_they_recorded(activations, precision, recorded, monkeypatch):
    monkeypatch.setattr("fedmitr_flwr.ensemble.engine.groups.STEP_ROWS", 200)  # several steps
    settings, limits = LONG.model_copy(update={"precision": precision}), MemoryLimits(activations)
    got = run(there(tiny_ensemble(), limits), settings)
    assert len(recorded) == 2
    monkeypatch.setattr(
        "fedmitr_flwr.stages.inversion.cuda_graphs.WARM_UP", 10**6
    )  # the same code, launched kernel by kernel
    expected = run(there(tiny_ensemble(), limits), settings)
    assert len(recorded) == 2
    assert torch.equal(got.kept, expected.kept)
    assert torch.equal(got.images, expected.images)
    assert torch.equal(got.loss, expected.loss)


def test_graphs_make_the_images_of_the_ordinary_iterations(recorded, monkeypatch):
    """Up to the rounding of a quotient, which Adam's steps hand on."""
    settings = LONG.model_copy(update={"iterations": 34, "stops": (2,), "fractions": (0.3,)})
    got = run(settings=settings)
    assert len(recorded) == 1
    monkeypatch.setattr(cuda_graphs, "MIN_STEPS", 10**6)
    expected = run(settings=settings)
    assert len(recorded) == 1
    assert torch.equal(got.kept, expected.kept)
    assert float((got.images - expected.images).abs().mean()) < 1e-4
    assert torch.allclose(got.loss, expected.loss, rtol=1e-2, atol=1e-4)


def test_a_teacher_that_runs_by_autograd_is_recorded_too(recorded, monkeypatch):
    model = variant("vit_tiny_patch16_224", depth=2, qk_norm=True)
    ensemble = there(Ensemble([model], torch.ones(1, CLASSES)))
    got = run(ensemble)
    assert len(recorded) == 2
    monkeypatch.setattr("fedmitr_flwr.stages.inversion.cuda_graphs.WARM_UP", 10**6)
    expected = run(ensemble)
    assert float((got.images - expected.images).abs().mean()) < 1e-4


@pytest.mark.parametrize(
    "changes", [{}, {"jitter": 1, "color_shift": 0.3, "copies": 2}, {"diversity": 0.1}], ids=["plain", "views", "term"]
)
@pytest.mark.parametrize("announced", [0, 40])
def test_a_step_does_not_wait_for_the_device(announced, changes):
    generator = torch.Generator().manual_seed(0)
    images = tiny_batch(LONG.model_copy(update=changes))
    images.expect(announced)
    for _ in range(WARM_UP + 2):
        images.step(images.views(generator))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            images.step(images.views(generator))
        images.step(images.views(generator), lambda attention: most_attended(attention, 0.3))
        images.step(images.views(generator))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    images.check_finite()
    images.release()


def test_a_loss_that_breaks_in_a_graph_is_named(recorded):
    ensemble = there(tiny_ensemble())

    def spoil(iteration, loss):
        if iteration == 50:
            ensemble._groups[torch.float32].groups[0]._held.tail.head.fill_(torch.nan)

    with pytest.raises(InversionDivergedError, match="iteration 51") as caught:
        run(ensemble, watch=Watch(spoil))
    assert len(recorded) == 2
    assert bool(torch.isfinite(caught.value.last_good.images).all())


def test_a_broken_teacher_is_found_at_the_first_iteration():
    ensemble = tiny_ensemble()
    with torch.no_grad():
        ensemble.teachers[0].head.weight.fill_(float("nan"))
    with pytest.raises(InversionDivergedError, match="iteration 0"):
        run(there(ensemble))


def test_what_cannot_be_recorded_goes_on_as_it_is(caplog):
    numbers, stream = torch.zeros(3, device=CUDA), torch.cuda.current_stream()

    def waits():
        numbers.add_(1)
        return numbers * float(numbers.sum())

    ensemble = there(tiny_ensemble())
    runner = GraphRunner(waits, numbers.device, list, ensemble.graphs)
    with caplog.at_level(logging.WARNING, "fedmitr.inversion"):
        found = [runner().tolist()[0] for _ in range(WARM_UP + 3)]
    assert found == [3.0 * n * n for n in range(1, WARM_UP + 4)]
    assert len(caplog.records) == 1
    assert torch.cuda.current_stream() == stream
    assert not ensemble.graphs.works
    assert run(ensemble).images.isfinite().all()


def test_graphs_give_their_memory_back(recorded):
    ensemble = there(tiny_ensemble())
    run(ensemble)
    before = torch.cuda.memory_allocated()
    run(ensemble)
    assert len(recorded) == 4
    assert torch.cuda.memory_allocated() <= before + 2**20


def test_a_federation_is_trained_and_distilled():
    settings = SETTINGS.replace(**{"inversion.iterations": 40})
    initial = initial_state(settings, SOURCE.spec)
    clients = []
    for seed in range(2):
        model = build_model(settings.model, SOURCE.spec)
        model.load_state_dict(initial)
        images = SOURCE.train.subset(list(range(300 * seed, 300 * seed + 300)))
        result = train_local(model, images, SOURCE.spec, settings.train, seed=seed, device=CUDA)
        assert 0 < result.loss < 3
        assert next(model.parameters()).is_cuda
        state = {name: value.cpu() for name, value in model.state_dict().items()}
        clients.append(Upload(state, result.num_examples, result.histogram))
    found = METHODS["fedmitr"](PipelineInputs(settings, SOURCE.spec, clients, initial, 5, device=CUDA))
    for state in (found.state, found.fedavg):
        assert all(value.device.type == "cpu" and bool(value.isfinite().all()) for value in state.values())
    assert found.synthetic is not None
    assert found.synthetic.images.is_cuda
