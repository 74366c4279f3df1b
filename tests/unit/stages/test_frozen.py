"""The frozen part of the student: which weights it has, and its output, which is kept for all images of the pool."""

import copy
from dataclasses import replace

import pytest
import torch

from fedmitr_flwr.ensemble.ensemble import Ensemble
from fedmitr_flwr.models.vit import in_trunk
from fedmitr_flwr.settings import DistillSettings, RelabelSettings, SettingsError
from fedmitr_flwr.stages.density import PatchSplit
from fedmitr_flwr.stages.distillation import frozen
from fedmitr_flwr.stages.distillation.distill import distill
from fedmitr_flwr.stages.distillation.frozen import (
    FrozenPart,
    StudentTrunk,
    clients_part,
    freeze,
    frozen_part,
    student_trunk,
    token_numbers,
    train_mode,
)
from fedmitr_flwr.stages.distillation.losses import loss_terms
from fedmitr_flwr.stages.distillation.pool import Pool, make_pool
from fedmitr_flwr.stages.distillation.teacher_heads import Branches
from fedmitr_flwr.stages.relabel import RelabelledImages, relabel
from fedmitr_flwr.stages.synthetic import SyntheticImages
from tests.unit.ensemble.test_engine import variant
from tests.unit.ensemble.test_trunk import NAME, clients, moved, weights
from tests.unit.tiny import tiny_grid, tiny_vit

B, DEPTH = 6, 3
IMAGES = torch.randn(B, 1, 16, 16, generator=torch.Generator().manual_seed(7)).clamp(-1, 2)
LABELS = torch.tensor([0, 1, 2, 3, 4, 0])
HIGH = torch.rand(B, 16, generator=torch.Generator().manual_seed(3)) < torch.linspace(0.2, 1.0, B)[:, None]
SPLIT = PatchSplit(HIGH)  # another number of patches for each image, and none of low density in the last one
SETTINGS = DistillSettings(steps=12, batch_size=4, views=2, mix=1.0, noise=1.0, learning_rate=3e-3)


def ensemble(trained: int = 2) -> Ensemble:
    return Ensemble(clients(trained), weights())


def student(trained: int = 2, **options):
    """A model with the clients' trunk and weights of its own after it."""
    return moved(variant(NAME, depth=DEPTH, **options), 77, DEPTH - trained).requires_grad_(True)


def pool(teachers: Ensemble, settings: DistillSettings, trunk: StudentTrunk | None) -> Pool:
    grid = tiny_grid()
    low = relabel(teachers, grid.to_patches(IMAGES), SPLIT, RelabelSettings())
    made = RelabelledImages(SyntheticImages(IMAGES, LABELS, torch.zeros(B, 1), torch.zeros(B)), SPLIT, low)
    return make_pool(teachers, made, grid, settings, generator=torch.Generator().manual_seed(0), trunk=trunk)


def kept(model, part: FrozenPart, teachers: Ensemble, settings: DistillSettings = SETTINGS) -> StudentTrunk:
    freeze(model, part)
    found = student_trunk(model, part, teachers, settings, 1000, B)
    assert found is not None
    return found


def test_all_high_low_masks_are_ragged():
    assert len(set(HIGH.sum(1).tolist())) > 3
    assert bool(HIGH.all(1).any())


@pytest.mark.parametrize(
    ("value", "shared", "norm", "expected"),
    [
        ("all", 10, True, FrozenPart(None)),
        ("auto", 0, False, FrozenPart(None)),
        ("auto", 10, False, FrozenPart(10)),
        ("auto", 12, False, FrozenPart(12)),
        ("auto", 12, True, FrozenPart(12, norm=True)),
        ("head", 0, False, FrozenPart(12, norm=True)),
        ("last-2", 0, False, FrozenPart(10)),
        ("last-12", 0, False, FrozenPart(0)),
    ],
)
def test_the_setting_names_what_is_frozen(value, shared, norm, expected):
    assert frozen_part(DistillSettings(trainable=value).trainable, 12, shared, norm) == expected


def test_more_blocks_than_the_model_has_are_refused():
    with pytest.raises(SettingsError, match=r"distill\.trainable = \"last-4\": the model has 3 blocks"):
        frozen_part("last-4", 3)


@pytest.mark.parametrize("value", ["last-0", "tail", "last-", "last-2.5", ""])
def test_other_values_are_refused(value):
    with pytest.raises(ValueError, match="trainable"):
        DistillSettings(trainable=value)


