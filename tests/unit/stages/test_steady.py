"""Iterations between two stops on memory that stays in place; a tape of operations takes the place of a CUDA graph."""

import logging

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedmitr_flwr.ensemble.engine.teachers import MemoryLimits
from fedmitr_flwr.ensemble.ensemble import Ensemble
from fedmitr_flwr.models.vit import in_trunk
from fedmitr_flwr.settings import InversionSettings
from fedmitr_flwr.stages.inversion import cuda_graphs
from fedmitr_flwr.stages.inversion.batch import InversionBatch, InversionDivergedError, InversionTask, Watch
from fedmitr_flwr.stages.inversion.cuda_graphs import MIN_STEPS, WARM_UP, GraphRunner, stretches, suits
from fedmitr_flwr.stages.inversion.pixel_adam import PixelAdam
from fedmitr_flwr.stages.inversion.rebirth import invert_by_rebirth
from fedmitr_flwr.stages.inversion.sparse import invert
from fedmitr_flwr.stages.inversion.views import View
from tests.unit.tiny import tiny_ensemble, tiny_grid, tiny_vit

LABELS = torch.tensor([0, 1, 2, 3, 4, 0])
CUDA = torch.device("cuda")
LONG = InversionSettings(iterations=70, stops="2,30", fractions="0.3,0.3", tv_weight=0.1, learning_rate=0.1)


class Tape(TorchDispatchMode):
    """Notes all operations with the very tensors that they read and write; `replay` does them again, as a graph does.

    Nothing of Python runs again, so that a number of the host stays what it was, and a tensor where it was.
    """

    def __init__(self):
        super().__init__()
        self.calls, self.ran = [], True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def replay(self):
        if self.ran:  # noting an operation does it, recording a graph doesn't
            self.ran = False
            return
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def tapes(monkeypatch):
    """Graphs on the CPU: the tapes that were recorded."""
    made = []

    def record(runner):
        tape = Tape()
        with tape:
            out = runner._function()
        made.append(tape)
        return tape.replay, out

    monkeypatch.setattr(cuda_graphs, "DEVICE", "cpu")
    monkeypatch.setattr(GraphRunner, "_warm", lambda runner: runner._function())
    monkeypatch.setattr(GraphRunner, "_record", record)
    return made


def run(settings=LONG, method=invert, ensemble=None, **more):
    generator = torch.Generator().manual_seed(3)
    return method(
        InversionTask(ensemble or tiny_ensemble(), tiny_grid(), settings), LABELS, generator=generator, **more
    )


def same(one, other):
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("images", "kept", "loss"))


@pytest.mark.parametrize("method", [invert, invert_by_rebirth])
@pytest.mark.parametrize("changes", [{}, {"centring": 25, "stops": (45,), "fractions": (0.3,)}, {"l2_weight": 0.1}])
def test_replayed_iterations_equal_the_others_bit_for_bit(method, changes, request):
    settings = LONG.model_copy(update={"method": "sparse" if method is invert else "rebirth", **changes})
    plain_losses, losses = [], []
    plain = run(settings, method, watch=Watch(lambda _, loss: plain_losses.append(loss)))
    tapes = request.getfixturevalue("tapes")
    got = run(settings, method, watch=Watch(lambda _, loss: losses.append(loss)))
    assert len(tapes) == len([length for length in lengths(settings) if length >= MIN_STEPS]) > 0
    assert same(got, plain)
    assert all(torch.equal(one, other) for one, other in zip(losses, plain_losses, strict=True))
    assert not torch.equal(losses[-1], losses[-2])


def lengths(settings):
    grown = (0, settings.centring) if settings.centring else ()
    return stretches(settings.stops, grown, settings.iterations).values()


@pytest.mark.parametrize("activations", [0, 640])
def test_teachers_in_several_steps_and_without_room_for_activations_are_replayed_alike(
    activations, monkeypatch, request
):
    monkeypatch.setattr("fedmitr_flwr.ensemble.engine.groups.STEP_ROWS", 1)
    K = tiny_ensemble(3)
    plain = run(ensemble=Ensemble(K.teachers, K.weights, MemoryLimits(activations)))
    request.getfixturevalue("tapes")
    assert same(run(ensemble=Ensemble(K.teachers, K.weights, MemoryLimits(activations))), plain)


@pytest.mark.parametrize("trained", [1, 0])
@pytest.mark.parametrize("activations", [0, 640])
def test_a_trunk_that_all_teachers_share_is_replayed_alike(activations, trained, monkeypatch, request):
    monkeypatch.setattr("fedmitr_flwr.ensemble.engine.groups.STEP_ROWS", 1)
    teachers, share = [tiny_vit(9, depth=3) for _ in range(3)], tiny_ensemble(3).weights
    with torch.no_grad():
        for k, teacher in enumerate(teachers):
            for name, parameter in teacher.named_parameters():
                if not in_trunk(name, 3 - trained):
                    parameter.add_(0.1 * (k + 1))
    ensembles = [Ensemble(teachers, share, MemoryLimits(activations)) for _ in range(2)]
    assert ensembles[0].shared_blocks == 3 - trained
    plain = run(ensemble=ensembles[0])
    tapes = request.getfixturevalue("tapes")
    assert same(run(ensemble=ensembles[1]), plain)
    assert tapes


