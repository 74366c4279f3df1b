import pytest
import torch

from fedmitr_flwr.settings import DensitySettings
from fedmitr_flwr.stages.density import otsu_count, split_patches, subsets

DENSITY = torch.rand(6, 16, generator=torch.Generator().manual_seed(0))
KEPT = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(b))[:5].sort().values for b in range(6)])


@pytest.mark.parametrize("rule", ["survival", "quantile", "mass", "otsu"])
def test_the_split_is_a_partition_with_something_on_the_high_side(rule):
    split = split_patches(KEPT, DENSITY, DensitySettings(rule=rule))
    assert torch.equal(split.high ^ split.low, torch.ones(6, 16, dtype=torch.bool))
    assert bool(split.high.any(1).all())


def test_survival_is_exactly_the_kept_set():
    split = split_patches(KEPT, DENSITY, DensitySettings(rule="survival"))
    for row, kept in zip(split.high, KEPT, strict=True):
        assert row.nonzero().squeeze(1).tolist() == kept.tolist()


def test_quantile_takes_the_densest_share_of_each_image():
    split = split_patches(KEPT, DENSITY, DensitySettings(rule="quantile", quantile=0.75))
    for row, density in zip(split.high, DENSITY, strict=True):
        assert int(row.sum()) == 4
        assert density[row].min() > density[~row].max()


def test_mass_takes_the_fewest_patches_that_hold_the_share():
    split = split_patches(KEPT, DENSITY, DensitySettings(rule="mass", mass=0.6))
    for row, density in zip(split.high, DENSITY, strict=True):
        held = density[row].sum()
        assert held >= 0.6 * density.sum()
        assert held - density[row].min() < 0.6 * density.sum()


def test_otsu_maximises_the_variance_between_the_groups():
    ordered = DENSITY.sort(dim=1, descending=True).values
    for row, count in zip(ordered.double(), otsu_count(ordered), strict=True):
        variances = [n * (16 - n) * float(row[:n].mean() - row[n:].mean()) ** 2 for n in range(1, 16)]
        assert int(count) == variances.index(max(variances)) + 1


def test_otsu_finds_the_gap_between_two_groups():
    density = torch.tensor([[0.9, 0.8, 0.85, 0.1, 0.12, 0.05, 0.11, 0.09]])
    split = split_patches(torch.zeros(1, 1, dtype=torch.int64), density, DensitySettings(rule="otsu"))
    assert split.high[0].tolist() == [True] * 3 + [False] * 5


def test_an_image_of_equal_patches_is_all_high_under_otsu():
    density = torch.full((1, 8), 0.125)
    assert bool(split_patches(torch.zeros(1, 1, dtype=torch.int64), density, DensitySettings(rule="otsu")).high.all())


def test_subsets_cover_every_selected_patch_once_and_leave_out_empty_images():
    mask = torch.rand(8, 16, generator=torch.Generator().manual_seed(3)) < 0.4
    mask[2] = False
    seen = torch.zeros_like(mask, dtype=torch.int64)
    for rows, index in subsets(mask):
        for row, places in zip(rows, index, strict=True):
            assert places.tolist() == sorted(places.tolist())
            seen[row, places] += 1
    assert torch.equal(seen, mask.long())
