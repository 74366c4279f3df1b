import pytest
import torch

from fedmitr_flwr.ensemble.engine.flops import pass_flops
from fedmitr_flwr.ensemble.ensemble import Ensemble
from fedmitr_flwr.pipeline.diagnostics import diagnose, diversity
from fedmitr_flwr.settings import InversionSettings
from fedmitr_flwr.stages.inversion.batch import InversionTask
from fedmitr_flwr.stages.inversion.sparse import invert
from fedmitr_flwr.stages.stage_costs import stage_costs
from fedmitr_flwr.stages.synthetic import SyntheticImages
from tests.unit.tiny import CLASSES, tiny_ensemble, tiny_grid, tiny_vit

SETTINGS = InversionSettings(iterations=60, stops="10,20", fractions="0.3,0.3")
LABELS = torch.tensor([0, 1, 2, 3, 4] * 2)


def synthetic(images=None, kept=7):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(10, 1, 16, 16, generator=generator).clamp(-0.9, 1.9) if images is None else images
    return SyntheticImages(images, LABELS, torch.arange(kept).repeat(10, 1), torch.zeros(10))


def look(images=None, kept=7):
    return diagnose(InversionTask(tiny_ensemble(), tiny_grid(), SETTINGS), synthetic(images, kept))


def test_black_and_saturated_pixels_are_counted_and_named():
    images = torch.full((10, 1, 16, 16), -1.0)
    images[..., :8] = 2.0
    found = look(images)
    assert (found.black, found.saturated) == (0.5, 0.5)
    black = look(torch.full((10, 1, 16, 16), -1.0))
    assert any("black" in line for line in black.warnings())
    assert any("nearly the same" in line for line in black.warnings())
    assert any("saturated" in line for line in look(torch.full((10, 1, 16, 16), 2.0)).warnings())
    assert look().black == look().saturated == 0


def test_inverted_images_agree_with_their_labels_and_noise_does_not():
    made = invert(
        InversionTask(tiny_ensemble(), tiny_grid(), SETTINGS), LABELS, generator=torch.Generator().manual_seed(0)
    )
    good = diagnose(InversionTask(tiny_ensemble(), tiny_grid(), SETTINGS), made)
    assert good.ensemble_agrees > look().ensemble_agrees
    assert good.teachers_agree > look().teachers_agree
    assert good.kept == good.expected == 7
    assert good.cost == pytest.approx(8 / 17)


def test_patches_left_in_the_graph_against_the_schedule_are_named():
    assert not any("graph" in line for line in look(kept=7).warnings())
    assert any(
        "16 patches were in the graph at the end; the schedule leaves 7" in line for line in look(kept=16).warnings()
    )


def test_each_stage_computes_exactly_what_its_patches_cost():
    costs = stage_costs(InversionTask(tiny_ensemble(), tiny_grid(), SETTINGS), torch.zeros(1, 1, 16, 16), LABELS[:1])
    assert [stage.patches for stage in costs] == [stage.expected for stage in costs] == [16, 11, 7]
    assert [stage.flops for stage in costs] == [pass_flops(tiny_vit(), tiny_grid(), L) for L in (16, 11, 7)]
    assert [stage.flops_excess for stage in costs] == pytest.approx([1, 1, 1])
    assert [stage.held_excess for stage in costs] == pytest.approx([1, 1, 1], abs=0.1)


def test_stopped_patches_that_are_still_computed_are_named(monkeypatch):
    monkeypatch.setattr(
        "fedmitr_flwr.stages.inversion.schedule.most_attended", lambda seen, fraction: torch.arange(seen.shape[1])[None]
    )
    found = look()
    assert found.flops_excess > 1.5
    assert any("times the FLOPs" in line and "still in the graph" in line for line in found.warnings())


def test_memory_of_stopped_patches_that_is_still_held_is_named(monkeypatch):
    monkeypatch.setattr(Ensemble, "release", lambda self: None)
    found = look()
    assert found.flops_excess == pytest.approx(1)
    assert any("times the memory" in line for line in found.warnings())


def test_teachers_that_agree_with_nobody_are_named():
    """One teacher in five classes is always right about the class it says whatever it sees."""
    teachers = [tiny_vit(k) for k in range(CLASSES)]
    with torch.no_grad():
        for k, teacher in enumerate(teachers):
            teacher.head.weight.zero_()
            teacher.head.bias.copy_(torch.nn.functional.one_hot(torch.tensor(k), CLASSES) * 9.0)
    same = Ensemble(teachers, torch.full((CLASSES, CLASSES), 1 / CLASSES))
    found = diagnose(InversionTask(same, tiny_grid(), SETTINGS), synthetic())
    assert found.teachers_agree == pytest.approx(1 / CLASSES)
    assert any("client models disagree" in line for line in found.warnings())
    assert any("ensemble assigns only" in line for line in found.warnings())


def test_diversity_is_zero_for_copies_and_one_for_unrelated_images():
    noise = torch.randn(40, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(40) % 4
    assert diversity(noise[:4][labels], labels) == 0
    assert diversity(noise, labels) == pytest.approx(1, abs=0.05)
    assert diversity(noise, torch.arange(40)) == 1


def test_values_are_plain_numbers_for_json():
    assert set(map(type, look().as_dict().values())) <= {int, float}
