import pytest
import torch

from fedmitr_flwr.settings import RelabelSettings
from fedmitr_flwr.stages.density import PatchSplit
from fedmitr_flwr.stages.relabel import relabel, soften
from tests.unit.tiny import plain_ensemble, tiny_ensemble, tiny_grid

IMAGES = torch.randn(5, 1, 16, 16, generator=torch.Generator().manual_seed(7))
HIGH = torch.rand(5, 16, generator=torch.Generator().manual_seed(8)) < 0.4
HIGH[3] = True  # an image without low-density patches
SPLIT = PatchSplit(HIGH)


def targets(batch_size=256, **settings):
    patches = tiny_grid().to_patches(IMAGES)
    return relabel(tiny_ensemble(), patches, SPLIT, RelabelSettings(**settings), batch_size)


def test_low_patches_get_what_the_ensemble_sees_in_them_alone():
    got = targets(labels="soft")
    for b in (0, 1, 2, 4):
        index = SPLIT.low[b].nonzero().T
        expected = plain_ensemble(tiny_ensemble(), IMAGES[b : b + 1], index)[0]
        assert torch.allclose(got.probabilities[b], expected, atol=1e-6)


@pytest.mark.parametrize("labels", ["soft", "hard"])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_relabeled_targets_are_distributions(labels, temperature):
    got = targets(labels=labels, temperature=temperature)
    assert got.present.tolist() == [True, True, True, False, True]
    assert torch.allclose(got.probabilities.sum(1), got.present.float(), atol=1e-6)
    assert bool((got.probabilities >= 0).all())


def test_hard_labels_are_the_arg_max_of_the_soft_ones():
    soft, hard = targets(labels="soft"), targets(labels="hard")
    assert torch.equal(hard.probabilities[hard.present].max(1).values, torch.ones(4))
    assert torch.equal(soft.probabilities.argmax(1), hard.probabilities.argmax(1))


def test_off_marks_every_image_as_without_low_labels():
    assert not bool(targets(labels="off").present.any())


def test_batch_size_does_not_change_the_labels():
    assert torch.allclose(targets(batch_size=1).probabilities, targets().probabilities, atol=1e-6)


def test_soften_is_softmax_with_temperature():
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(soften(logits.softmax(-1), 4.0), (logits / 4).softmax(-1), atol=1e-6)