@pytest.mark.parametrize(("trained", "expected"), [(2, FrozenPart(1)), (0, FrozenPart(DEPTH)), (4, FrozenPart(None))])
def test_auto_freezes_what_no_client_trained(trained, expected):
    assert clients_part("auto", ensemble(trained)) == expected


def test_auto_freezes_the_last_norm_if_only_heads_were_trained():
    teachers = [variant(NAME, depth=DEPTH) for _ in range(3)]
    with torch.no_grad():
        for k, teacher in enumerate(teachers):
            teacher.head.weight.add_(k)
    assert clients_part("auto", Ensemble(teachers, weights(3))) == FrozenPart(DEPTH, norm=True)


@pytest.mark.parametrize("ce_on", ["full", "high"])
@pytest.mark.parametrize("blocks", [1, 2, 3])
@pytest.mark.parametrize("options", [{}, {"reg_tokens": 2}], ids=["plain", "register tokens"])
def test_losses_from_kept_tokens_equal_those_from_pixels(options, blocks, ce_on):
    settings = SETTINGS.model_copy(update={"ce_on": ce_on})
    teachers = Ensemble(clients(2, **options), weights())
    model = student(DEPTH - blocks, **options)
    trunk = kept(model, FrozenPart(blocks), teachers, settings)
    assert trunk.dtype == torch.float32
    with_tokens, without = pool(teachers, settings, trunk), pool(teachers, settings, None)
    assert with_tokens.inverted.targets.blocks == blocks
    assert (with_tokens.high_tokens is None) is (ce_on == "full")
    for rows in (torch.arange(len(without)), torch.tensor([3, 9, 1, 20, 5]), torch.arange(B, 2 * B)):
        branches = [Branches.of(teachers, each.features()) for each in (with_tokens, without)]
        got = loss_terms(model, with_tokens.batch(rows), settings, branches[0])
        expected = loss_terms(model, without.batch(rows), settings, branches[1])
        for name, value in expected.values().items():
            assert got.values()[name] == pytest.approx(value, rel=1e-5, abs=1e-5), name


def test_tokens_that_teachers_and_student_share_are_computed_by_the_teachers(monkeypatch):
    teachers, model, ran = ensemble(), student(), []
    trunk = kept(model, FrozenPart(1), teachers)
    assert trunk.shared
    original = frozen.forward_trunk
    monkeypatch.setattr(frozen, "forward_trunk", lambda *a, **k: ran.append(len(a[1])) or original(*a, **k))
    made = pool(teachers, SETTINGS, trunk)
    assert sum(ran) == int((~HIGH).any(1).sum())  # the low-density patches alone
    full = made.batch(torch.arange(len(made))).images
    assert torch.allclose(full.targets.tokens, trunk(full.patches), atol=1e-5)
    assert not kept(student(3), FrozenPart(1), teachers).shared
    assert not kept(student(), FrozenPart(2), teachers).shared


@pytest.mark.parametrize("trained", [2, 0])
def test_distillation_on_kept_tokens_trains_the_same_student_and_leaves_the_frozen_part_alone(trained):
    teachers, part, said = ensemble(trained), FrozenPart(DEPTH - trained), []
    for keep in (True, False):
        model = student(trained)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        trunk = kept(model, part, teachers)
        made = pool(teachers, SETTINGS, trunk if keep else None)
        branches = Branches.of(teachers, made.features())
        distill(model, made, SETTINGS, generator=torch.Generator().manual_seed(1), branches=branches)
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name]) is in_trunk(name, DEPTH - trained), name
        said.append(model(IMAGES).detach())
    assert torch.allclose(said[0], said[1], atol=1e-3)


class Kept:
    """The state of training that was offered last."""

    def __init__(self, state=None):
        self.state = state

    def load(self):
        return self.state

    def offer(self, make):
        self.state = copy.deepcopy(make())


