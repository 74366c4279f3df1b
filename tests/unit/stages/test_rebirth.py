"""Patch Rebirth: one run, several sparse images."""

import pytest
import torch

from fedmitr_flwr.results.flops import kept_schedule
from fedmitr_flwr.settings import InversionSettings, Settings, SettingsError
from fedmitr_flwr.stages.inversion.batch import InversionTask, Watch, starting_images
from fedmitr_flwr.stages.inversion.methods import patches_left
from fedmitr_flwr.stages.inversion.rebirth import invert_by_rebirth
from tests.unit.pipeline.test_pipeline import clients  # noqa: F401 - a fixture
from tests.unit.pipeline.test_pipeline import run as run_all
from tests.unit.stages.test_inversion import LABELS
from tests.unit.stages.test_inversion import run as invert
from tests.unit.tiny import tiny_ensemble, tiny_grid

SETTINGS = InversionSettings(method="rebirth", iterations=8, stops=(3, 5), fractions=(0.3, 0.3), tv_weight=0.05)


def run(settings=SETTINGS, seed=3, **more):
    generator = torch.Generator().manual_seed(seed)
    return invert_by_rebirth(InversionTask(tiny_ensemble(), tiny_grid(), settings), LABELS, generator=generator, **more)


def mask(kept):
    return torch.zeros(len(kept), 16, dtype=torch.bool).scatter(1, kept, True)


def test_images_of_a_run_share_no_patch_and_have_equally_many():
    got = run()
    assert got.kept.shape == (18, 5)  # 16 patches by three, one left over
    assert torch.equal(got.labels, LABELS.repeat(3))
    assert int(mask(got.kept).view(3, 6, 16).sum(0).max()) == 1


def test_an_image_shows_noise_where_it_has_no_patch():
    got, grid = run(), tiny_grid()
    noise = starting_images(6, grid, SETTINGS, torch.Generator().manual_seed(3)).clamp(-1.0, 2.0)
    same = (grid.to_patches(got.images) == grid.to_patches(noise).repeat(3, 1, 1)).all(-1)
    assert torch.equal(same, ~mask(got.kept))


def test_patches_that_left_keep_their_pixels_and_the_most_attended_leave_first():
    ensemble, grid, seen = tiny_ensemble(), tiny_grid(), []

    def look(iteration, images, kept):
        seen.append((images, kept))

    got = run(watch=Watch(on_stop=look))
    images, kept = seen[0]
    left = mask(got.kept[:6])
    assert torch.equal(mask(kept), ~left)
    assert torch.equal(grid.to_patches(images)[left], grid.to_patches(got.images[:6])[left])
    before = invert(InversionSettings(method="sparse", iterations=3, stops=(), fractions=(), tv_weight=0.05))
    attention = ensemble(grid.to_patches(before.images), attention=True, labels=LABELS).attention
    assert bool((attention.masked_fill(~left, 9.0).amin(1) >= attention.masked_fill(left, -9.0).amax(1)).all())


def test_losses_are_those_of_the_iterations_at_which_images_left():
    losses = []
    got = run(watch=Watch(lambda iteration, loss: losses.append(loss)))
    assert torch.equal(got.loss, torch.cat([losses[3], losses[5], losses[7]]))


def test_a_stop_at_the_last_iteration_works():
    got = run(SETTINGS.model_copy(update={"stops": (3, 7)}))
    assert got.kept.shape == (18, 5)


def test_same_seed_same_images_other_seed_others():
    assert torch.equal(run().images, run().images)
    assert not torch.equal(run().images, run(seed=4).images)


def test_more_images_than_patches_is_an_error():
    settings = InversionSettings(method="rebirth", iterations=40, stops=tuple(range(1, 17)), fractions=(0.1,) * 16)
    with pytest.raises(SettingsError, match=r"inversion\.stops .* 16 patches"):
        run(settings)


def test_rebirth_without_stops_is_an_error():
    with pytest.raises(SettingsError, match=r"inversion\.method .* needs at least one entry in inversion\.stops"):
        Settings.from_run_config({"inversion.method": "rebirth", "inversion.stops": "", "inversion.fractions": ""})


def test_schedule_of_the_arithmetic_is_that_of_the_run():
    sizes = []
    run(watch=Watch(on_stop=lambda iteration, images, kept: sizes.append(kept.shape[1])))
    spans = kept_schedule(SETTINGS, 16)
    assert spans == [(4, 16), (2, 11), (2, 5)]
    assert sizes == [size for _, size in spans[1:]]
    assert patches_left(16, SETTINGS) == 5


def test_pipeline_inverts_fewer_runs_for_as_many_images(clients):  # noqa: F811
    result = run_all(clients, **{"inversion.method": "rebirth"})
    assert len(result.synthetic.labels) == 27  # 25 asked for, three a run
    assert result.diagnostics.kept == result.diagnostics.expected == 5
    again = run_all(clients, **{"inversion.method": "rebirth"})
    assert all(torch.equal(result.state[name], again.state[name]) for name in result.state)
