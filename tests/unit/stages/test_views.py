"""Plug-In Inversion's augmentations: colours, copies, and images that grow from the middle."""

import pytest
import torch
from torch.nn import functional as F

from fedmitr_flwr.models.patch_grid import PatchGrid
from fedmitr_flwr.results.flops import kept_schedule
from fedmitr_flwr.settings import InversionSettings, Settings, SettingsError
from fedmitr_flwr.stages.inversion.batch import InversionBatch, InversionTask, Watch, starting_images
from fedmitr_flwr.stages.inversion.rebirth import invert_by_rebirth
from fedmitr_flwr.stages.inversion.schedule import growth
from fedmitr_flwr.stages.inversion.views import View
from tests.unit.stages.test_inversion import LABELS, run
from tests.unit.tiny import plain_ensemble, tiny_ensemble, tiny_grid

DENSE = InversionSettings(iterations=6, stops=(), fractions=(), tv_weight=0.05)
CPU = torch.device("cpu")


def draw(settings, seed=0, channels=1, count=6):
    return View.draw(count, tiny_grid(channels), settings, torch.Generator().manual_seed(seed), CPU)


def test_a_color_shift_is_an_affine_map_of_each_channel_of_each_image():
    grid = tiny_grid(3)
    images = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    view = draw(DENSE.model_copy(update={"color_shift": 1.0}), channels=3)
    seen = grid.to_images(view.of(grid.to_patches(images)))
    slope, offset = [], []
    for image, other in zip(images.flatten(0, 1).flatten(1), seen.flatten(0, 1).flatten(1), strict=True):
        a = (other[1] - other[0]) / (image[1] - image[0])
        b = other[0] - a * image[0]
        assert torch.allclose(other, a * image + b, atol=1e-3)
        slope.append(float(a))
        offset.append(float(b / a))
    assert len({round(a, 4) for a in slope}) == len({round(b, 4) for b in offset}) == 18
    assert all(1 / 2.72 < a < 2.72 for a in slope)
    assert all(abs(b) <= 1.01 for b in offset)


def test_gradient_under_a_color_shift_and_a_jitter_equals_autograd():
    settings = DENSE.model_copy(update={"color_shift": 1.0, "jitter": 2, "tv_weight": 0.0})
    ensemble, grid, view = tiny_ensemble(), tiny_grid(), draw(settings, seed=4)
    assert view.shift != (0, 0)
    images = torch.randn(6, 1, 16, 16, generator=torch.Generator().manual_seed(2), requires_grad=True)
    shifted = (images - view.mean[:, :, :1, None]) / view.deviation[:, :, :1, None]
    rolled = shifted.roll((view.shift[0] * 4, view.shift[1] * 4), (2, 3))
    F.nll_loss(plain_ensemble(ensemble, rolled).log(), LABELS, reduction="sum").backward()
    pixels = grid.to_patches(images.detach())
    index = grid.shifted(torch.arange(16).repeat(6, 1), view.shift)
    got = view.pull_back(ensemble.loss_gradient(view.of(pixels), index, LABELS).gradient)
    assert float(got.abs().max()) > 1e-3
    assert torch.allclose(got, grid.to_patches(images.grad), rtol=0, atol=1e-6)


def test_a_view_that_asks_for_nothing_draws_nothing_and_changes_nothing():
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    view = View.draw(6, tiny_grid(), DENSE, generator, CPU)
    pixels = torch.randn(6, 16, 16)
    assert view == View()
    assert view.of(pixels) is view.pull_back(pixels) is pixels
    assert torch.equal(before, generator.get_state())


def test_several_copies_average_loss_gradient_and_attention(monkeypatch):
    settings = DENSE.model_copy(update={"color_shift": 0.5, "tv_weight": 0.0})
    views = [draw(settings, seed) for seed in (1, 2, 3)]
    start = starting_images(6, tiny_grid(), settings, torch.Generator().manual_seed(0))
    parts, seen, gradients = [], [], []

    class Watched(type(tiny_ensemble())):
        def loss_gradient(self, *args):
            parts.append(super().loss_gradient(*args))
            return parts[-1]

    ensemble = Watched(tiny_ensemble().teachers, tiny_ensemble().weights)
    batch = InversionBatch(InversionTask(ensemble, tiny_grid(), settings), LABELS, start)
    monkeypatch.setattr(
        "fedmitr_flwr.stages.inversion.pixel_adam.PixelAdam.step",
        lambda adam, gradient, low, high: gradients.append(gradient),
    )
    loss = batch.step(views, lambda attention: seen.append(attention) or torch.arange(16).repeat(6, 1))
    assert len(parts) == 3
    pulled = [view.pull_back(part.gradient) for view, part in zip(views, parts, strict=True)]
    assert torch.allclose(gradients[0], sum(pulled) / 3, atol=1e-6)
    assert torch.allclose(loss, sum(part.loss for part in parts) / 3)
    assert torch.allclose(seen[0], sum(part.attention for part in parts) / 3)


