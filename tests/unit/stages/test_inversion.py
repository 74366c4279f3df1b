from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from benchmarks.inversion.reference import PlainInversion
from fedmitr_flwr.settings import InversionSettings
from fedmitr_flwr.stages.inversion.batch import InversionBatch, InversionDivergedError, InversionTask
from fedmitr_flwr.stages.inversion.methods import patches_left
from fedmitr_flwr.stages.inversion.pixel_adam import scatter
from fedmitr_flwr.stages.inversion.prior import Prior
from fedmitr_flwr.stages.inversion.schedule import most_attended
from fedmitr_flwr.stages.inversion.sparse import invert
from tests.unit.tiny import plain_ensemble, tiny_ensemble, tiny_grid

LABELS = torch.tensor([0, 1, 2, 3, 4, 0])


def run(settings: InversionSettings, seed: int = 3, labels: torch.Tensor = LABELS, **more):
    return invert(
        InversionTask(tiny_ensemble(), tiny_grid(), settings),
        labels,
        generator=torch.Generator().manual_seed(seed),
        **more,
    )


def prior_gradient(canvas, kept, grid, settings):
    """The gradient at the kept patches, whatever the canvas holds there when the prior is made."""
    pixels = canvas.gather(1, kept[..., None].expand(-1, -1, canvas.shape[-1]))
    prior = Prior(scatter(canvas, kept, torch.zeros_like(pixels)), kept, grid, settings)
    gradient = torch.zeros_like(pixels)
    prior.add_gradient(pixels, gradient)
    return gradient


def plain_tv(images: torch.Tensor) -> torch.Tensor:
    """DeepInversion's total variation, for each image."""
    pairs = [
        (images[..., :, :-1], images[..., :, 1:]),
        (images[..., :-1, :], images[..., 1:, :]),
        (images[..., :-1, :-1], images[..., 1:, 1:]),
        (images[..., :-1, 1:], images[..., 1:, :-1]),
    ]
    return sum((b - a).flatten(1).norm(dim=1) for a, b in pairs)


