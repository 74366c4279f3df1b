"""Hard images: inverted while the student learns, where it and the ensemble disagree."""

import math

import pytest
import torch
from torch.nn import functional as F

from fedmitr_flwr.federation.plan import plan_memory
from fedmitr_flwr.models.build import build_model
from fedmitr_flwr.models.patch_grid import PatchGrid
from fedmitr_flwr.models.vit import forward_patches
from fedmitr_flwr.pipeline.checkpoints import Checkpoints
from fedmitr_flwr.pipeline.hard_images import round_steps
from fedmitr_flwr.results.flops import stage_flops
from fedmitr_flwr.settings import InversionSettings, Settings, SettingsError
from fedmitr_flwr.stages.density import PatchSplit
from fedmitr_flwr.stages.distillation import distill
from fedmitr_flwr.stages.distillation.pool import LabelledImages, Pool, Targets, unnamed_pool
from fedmitr_flwr.stages.inversion import methods
from fedmitr_flwr.stages.inversion.batch import InversionTask
from fedmitr_flwr.stages.inversion.sparse import invert
from fedmitr_flwr.stages.inversion.terms import Disagreement, jensen_shannon
from fedmitr_flwr.stages.relabel import LowTargets
from tests.unit.pipeline import test_pipeline
from tests.unit.pipeline.test_pipeline import CutOffError, clients, cut_after  # noqa: F401 - a fixture
from tests.unit.stages.test_diversity import INDEX, PATCHES
from tests.unit.stages.test_inversion import LABELS
from tests.unit.tiny import tiny_ensemble, tiny_grid, tiny_vit

HARD = {"distill.adversarial-rounds": 2, "distill.adversarial-images": 7}


def test_gradient_of_cross_entropy_and_disagreement_equals_autograd():
    ensemble, student = tiny_ensemble(), tiny_vit(seed=50)
    patches = PATCHES.clone().requires_grad_(True)
    a = ensemble(patches, INDEX).probabilities
    s = forward_patches(student, patches, INDEX).logits.softmax(-1)
    mean = (a + s) / 2
    js = (F.kl_div(mean.log(), a, reduction="sum") + F.kl_div(mean.log(), s, reduction="sum")) / 2
    loss = F.nll_loss(a.log(), LABELS, reduction="sum") - 0.7 * js
    (expected,) = torch.autograd.grad(loss, patches)
    got = ensemble.loss_gradient(PATCHES, INDEX, LABELS, terms=[Disagreement(student, 0.7)])
    plain = ensemble.loss_gradient(PATCHES, INDEX, LABELS)
    assert float((got.gradient - plain.gradient).abs().max()) > 1e-3  # so that the next line can fail
    assert torch.allclose(got.gradient, expected, rtol=0, atol=2e-6)
    assert torch.equal(got.loss, plain.loss)
    assert all(weight.grad is None for weight in student.parameters())


def test_divergence_lies_between_zero_and_log_2():
    p = torch.tensor([[1.0, 0.0], [0.5, 0.5], [1.0, 0.0]])
    q = torch.tensor([[0.0, 1.0], [0.5, 0.5], [0.5, 0.5]])
    expected = torch.tensor([math.log(2), 0.0, 0.2157616])
    assert torch.allclose(jensen_shannon(p, q), expected, atol=1e-5)


def test_hard_images_divide_ensemble_and_student_and_still_look_like_their_labels():
    ensemble, grid, student = tiny_ensemble(), tiny_grid(), tiny_vit(seed=50)
    settings = InversionSettings(iterations=40, stops=(8,), fractions=(0.3,), tv_weight=0.02)
    apart = []
    student.requires_grad_(False)
    for terms in ([], [Disagreement(student, 1.0)]):
        made = invert(
            InversionTask(ensemble, grid, settings), LABELS, generator=torch.Generator().manual_seed(3), terms=terms
        )
        patches = grid.to_patches(made.images).gather(1, made.kept[..., None].expand(-1, -1, 16))
        said = forward_patches(student, patches, made.kept).logits.softmax(-1)
        apart.append(float(jensen_shannon(ensemble(patches, made.kept).probabilities, said).mean()))
        assert float(made.loss.max()) < 0.7
    assert apart[1] > apart[0] + 0.1


def test_rounds_are_spread_evenly_and_each_is_followed_by_steps():
    assert round_steps(3, 600) == [150, 300, 450]
    assert round_steps(2, 3) == [1, 2]
    assert round_steps(0, 600) == []


def part(count, more, start):
    """A pool of `count` synthetic images and `more` others whose pixels and labels count from `start`."""
    numbers = torch.arange(start, start + count + more)
    high = torch.arange(count * 4).view(count, 4) % 3 == start % 3
    low = LowTargets(numbers[:count, None].float().repeat(1, 2), numbers[:count] % 2 == 0)
    pixels = numbers[:, None, None].float().expand(-1, 4, 3)
    targets = Targets(numbers[:, None].float().repeat(1, 2), numbers[:, None, None].bfloat16().repeat(1, 3, 2))
    everything = LabelledImages(pixels, numbers, targets)
    return Pool(everything[:count], PatchSplit(high), low, everything[count:])