@pytest.mark.parametrize("change", [{"color_shift": 1.0}, {"color_shift": 1.0, "copies": 3}, {"centring": 4}])
def test_augmented_inversion_repeats_bit_for_bit_and_differs_from_the_plain_one(change):
    settings = DENSE.model_copy(update=change)
    assert torch.equal(run(settings).images, run(settings).images)
    assert not torch.equal(run(settings).images, run(DENSE).images)


def test_rings_grow_from_the_middle_to_the_whole_grid_in_equal_spans():
    grid = PatchGrid(1, 28, (4, 4), torch.zeros(1), torch.ones(1))
    found = growth(grid, 9)
    assert {at: len(kept) for at, kept in found.items()} == {0: 1, 3: 9, 6: 25, 9: 49}
    assert found[3].tolist() == [16, 17, 18, 23, 24, 25, 30, 31, 32]
    assert {at: len(kept) for at, kept in growth(tiny_grid(), 5).items()} == {0: 4, 5: 16}
    assert growth(tiny_grid(), 0) == {}


def test_rings_of_an_oblong_grid_are_oblong_and_those_due_together_come_together():
    grid = PatchGrid(1, 16, (4, 2), torch.zeros(1), torch.ones(1))
    assert [len(kept) for kept in growth(grid, 30).values()][-1] == 32
    assert all(torch.equal(kept, 31 - kept.flip(0)) for kept in growth(grid, 30).values())
    assert list(growth(grid, 1)) == [0, 1]


def test_patches_do_not_move_before_their_time_and_all_do_after_it():
    grid, frames = tiny_grid(), []
    settings = InversionSettings(iterations=9, stops=(4, 6), fractions=(0.3, 0.3), centring=4, tv_weight=0.05)
    start = starting_images(6, grid, settings, torch.Generator().manual_seed(3)).clamp(-1, 2)
    middle = torch.tensor([5, 6, 9, 10])
    outer = torch.ones(16, dtype=torch.bool)
    outer[middle] = False
    before = InversionSettings(iterations=5, stops=(), fractions=(), centring=4, tv_weight=0.05)
    batch = InversionBatch(InversionTask(tiny_ensemble(), grid, before), LABELS, start)
    batch.restart(middle)
    for _ in range(4):
        batch.step()
        patches = grid.to_patches(batch.result().images)
        assert torch.equal(patches[:, outer], grid.to_patches(start)[:, outer])
    got = run(settings, watch=Watch(on_stop=lambda iteration, images, kept: frames.append((images, kept))))
    assert [kept.shape[1] for _, kept in frames] == [11, 7]
    assert got.kept.shape == (6, 7)
    assert bool((grid.to_patches(frames[1][0]) != grid.to_patches(start)).any(-1)[:, outer].any())


def test_patches_that_join_begin_with_a_step_of_the_learning_rate():
    """Under the optimiser of those before them, their first step would be five times as long."""
    grid, settings = tiny_grid(), DENSE.model_copy(update={"tv_weight": 0.0, "learning_rate": 0.01})
    start = torch.zeros(6, 1, 16, 16)
    batch = InversionBatch(InversionTask(tiny_ensemble(), grid, settings), LABELS, start)
    batch.restart(torch.tensor([5, 6, 9, 10]))
    for _ in range(20):
        batch.step()
    before = batch.result().images
    batch.restart(torch.arange(16))
    batch.step()
    assert float((batch.result().images - before).abs().max()) <= 0.0101


def test_centring_works_under_rebirth_as_well():
    settings = InversionSettings(method="rebirth", iterations=9, stops=(4, 6), fractions=(0.3, 0.3), centring=4)
    generator = torch.Generator().manual_seed(3)
    assert invert_by_rebirth(
        InversionTask(tiny_ensemble(), tiny_grid(), settings), LABELS, generator=generator
    ).kept.shape == (18, 5)


def test_arithmetic_counts_the_patches_that_are_there():
    settings = InversionSettings(iterations=20, stops=(6, 10), fractions=(0.3, 0.3), centring=4)
    assert kept_schedule(settings, 16, growth(tiny_grid(), 4)) == [(4, 4), (3, 16), (4, 11), (9, 7)]
    assert sum(length for length, _ in kept_schedule(settings, 16, growth(tiny_grid(), 4))) == 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inversion.centring": 7}, r"inversion\.centring = 7: must not exceed the first of inversion\.stops \(6\)"),
        ({"inversion.centring": 40}, r"inversion\.centring = 40: must be below inversion\.iterations"),
        ({"inversion.copies": 2}, r"inversion\.copies = 2: must be 1 if inversion\.jitter"),
        ({"inversion.color-shift": -1.0}, r"inversion\.color-shift"),
        ({"inversion.color-shift": 4.0}, r"inversion\.color-shift"),
    ],
)
def test_settings_that_cannot_work_are_refused(change, message):
    with pytest.raises(SettingsError, match=message):
        Settings.from_run_config(change)