@pytest.mark.parametrize(("channels", "patch"), [(1, (4, 4)), (3, (4, 4)), (3, (4, 2)), (3, (1, 1))])
def test_closed_form_prior_gradient_equals_autograd(channels, patch):
    grid = replace(tiny_grid(channels), patch=patch)
    images = torch.randn(3, channels, 16, 16, generator=torch.Generator().manual_seed(1), requires_grad=True)
    settings = InversionSettings(tv_weight=0.3, l2_weight=0.7)
    (0.3 * plain_tv(images) + 0.7 * images.square().flatten(1).mean(1)).sum().backward()
    P = grid.num_patches
    kept = torch.stack(
        [torch.randperm(P, generator=torch.Generator().manual_seed(b))[: P // 3].sort().values for b in range(3)]
    )
    got = prior_gradient(grid.to_patches(images.detach()), kept, grid, settings)
    expected = grid.to_patches(images.grad).gather(1, kept[..., None].expand_as(got))
    assert torch.allclose(got, expected, atol=1e-6)


def test_prior_of_an_image_does_not_depend_on_its_batch():
    grid, settings = tiny_grid(), InversionSettings(tv_weight=0.3)
    canvas = grid.to_patches(torch.randn(6, 1, 16, 16, generator=torch.Generator().manual_seed(1)))
    kept = torch.arange(16).repeat(6, 1)
    together = prior_gradient(canvas, kept, grid, settings)
    assert torch.equal(together[:2], prior_gradient(canvas[:2], kept[:2], grid, settings))


def test_one_dense_step_equals_torch_adam_on_the_whole_image():
    settings = InversionSettings(
        iterations=3, stops="", fractions="", tv_weight=0.05, learning_rate=0.25, start="white", start_std=0.5
    )
    got = run(settings)
    grid, ensemble = tiny_grid(), tiny_ensemble()
    start = torch.randn(6, 1, 16, 16, generator=torch.Generator().manual_seed(3)) * 0.5
    images = start.clamp(-1.0, 2.0).requires_grad_(True)
    adam = torch.optim.Adam([images], lr=0.25, betas=(0.5, 0.99))
    for _ in range(3):
        adam.zero_grad()
        loss = F.nll_loss(plain_ensemble(ensemble, images).log(), LABELS, reduction="sum")
        (loss + 0.05 * plain_tv(images).sum()).backward()
        adam.step()
        with torch.no_grad():
            images.clamp_(-1.0, 2.0)
    assert grid.image_size == 16
    assert torch.allclose(got.images, images.detach(), atol=2e-3)
    assert got.loss.mean() < F.nll_loss(plain_ensemble(ensemble, start).log(), LABELS)


def test_gradients_of_stopped_patches_are_exactly_zero_in_the_plain_model_and_absent_here():
    """The plain model, masked to the kept tokens, has zero gradient elsewhere and ours on the kept ones."""
    ensemble, grid = tiny_ensemble(), tiny_grid()
    images = torch.randn(3, 1, 16, 16, generator=torch.Generator().manual_seed(2), requires_grad=True)
    labels = torch.tensor([0, 1, 2])
    kept = torch.tensor([[0, 2, 5], [1, 8, 9], [3, 4, 15]])
    F.nll_loss(plain_ensemble(ensemble, images, kept).log(), labels, reduction="sum").backward()
    plain = grid.to_patches(images.grad)
    stopped = torch.ones(3, 16, dtype=torch.bool).scatter(1, kept, False)
    assert torch.equal(plain[stopped], torch.zeros_like(plain[stopped]))
    pixels = grid.to_patches(images.detach()).gather(1, kept[..., None].expand(-1, -1, 16)).requires_grad_(True)
    F.nll_loss(ensemble(pixels, kept).probabilities.log(), labels, reduction="sum").backward()
    assert pixels.grad is not None
    assert pixels.grad.shape == (3, 3, 16)
    assert torch.allclose(pixels.grad, plain.gather(1, kept[..., None].expand(-1, -1, 16)), atol=1e-6)


def test_stopped_patches_keep_their_pixels_bit_for_bit():
    """Up to the stop a sparse run equals one that ends there; the stopped patches never change after."""
    short = InversionSettings(iterations=4, stops="", fractions="", tv_weight=0.1)
    long = InversionSettings(iterations=12, stops="4", fractions="0.5", tv_weight=0.1)
    before, after = run(short), run(long)
    grid = tiny_grid()
    stopped = torch.ones(6, 16, dtype=torch.bool).scatter(1, after.kept, False)
    assert torch.equal(grid.to_patches(before.images)[stopped], grid.to_patches(after.images)[stopped])
    assert not torch.equal(grid.to_patches(before.images)[~stopped], grid.to_patches(after.images)[~stopped])


def test_kept_set_shrinks_by_the_schedule_and_is_the_set_that_was_inverted():
    sizes = []
    real = tiny_ensemble()

    class Watched(type(real)):
        def loss_gradient(self, patches, *more):
            sizes.append(patches.shape[1])
            return super().loss_gradient(patches, *more)

    watched = Watched(real.teachers, real.weights)
    settings = InversionSettings(iterations=6, stops="1,2,4", fractions="0.3,0.3,0.3")
    got = invert(InversionTask(watched, tiny_grid(), settings), LABELS, generator=torch.Generator().manual_seed(0))
    assert sizes == [16, 16, 11, 7, 7, 4]
    assert got.kept.shape == (6, 4)
    assert torch.equal(got.kept, got.kept.sort(dim=1).values)
    assert all(len(row.unique()) == 4 for row in got.kept)


def test_four_stops_of_a_third_leave_46_of_196_patches():
    left = 196
    for _ in range(4):
        left = most_attended(torch.rand(1, left), 0.3).shape[1]
    assert left == 46


def test_the_least_attended_patches_stop():
    attention = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.4, 0.3, 0.2, 0.1]])
    assert most_attended(attention, 0.5).tolist() == [[1, 3], [0, 1]]
    assert most_attended(attention, 0.99).shape[1] == 1


def test_consecutive_stops_are_all_taken():
    got = run(InversionSettings(iterations=4, stops="1,2,3", fractions="0.5,0.5,0.5"))
    assert got.kept.shape[1] == 2


def test_pixels_stay_in_the_valid_range():
    images = run(InversionSettings(iterations=20, stops="5", fractions="0.5", learning_rate=1.0)).images
    assert float(images.min()) >= -1.0
    assert float(images.max()) <= 2.0