def test_memory_that_others_made_the_ensemble_let_go_of_is_held(tapes):
    """Someone else asks the ensemble about more images, for whom its buffers are too small."""
    ensemble, plain = tiny_ensemble(), run()
    patches = tiny_grid().to_patches(torch.zeros(64, 1, 16, 16))

    def look(iteration, loss):
        if iteration == 50:
            ensemble.see(patches)

    assert same(run(ensemble=ensemble, watch=Watch(look)), plain)


def test_a_step_with_a_view_or_beyond_those_announced_runs_as_ever(tapes):
    start = torch.randn(6, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    batches = [InversionBatch(InversionTask(tiny_ensemble(), tiny_grid(), LONG), LABELS, start) for _ in range(2)]
    batches[1].expect(MIN_STEPS)
    for batch in batches:
        for _ in range(MIN_STEPS + 2):
            batch.step()
        batch.expect(MIN_STEPS if batch is batches[1] else 0)
        batch.step()
        batch.step([View((1, 0))])
        batch.step()
    assert len(tapes) == 1
    assert same(batches[0].result(), batches[1].result())


def test_a_loss_that_breaks_in_a_replayed_iteration_is_named(tapes):
    ensemble = tiny_ensemble()

    def spoil(iteration, loss):
        if iteration == 50:
            ensemble._groups[torch.float32].groups[0]._held.tail.head.fill_(torch.nan)

    with pytest.raises(InversionDivergedError, match="iteration 51"):
        run(ensemble=ensemble, watch=Watch(spoil))
    assert len(tapes) == 2


def test_after_one_warning_an_ensemble_and_those_drawn_from_it_run_without_graphs(tapes, monkeypatch, caplog):
    def refuse(runner):
        raise RuntimeError("operation not permitted when stream is capturing")

    ensemble, generator = tiny_ensemble(), torch.Generator().manual_seed(0)
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "fedmitr.inversion"):
        patch.setattr(GraphRunner, "_record", refuse)
        got, again = run(ensemble=ensemble), run(ensemble=ensemble)
        run(ensemble=ensemble.draw(1, LABELS, generator))
    assert [record.message for record in caplog.records] == [
        "a CUDA graph could not be recorded, so inversion runs without graphs (slower): "
        "operation not permitted when stream is capturing"
    ]
    assert tapes == []
    assert same(got, run())  # another ensemble, which records graphs
    assert len(tapes) == 2
    assert same(again, got)


def test_a_graph_is_let_go_of_at_the_end(tapes):
    start = torch.zeros(6, 1, 16, 16)
    batch = InversionBatch(InversionTask(tiny_ensemble(), tiny_grid(), LONG), LABELS, start)
    batch.expect(MIN_STEPS)
    for _ in range(WARM_UP + 2):
        batch.step()
    assert len(tapes) == 1
    batch.release()
    assert batch._steady is None


def test_stretches_end_at_stops_and_where_the_image_grows():
    assert stretches([], [], 10) == {0: 10}
    assert stretches([50, 100], [], 4000) == {0: 50, 51: 49, 101: 3899}
    assert stretches([0, 1, 5], [], 6) == {2: 3}
    assert stretches([9], [0, 3, 6], 10) == {0: 3, 3: 3, 6: 3}
    assert stretches([3], [3], 6) == {0: 3, 4: 2}


@pytest.mark.parametrize(
    ("changes", "suited"),
    [
        ({}, True),
        ({"length": MIN_STEPS - 1}, False),
        ({"device": torch.device("cpu")}, False),
        ({"terms": [lambda seen: seen.probabilities.sum()]}, False),
        ({"settings": LONG.model_copy(update={"jitter": 1})}, False),
        ({"settings": LONG.model_copy(update={"color_shift": 0.5})}, False),
        ({"settings": LONG.model_copy(update={"copies": 2})}, False),
        ({"ensemble": Ensemble(tiny_ensemble().teachers, tiny_ensemble().weights, MemoryLimits(teachers=0))}, False),
    ],
)
def test_long_plain_stretches_on_a_gpu_are_worth_a_graph(changes, suited):
    given = {"length": MIN_STEPS, "ensemble": tiny_ensemble(), "settings": LONG, "terms": (), "device": CUDA}
    assert suits(**(given | changes)) is suited


def test_a_table_has_the_scalars_of_the_steps_that_follow():
    settings = InversionSettings(beta1=0.5, beta2=0.75, learning_rate=0.5)
    adam = PixelAdam(torch.zeros(1, 1, 1), settings)
    adam.counted()
    assert torch.allclose(adam.table(2), torch.tensor([[(1 - 0.75**n) ** 0.5, -0.5 / (1 - 0.5**n)] for n in (2, 3)]))