def test_joined_pools_keep_images_labels_targets_and_splits_together():
    first, second = part(2, 3, 0), part(4, 1, 5)
    joined = first.join(second)
    images = joined.batch(torch.arange(len(joined))).images
    assert images.labels.tolist() == [0, 1, 5, 6, 7, 8, 2, 3, 4, 9]
    assert images.patches[:, 0, 0].tolist() == images.targets.probabilities[:, 0].tolist() == images.labels.tolist()
    assert images.targets.features[:, 2, 1].tolist() == images.labels.tolist()
    assert torch.equal(joined.split.high, torch.cat([first.split.high, second.split.high]))
    assert joined.low_targets.probabilities[:, 0].tolist() == [0, 1, 5, 6, 7, 8]
    assert joined.low_targets.present.tolist() == [True, False, False, True, False, True]
    unnamed = unnamed_pool(torch.zeros(2, 4, 3), Targets(torch.ones(2, 2), torch.ones(2, 3, 2).bfloat16()))
    both = unnamed.join(second)
    assert both.batch(torch.arange(7)).images.labels.tolist() == [5, 6, 7, 8, -1, -1, 9]


def pools_of(monkeypatch):
    """Every pool that a step of distillation learnt from, in order, each once."""
    seen = []

    def watched(pool, rows, original=Pool.batch):
        if all(pool is not other for other in seen):
            seen.append(pool)
        return original(pool, rows)

    monkeypatch.setattr(Pool, "batch", watched)
    return seen


def test_the_pool_grows_by_each_round_and_rounds_differ(clients, monkeypatch):  # noqa: F811
    pools = pools_of(monkeypatch)
    result = test_pipeline.run(clients, **HARD)
    assert [len(pool.split.high) for pool in pools] == [25, 32, 39]
    assert [len(pool) for pool in pools] == [100, 114, 128]  # each with a view, nothing mixed or random
    last = pools[-1]
    assert torch.equal(last.inverted.patches[:25], pools[0].inverted.patches[:25])
    assert not torch.equal(last.inverted.patches[25:32], last.inverted.patches[32:39])
    assert bool((last.inverted.labels[25:39] < 9).all())
    assert len(result.synthetic.labels) == 25


def test_each_batch_has_a_seed_of_its_own_and_classes_take_turns_over_the_rounds(clients, monkeypatch):  # noqa: F811
    numbers, labels = [], []

    def watched(ensemble, batch, *more, original=methods.invert_batch, **named):
        numbers.append(named["number"])
        labels.extend(batch.tolist())
        return original(ensemble, batch, *more, **named)

    for module in ("steps", "hard_images"):
        monkeypatch.setattr(f"fedmitr_flwr.pipeline.{module}.invert_batch", watched)
    test_pipeline.run(clients, **{**HARD, "distill.adversarial-images": 12})
    assert numbers == [0, 1, 2, 3, 4, 5, 6]  # 25 images by 10, then 12 by 10 twice
    assert labels[25:] == [number % 9 for number in range(24)]


def test_hard_images_repeat_bit_for_bit_and_change_the_model(clients):  # noqa: F811
    first, second, plain = (test_pipeline.run(clients, **changes) for changes in (HARD, HARD, {}))
    assert all(torch.equal(first.state[name], second.state[name]) for name in first.state)
    assert not all(torch.equal(first.state[name], plain.state[name]) for name in first.state)
    assert torch.equal(first.synthetic.images, plain.synthetic.images)


@pytest.mark.parametrize("more", [{"inversion.method": "rebirth"}, {"inversion.teachers-per-batch": 1}])
def test_hard_images_are_made_as_inversion_makes_images(clients, monkeypatch, more):  # noqa: F811
    pools = pools_of(monkeypatch)
    test_pipeline.run(clients, **HARD, **more)
    each = 9 if "inversion.method" in more else 7  # three a run
    assert len(pools[-1].split.high) == len(pools[0].split.high) + 2 * each


def test_a_run_that_was_cut_off_with_hard_images_distils_anew_to_the_same_model(clients, tmp_path, monkeypatch):  # noqa: F811
    whole = test_pipeline.run(clients, **HARD)
    with monkeypatch.context() as patch:
        cut_after(patch, (distill, "loss_terms"), 12)
        with pytest.raises(CutOffError):
            test_pipeline.run(clients, checkpoints=Checkpoints(tmp_path, 0.0), **HARD)
    assert not (tmp_path / "distill.safetensors").exists()
    resumed = test_pipeline.run(clients, checkpoints=Checkpoints(tmp_path, 0.0), **HARD)
    assert all(torch.equal(whole.state[name], resumed.state[name]) for name in whole.state)


def test_arithmetic_and_memory_count_the_rounds():
    settings, spec = test_pipeline.SETTINGS, test_pipeline.SOURCE.spec
    hard = settings.replace(**HARD)
    model = build_model(settings.model, spec)
    plain, more = (stage_flops(each, model, PatchGrid.of(model, spec), 2) for each in (settings, hard))
    assert {stage for stage in plain if more[stage] > plain[stage]} == {"distill"}
    inverted = more["distill"] - plain["distill"]
    assert inverted > plain["invert"] * 14 / 25 * 3 / 2  # 14 of 25 images, two teachers and the student
    few, many = (
        plan_memory(each.replace(**{"run.memory-mb": 4000}), spec, 2, torch.device("cpu"))
        for each in (settings, hard.replace(**{"distill.adversarial-images": 10_000}))
    )
    assert many.distillation > few.distillation + few.activations


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"distill.adversarial-rounds": 600, "distill.steps": 600},
            r"distill\.adversarial-rounds = 600: must be below distill\.steps",
        ),
        ({"distill.adversarial-rounds": -1}, r"distill\.adversarial-rounds"),
        ({"distill.adversarial-images": 0}, r"distill\.adversarial-images"),
        ({"distill.adversarial-weight": -0.5}, r"distill\.adversarial-weight"),
    ],
)
def test_settings_that_cannot_work_are_refused(change, message):
    with pytest.raises(SettingsError, match=message):
        Settings.from_run_config(change)