def test_jitter_moves_positions_not_pixels():
    """With all patches kept, a shift by whole patches is the same image rolled."""
    grid, ensemble = tiny_grid(), tiny_ensemble()
    images = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(2))
    rolled = images.roll((4, 8), (2, 3))
    index = torch.arange(16)[None]
    moved = (index // 4 + 1) % 4 * 4 + (index % 4 + 2) % 4
    a = ensemble(grid.to_patches(images), moved).probabilities
    assert torch.allclose(a, ensemble(grid.to_patches(rolled)).probabilities, atol=1e-6)


def test_same_seed_same_images_other_seed_others():
    settings = InversionSettings(iterations=5, stops="2", fractions="0.3")
    assert torch.equal(run(settings).images, run(settings).images)
    assert not torch.equal(run(settings).images, run(settings, seed=4).images)


def test_inversion_makes_the_ensemble_see_the_labels():
    got = run(InversionSettings(iterations=60, stops="10,20", fractions="0.3,0.3", jitter=0))
    probabilities = tiny_ensemble()(
        tiny_grid().to_patches(got.images).gather(1, got.kept[..., None].expand(-1, -1, 16)), got.kept
    ).probabilities
    assert torch.equal(probabilities.argmax(1), LABELS)


def test_a_loss_that_is_not_finite_names_its_iteration_and_keeps_the_last_good_images():
    ensemble, losses = tiny_ensemble(), []

    class Breaks(type(ensemble)):
        def loss_gradient(self, *args):
            out = super().loss_gradient(*args)
            losses.append(out.loss)
            if len(losses) == 5:
                out.loss[0] = out.gradient[0] = float("nan")
            return out

    breaks = Breaks(ensemble.teachers, ensemble.weights)
    settings = InversionSettings(iterations=8, stops="3", fractions="0.3", tv_weight=0.1)
    with pytest.raises(InversionDivergedError, match=r"iteration 4: .*inversion\.learning-rate") as caught:
        invert(InversionTask(breaks, tiny_grid(), settings), LABELS, generator=torch.Generator().manual_seed(3))
    good = caught.value.last_good
    assert good.kept.shape[1] == 11
    assert torch.equal(good.images, run(settings.model_copy(update={"iterations": 4})).images)


def test_a_broken_teacher_is_found_at_the_first_iteration():
    ensemble = tiny_ensemble()
    with torch.no_grad():
        ensemble.teachers[0].head.weight.fill_(float("nan"))
    settings = InversionSettings(iterations=5, stops="2", fractions="0.3")
    with pytest.raises(InversionDivergedError, match="iteration 0"):
        invert(InversionTask(ensemble, tiny_grid(), settings), LABELS, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("stopping", [False, True])
def test_trajectories_follow_the_plain_reference(stopping):
    """Loosely: Adam takes sign-like steps, which amplify gradients near zero."""
    settings = InversionSettings(tv_weight=0.05, learning_rate=0.05)
    ensemble, grid = tiny_ensemble(), tiny_grid()
    start = torch.randn(6, 1, 16, 16, generator=torch.Generator().manual_seed(0)).clamp(-1, 2)
    kept = torch.rand(6, 16, generator=torch.Generator().manual_seed(1)).argsort(1)[:, :7].sort(1).values
    kept = kept if stopping else None
    plain = PlainInversion(ensemble.teachers, ensemble.weights, start, LABELS, kept, grid, settings)
    batch = InversionBatch(InversionTask(tiny_ensemble(), grid, settings), LABELS, start, kept)
    for _ in range(5):
        assert torch.allclose(batch.step(), plain.step(), rtol=1e-3)
    assert float((batch.result().images - plain.images.detach()).abs().mean()) < 1e-4
    assert float((batch.result().images - start).abs().mean()) > 0.05


def test_a_schedule_leaves_at_least_one_patch():
    settings = InversionSettings(iterations=4, stops="1,2", fractions="0.9,0.9")
    assert run(settings).kept.shape[1] == patches_left(16, settings) == 1


def test_a_mask_without_a_patch_is_refused():
    settings = InversionSettings()
    with pytest.raises(ValueError, match="at least one"):
        InversionBatch(
            InversionTask(tiny_ensemble(), tiny_grid(), settings),
            LABELS,
            torch.zeros(6, 1, 16, 16),
            LABELS[:, None][:, :0],
        )


@pytest.mark.parametrize("place", [-1, 16])
def test_a_mask_outside_the_grid_is_refused(place):
    kept = torch.tensor([0, place]).repeat(6, 1)
    with pytest.raises(ValueError, match="patches of the grid are 0 to 15"):
        InversionBatch(
            InversionTask(tiny_ensemble(), tiny_grid(), InversionSettings()), LABELS, torch.zeros(6, 1, 16, 16), kept
        )


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 1.5])
def test_a_stop_that_no_patch_survives_is_refused(fraction):
    with pytest.raises(ValueError, match="fraction of patches to stop must be"):
        most_attended(torch.zeros(1, 4), fraction)


def test_pixels_that_are_not_finite_are_found_though_every_loss_was():
    class Breaks(type(tiny_ensemble())):
        def loss_gradient(self, *args):
            out = super().loss_gradient(*args)
            out.gradient[0, 0, 0] = float("nan")
            return out

    breaks = Breaks(tiny_ensemble().teachers, tiny_ensemble().weights)
    settings = InversionSettings(iterations=1, stops="", fractions="")
    with pytest.raises(InversionDivergedError, match="iteration 0") as caught:
        invert(InversionTask(breaks, tiny_grid(), settings), LABELS, generator=torch.Generator().manual_seed(0))
    assert torch.isfinite(caught.value.last_good.images).all()


def test_scatter_changes_only_the_kept_patches():
    canvas, kept = torch.zeros(1, 4, 2), torch.tensor([[1, 3]])
    out = scatter(canvas, kept, torch.ones(1, 2, 2))
    assert out[0, :, 0].tolist() == [0, 1, 0, 1]
    assert float(canvas.sum()) == 0
