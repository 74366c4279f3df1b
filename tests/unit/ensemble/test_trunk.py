"""Blocks that no client trained: found from the weights, computed once for all teachers, with the same results."""

from collections.abc import Mapping

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from fedmitr_flwr.ensemble.engine import passes
from fedmitr_flwr.ensemble.engine.flops import pass_flops
from fedmitr_flwr.ensemble.engine.teachers import MemoryLimits, PagedTeachers, load_teachers
from fedmitr_flwr.ensemble.engine.trunk import shared_depth, tensors_of
from fedmitr_flwr.ensemble.ensemble import Ensemble
from fedmitr_flwr.models.patch_grid import PatchGrid
from fedmitr_flwr.models.vit import forward_patches, in_trunk
from fedmitr_flwr.settings import InversionSettings
from fedmitr_flwr.stages.inversion.batch import InversionTask
from fedmitr_flwr.stages.inversion.sparse import invert
from fedmitr_flwr.stages.inversion.terms import Diversity
from tests.unit.ensemble.test_engine import variant
from tests.unit.tiny import CLASSES, tiny_grid, tiny_vit

CPU, K, DEPTH = torch.device("cpu"), 4, 3
NAME = "vit_tiny_patch16_224"
LABELS = torch.tensor([0, 1, 2])
VARIANTS = {
    "plain": (NAME, {}),
    "register tokens and layer scale": (NAME, {"reg_tokens": 2, "no_embed_class": True, "init_values": 0.3}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "by autograd": (NAME, {"qk_norm": True}),
    "by autograd, with a norm before the blocks": (NAME, {"pre_norm": True}),
}


def clients(trained: int, count: int = K, name: str = NAME, depth: int = DEPTH, **options):
    """Models that trained the last blocks, the last norm and the head of one common start."""
    return [moved(variant(name, depth=depth, **options), k, depth - trained) for k in range(count)]


def moved(model, seed: int, depth: int):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not in_trunk(name, depth):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def weights(count: int = K):
    share = torch.rand(count, CLASSES, generator=torch.Generator().manual_seed(0))
    return share / share.sum(0)


def inputs(count: int | None = 6):
    """Patches of three images, with their places in the grid; all of them without a number."""
    generator = torch.Generator().manual_seed(1)
    if count is None:
        return torch.randn(3, 16, 16, generator=generator), None
    return torch.randn(3, count, 16, generator=generator), torch.rand(3, 16, generator=generator).argsort(1)[:, :count]


def apart(teachers, limits=None) -> Ensemble:
    """The same ensemble that runs every teacher from the pixels."""
    ensemble = Ensemble(teachers, weights(len(teachers)), limits)
    ensemble.__dict__["shared_blocks"] = 0
    return ensemble


def same(got, expected, atol=1e-5) -> None:
    for name in ("loss", "gradient", "attention", "probabilities"):
        assert torch.allclose(getattr(got, name), getattr(expected, name), rtol=1e-5, atol=atol), name


def plain(teachers, share, patches, index):
    """Loss, gradient, attention and A(x) by autograd, teacher by teacher from the pixels."""
    patches = patches.clone().requires_grad_(True)
    outputs = [forward_patches(teacher, patches, index, attention=True) for teacher in teachers]
    total = sum(share[k] * out.logits.softmax(-1) for k, out in enumerate(outputs))
    probabilities = total / total.sum(-1, keepdim=True)
    loss = F.nll_loss(probabilities.log(), LABELS, reduction="none")
    (gradient,) = torch.autograd.grad(loss.sum(), patches)
    attention = sum(share[k, LABELS][:, None] * out.attention for k, out in enumerate(outputs))
    return outputs, loss.detach(), gradient, attention.detach(), probabilities.detach()


@pytest.mark.parametrize("count", [6, None], ids=["some patches", "all patches"])
@pytest.mark.parametrize("trained", [2, 1, 0])
@pytest.mark.parametrize("kind", VARIANTS)
def test_shared_blocks_computed_once_give_the_results_of_the_plain_reference(kind, trained, count):
    name, options = VARIANTS[kind]
    teachers, (patches, index) = clients(trained, name=name, **options), inputs(count)
    ensemble = Ensemble(teachers, weights())
    assert ensemble.shared_blocks == DEPTH - trained
    outputs, loss, gradient, attention, probabilities = plain(teachers, weights(), patches, index)
    got = ensemble.loss_gradient(patches, index, LABELS)
    assert torch.allclose(got.loss, loss, rtol=1e-5, atol=1e-6)
    assert torch.allclose(got.gradient, gradient, atol=1e-5)
    assert torch.allclose(got.attention, attention, atol=1e-5)
    assert torch.allclose(got.probabilities, probabilities, atol=1e-5)
    seen = ensemble.see(patches, index, features=True)
    for k, out in enumerate(outputs):
        assert torch.allclose(seen.logits[k], out.logits, atol=1e-5)
        assert torch.allclose(seen.attention[k], out.attention, atol=1e-5)
        assert torch.allclose(seen.features[k], out.features, atol=1e-5)
    leaf = patches.clone().requires_grad_(True)
    said = ensemble(leaf, index, attention=True, labels=LABELS)
    (by_autograd,) = torch.autograd.grad(F.nll_loss(said.probabilities.log(), LABELS, reduction="sum"), leaf)
    assert torch.allclose(said.probabilities, probabilities, atol=1e-5)
    assert torch.allclose(said.attention, attention, atol=1e-5)
    assert torch.allclose(by_autograd, gradient, atol=1e-5)


@pytest.mark.parametrize("trained", [2, 0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("limits", [MemoryLimits(), MemoryLimits(activations=0), MemoryLimits(teachers=0)])
def test_steps_number_formats_and_memory_limits_give_the_results_of_separate_teachers(
    limits, dtype, trained, monkeypatch
):
    patches, index = inputs()
    atol = 1e-5 if dtype == torch.float32 else 0.02
    terms = [Diversity(0.3, 0.5)]
    expected = apart(clients(trained), limits).loss_gradient(patches, index, LABELS, dtype, terms)
    same(
        Ensemble(clients(trained), weights(), limits).loss_gradient(patches, index, LABELS, dtype, terms),
        expected,
        atol,
    )
    monkeypatch.setattr("fedmitr_flwr.ensemble.engine.groups.STEP_ROWS", 1)  # one teacher a step
    expected = apart(clients(trained), limits).loss_gradient(patches, index, LABELS, dtype)
    same(Ensemble(clients(trained), weights(), limits).loss_gradient(patches, index, LABELS, dtype), expected, atol)


def test_tokens_of_the_trunk_are_returned_with_the_outputs():
    teachers, (patches, index) = clients(1), inputs()
    got = Ensemble(teachers, weights()).see(patches.repeat(200, 1, 1), index.repeat(200, 1), tokens=True).tokens
    tokens = teachers[0].blocks[:2](teachers[0]._pos_embed(teachers[0].patch_embed(torch.zeros(1, 1, 16, 16))))
    assert got.shape == (600, 7, tokens.shape[-1])
    assert torch.allclose(got[-3:], got[:3], atol=1e-6)
    rows = Ensemble(clients(0), weights()).see(patches, index, tokens=True, features=True)
    assert torch.allclose(rows.tokens[:, 0], rows.features[0], atol=1e-6)
    assert Ensemble([tiny_vit(k) for k in range(2)], weights(2)).see(patches, index, tokens=True).tokens is None


def test_the_depth_is_that_of_the_first_weight_that_differs():
    state = tensors_of(variant(NAME, depth=DEPTH))
    assert {"cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.2.mlp.fc2.bias", "norm.weight"} < set(state)
    for name, value in state.items():
        stage = (
            int(name.split(".")[1]) if name.startswith("blocks.") else (DEPTH if name[:4] in ("norm", "head") else 0)
        )
        assert shared_depth([state, state, {**state, name: value + 1e-6}, state], DEPTH) == stage, name


def test_one_teacher_and_other_architectures_have_no_trunk():
    assert Ensemble(clients(1)[:1], weights(1)).shared_blocks == 0
    other = variant(NAME, depth=DEPTH, reg_tokens=2)
    assert Ensemble([*clients(1)[:2], other], weights(3)).shared_blocks == 0
    longer = Ensemble([clients(1)[0], variant(NAME, depth=DEPTH, qk_norm=True)], weights(2))
    assert longer.shared_blocks == 0
    longer.loss_gradient(*inputs(), LABELS)


def test_the_same_tensors_are_not_compared(monkeypatch):
    first = tensors_of(clients(1)[0])
    states = [{**first, "head.bias": torch.full((CLASSES,), float(k))} for k in range(5)]
    monkeypatch.setattr(torch, "equal", lambda *_: pytest.fail("compared"))
    assert shared_depth(states, DEPTH) == DEPTH


class Counted(Mapping):
    """A state that notes which tensors are read."""

    def __init__(self, state, notes):
        self._state, self._notes = state, notes

    def __getitem__(self, name):
        self._notes.append(name)
        return self._state[name]

    def __iter__(self):
        return iter(self._state)

    def __len__(self):
        return len(self._state)


@pytest.mark.parametrize("options", [{}, {"qk_norm": True}], ids=["packed", "by autograd"])
def test_a_page_reads_the_tail_alone(options):
    models, notes = clients(1, **options), []
    states = [Counted(model.state_dict(), notes) for model in models]
    teachers = load_teachers(models[0], states, MemoryLimits(teachers=0), CPU)
    assert isinstance(teachers, PagedTeachers)
    assert teachers.depth == DEPTH - 1
    notes.clear()
    patches, index = inputs()
    got = Ensemble(teachers, weights(), MemoryLimits(teachers=0)).loss_gradient(patches, index, LABELS)
    assert notes
    assert not any(in_trunk(name, DEPTH - 1) for name in notes)
    same(got, Ensemble(models, weights()).loss_gradient(patches, index, LABELS), atol=0)
    notes.clear()
    few = teachers.take([1, 3], MemoryLimits())
    assert len(notes) == len(set(notes)) + len({name for name in notes if not in_trunk(name, DEPTH - 1)})
    again = Ensemble(few, weights(2)).loss_gradient(patches, index, LABELS)
    same(again, Ensemble([models[1], models[3]], weights(2)).loss_gradient(patches, index, LABELS), atol=0)


@pytest.mark.parametrize("limits", [MemoryLimits(), MemoryLimits(teachers=1)], ids=["fp32", "bf16"])
def test_loaded_teachers_have_one_trunk_together(limits):
    models = clients(1, count=40 if limits.teachers == 1 else K)
    teachers = load_teachers(models[0], [model.state_dict() for model in models], limits, CPU)
    assert not isinstance(teachers, PagedTeachers)
    memory = {value.data_ptr(): value.numel() for teacher in teachers for value in teacher.parameters()}
    sizes = {name: value.numel() for name, value in models[0].named_parameters()}
    trunk = sum(size for name, size in sizes.items() if in_trunk(name, DEPTH - 1))
    assert sum(memory.values()) == trunk + len(models) * (sum(sizes.values()) - trunk)
    kinds = {value.dtype for teacher in teachers for value in teacher.parameters()}
    assert kinds == {torch.bfloat16 if limits.teachers == 1 else torch.float32}
    ensemble = Ensemble(teachers, weights(len(models)), limits)
    assert ensemble.shared_blocks == DEPTH - 1
    assert ensemble.held is (limits.teachers != 1)
    same(ensemble.loss_gradient(*inputs(), LABELS), apart(models, limits).loss_gradient(*inputs(), LABELS))


def test_shared_weights_count_once_in_the_limit():
    model = clients(1)[0]
    whole = sum(value.numel() for value in model.parameters())
    tail = sum(value.numel() for name, value in model.named_parameters() if not in_trunk(name, DEPTH - 1))
    count = ((2 << 20) - 8 * (whole - tail)) // (8 * tail)  # fp32, original and packed, in 2 MiB
    limits = MemoryLimits(teachers=2)
    assert limits.place(model, count, DEPTH - 1) == "held"
    assert limits.place(model, count) != "held"
    assert limits.size(model, count, DEPTH - 1) == 8 * (whole - tail + count * tail)


def test_activations_of_the_trunk_count_once():
    patches, labels = torch.randn(100, 16, 16), torch.arange(100) % CLASSES
    sizes = {}
    for name, ensemble in (("shared", Ensemble(clients(1, 12), weights(12))), ("apart", apart(clients(1, 12)))):
        ensemble.loss_gradient(patches, None, labels)
        sizes[name] = ensemble.activation_bytes
        ensemble.release()
        assert ensemble.activation_bytes == 0
    assert sizes["shared"] < sizes["apart"] / 4


def test_drawn_teachers_share_the_trunk_too():
    ensemble = Ensemble(clients(1), weights())
    few = ensemble.draw(2, LABELS, torch.Generator().manual_seed(0))
    assert few.shared_blocks == DEPTH - 1


def test_an_iteration_costs_what_shared_and_own_blocks_predict(monkeypatch):
    """50 teachers of 12 blocks of which 2 were trained: 10 + 50 x 2 blocks, not 50 x 12."""
    n, m, many, L = 12, 2, 50, 16
    teachers, ran = clients(m, many, depth=n), []
    for name in ("_block_forward", "_last_forward"):
        original = getattr(passes, name)

        def counted(*arguments, original=original):
            ran.append(arguments[2].shape[0])  # T
            return original(*arguments)

        monkeypatch.setattr(passes, name, counted)
    ensemble = Ensemble(teachers, weights(many))
    with FlopCounterMode(display=False) as counter:
        ensemble.loss_gradient(torch.randn(1, L, 16), None, LABELS[:1])
    assert sum(ran) == n - m + many * m
    grid: PatchGrid = tiny_grid()
    block = pass_flops(tiny_vit(depth=n), grid, L) - pass_flops(tiny_vit(depth=n - 1), grid, L)
    assert counter.get_total_flops() == pytest.approx(pass_flops(teachers[0], grid, L, many, n - m), rel=1e-3)
    assert counter.get_total_flops() <= 1.2 * (n - m + many * m) * block
    assert pass_flops(teachers[0], grid, L, many) > 5 * counter.get_total_flops()


@pytest.mark.parametrize("trained", [2, 0])
def test_flops_of_teachers_that_run_by_autograd_are_counted_likewise(trained):
    teachers, grid = clients(trained, qk_norm=True), tiny_grid()
    with FlopCounterMode(display=False) as counter:
        Ensemble(teachers, weights()).loss_gradient(torch.randn(1, 16, 16), None, LABELS[:1])
    assert counter.get_total_flops() == pytest.approx(pass_flops(teachers[0], grid, 16, K, DEPTH - trained), rel=1e-3)


def test_inversion_makes_the_images_of_separate_teachers():
    settings = InversionSettings(iterations=12, stops="3,6", fractions="0.3,0.3", jitter=1, learning_rate=0.05)
    made = [
        invert(InversionTask(each, tiny_grid(), settings), LABELS, generator=torch.Generator().manual_seed(0))
        for each in (Ensemble(clients(1), weights()), apart(clients(1)))
    ]
    assert torch.equal(made[0].kept, made[1].kept)
    assert torch.allclose(made[0].images, made[1].images, atol=1e-3)
    assert torch.allclose(made[0].loss, made[1].loss, atol=1e-3)