def test_the_optimiser_has_the_trained_parameters_alone_and_goes_on_from_a_checkpoint():
    teachers, generator = ensemble(), torch.Generator().manual_seed(1)
    whole, cut = student(), student()
    trunk = kept(whole, FrozenPart(1), teachers)
    made, progress = pool(teachers, SETTINGS, trunk), Kept()
    distill(whole, made, SETTINGS, generator=generator)
    freeze(cut, FrozenPart(1))

    def stop(step, terms):
        if step == 6:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        distill(cut, made, SETTINGS, generator=torch.Generator().manual_seed(1), on_step=stop, progress=progress)
    trained = sum(parameter.requires_grad for parameter in cut.parameters())
    assert sum(len(group["params"]) for group in progress.state["optimizer"]["param_groups"]) == trained
    assert trained == sum(not in_trunk(name, 1) for name, _ in cut.named_parameters())
    resumed = student()
    freeze(resumed, FrozenPart(1))
    distill(resumed, made, SETTINGS, generator=torch.Generator(), progress=Kept(progress.state))
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_a_limit_of_memory_makes_kept_tokens_bf16_and_then_leaves_them_out():
    teachers, model, part = ensemble(), student(), FrozenPart(1)
    numbers = token_numbers(model, 1, SETTINGS, 10_000, B)
    exact = numbers * 4 / 2**20
    for limit, dtype in ((exact + 1, torch.float32), (exact - 1, torch.bfloat16), (exact / 2 - 1, None), (0, None)):
        settings = SETTINGS.model_copy(update={"cache_memory_mb": int(limit)})
        found = student_trunk(model, part, teachers, settings, 10_000, B)
        assert (None if found is None else found.dtype) == dtype
    assert student_trunk(model, FrozenPart(None), teachers, SETTINGS, 10, B) is None
    assert student_trunk(model, FrozenPart(0), teachers, SETTINGS, 10, B) is None


@pytest.mark.parametrize("ce_on", ["full", "high"])
@pytest.mark.parametrize("blocks", [1, DEPTH])
def test_kept_tokens_stay_within_what_is_counted(blocks, ce_on):
    settings, teachers, model = SETTINGS.model_copy(update={"ce_on": ce_on}), ensemble(), student()
    made = pool(teachers, settings, kept(model, FrozenPart(blocks), teachers, settings))
    sizes = [part.targets.tokens.numel() for part in (made.inverted, made.further)]
    sizes += [part.flat.numel() for part in (made.high_tokens, made.low_tokens) if part is not None]
    assert sum(sizes) <= token_numbers(model, blocks, settings, len(made), B)
    if ce_on == "high":
        assert sum(sizes) > 0.9 * token_numbers(model, blocks, settings, len(made), B)


def test_tokens_in_bf16_are_near_those_in_fp32():
    teachers, model = ensemble(), student()
    exact = kept(model, FrozenPart(1), teachers)
    rounded = StudentTrunk(model, 1, teachers, torch.bfloat16)
    one, two = pool(teachers, SETTINGS, exact), pool(teachers, SETTINGS, rounded)
    assert two.inverted.targets.tokens.dtype == two.low_tokens.flat.dtype == torch.bfloat16
    rows = torch.arange(len(one))
    a, b = (loss_terms(model, each.batch(rows), SETTINGS).values() for each in (one, two))
    assert b == pytest.approx(a, rel=0.05, abs=0.02)


def test_joined_pools_keep_the_tokens_of_both():
    teachers, model = ensemble(), student()
    trunk = kept(model, FrozenPart(1), teachers, SETTINGS)
    made = pool(teachers, SETTINGS, trunk)
    both = made.join(made)
    rows = torch.tensor([1, B + 1, B + 5])
    found = both.batch(rows)
    terms = []
    for place in (0, 1):
        one = torch.tensor([place])
        parts = {name: getattr(found, name)[one] for name in ("split", "low_targets", "low_tokens")}
        terms.append(loss_terms(model, replace(found, inverted=found.inverted[one], **parts), SETTINGS))
    assert float(terms[0].low) == pytest.approx(float(terms[1].low), abs=1e-6)


def test_no_dropout_acts_in_the_frozen_part():
    model = student(1, proj_drop_rate=0.3, drop_path_rate=0.3, pos_drop_rate=0.2)
    freeze(model, FrozenPart(2))
    train_mode(model)
    trunk = StudentTrunk(model, 2, ensemble(1), torch.float32)
    patches = tiny_grid().to_patches(IMAGES)
    assert torch.equal(trunk(patches), trunk(patches))
    assert [block.training for block in model.blocks] == [False, False, True]
    assert not model.pos_drop.training
    freeze(model, FrozenPart(None))
    train_mode(model)
    assert all(module.training for module in model.modules())


def test_a_student_that_trains_all_weights_is_as_before():
    model = tiny_vit(5)
    freeze(model, FrozenPart(None))
    assert all(parameter.requires_grad for parameter in model.parameters())
