"""Teachers held, shrunk, and read from disk; how much memory each takes."""

import sys

import pytest
import timm
import torch

from fedmitr_flwr.ensemble.engine.teachers import MemoryLimits, PagedTeachers, load_teachers
from fedmitr_flwr.ensemble.ensemble import Ensemble
from fedmitr_flwr.runs.tensors import StoredState, write_tensors
from tests.unit.peak_memory import extra_peak_mb
from tests.unit.tiny import CLASSES, tiny_grid, tiny_vit

CPU, K = torch.device("cpu"), 4
LABELS = torch.tensor([0, 1, 2, 3])
DEMO = {"img_size": 28, "patch_size": 4, "in_chans": 1, "embed_dim": 64, "depth": 4, "num_heads": 4, "num_classes": 10}
MEDIUM = {"img_size": 16, "patch_size": 4, "in_chans": 1, "embed_dim": 192, "depth": 3, "num_heads": 3}
needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")


def weights():
    share = torch.rand(K, CLASSES, generator=torch.Generator().manual_seed(0))
    return share / share.sum(0)


def patches():
    return tiny_grid().to_patches(torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(1)))


def stored(folder, models):
    """Their weights as the uploads of a run lie on disk."""
    for k, model in enumerate(models):
        write_tensors(folder / f"{k}.safetensors", model.state_dict())
    return [StoredState(folder / f"{k}.safetensors", tuple(models[0].state_dict())) for k in range(len(models))]


def paged(folder, models):
    teachers = load_teachers(models[0], stored(folder, models), MemoryLimits(teachers=0), CPU)
    assert isinstance(teachers, PagedTeachers)
    return Ensemble(teachers, weights(), MemoryLimits(teachers=0))


@pytest.mark.parametrize("options", [{}, {"qk_norm": True}], ids=["packed", "by autograd"])
def test_teachers_read_from_disk_say_exactly_what_teachers_in_memory_say(tmp_path, options):
    torch.manual_seed(0)
    small = {"img_size": 16, "patch_size": 4, "in_chans": 1, "embed_dim": 24, "depth": 2, "num_heads": 3}
    models = [
        timm.create_model("vit_tiny_patch16_224", **small, num_classes=CLASSES, **options).eval() for _ in range(K)
    ]
    held, disk = Ensemble(models, weights()), paged(tmp_path, models)
    for index in (None, torch.tensor([[0, 3, 9]]).repeat(4, 1)):
        x = patches() if index is None else patches()[:, :3]
        expected, got = held.loss_gradient(x, index, LABELS), disk.loss_gradient(x, index, LABELS)
        for name in ("loss", "gradient", "attention", "probabilities"):
            assert torch.equal(getattr(got, name), getattr(expected, name)), name
        assert torch.equal(disk(x, index).probabilities, held(x, index).probabilities)


def test_a_few_drawn_from_disk_are_held_if_they_fit(tmp_path):
    models = [tiny_vit(k) for k in range(K)]
    limits = MemoryLimits(teachers=1)  # MiB
    disk = Ensemble(PagedTeachers(models[0], stored(tmp_path, models), CPU), weights(), limits)
    few = disk.draw(2, LABELS, torch.Generator().manual_seed(0))
    same = Ensemble(models, weights()).draw(2, LABELS, torch.Generator().manual_seed(0))
    assert not isinstance(few.teachers, PagedTeachers)
    assert torch.equal(few.weights, same.weights)
    got, expected = (each.loss_gradient(patches(), None, LABELS).gradient for each in (few, same))
    assert torch.equal(got, expected)


def test_a_smaller_limit_holds_then_rounds_then_pages():
    model = timm.create_model("vit_tiny_patch16_224", **MEDIUM)  # 1.35 million numbers
    count = sum(parameter.numel() for parameter in model.parameters()) * 50 / 2**20
    places = [MemoryLimits(teachers=int(count * factor)).place(model, 50) for factor in (12.1, 11.9, 2.1, 1.9)]
    assert places == ["held", "bf16", "bf16", "paged"]


def test_teachers_on_disk_refuse_to_keep_a_graph(tmp_path):
    disk = paged(tmp_path, [tiny_vit(k) for k in range(K)])
    with pytest.raises(ValueError, match="read from disk keep no graph"):
        disk(patches().requires_grad_(True))


@needs_proc
def test_200_teachers_of_the_demo_need_the_activations_of_one():
    one, many = (extra_peak_mb(DEMO, teachers, 24, {}) for teachers in (1, 200))
    packed = 200 * 0.78  # MiB: their weights once more, as the passes read them
    assert packed < many < 1.5 * one + packed


@needs_proc
def test_teachers_read_from_disk_are_never_in_memory_together(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", **MEDIUM)
    write_tensors(tmp_path / "one.safetensors", model.state_dict())
    all_mb = 40 * sum(parameter.numel() for parameter in model.parameters()) * 4 / 2**20
    limits = {"activations": 0, "teachers": 1}
    assert extra_peak_mb(MEDIUM, 40, 4, limits, tmp_path / "one.safetensors") < 0.35 * all_mb


@needs_proc
@pytest.mark.slow
def test_200_deit_tiny_teachers_fit_into_8_gigabytes(tmp_path):
    size = {"embed_dim": 192, "depth": 12, "num_heads": 3}
    model = timm.create_model("vit_tiny_patch16_224", **size)
    write_tensors(tmp_path / "one.safetensors", model.state_dict())
    found = extra_peak_mb(size, 200, 1, {}, tmp_path / "one.safetensors")
    assert 200 * 10 < found < 7000  # MiB, with one for Python and PyTorch
