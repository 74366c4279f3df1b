"""DENSE and Co-Boosting: their mathematics against plain re-computations."""

import pytest
import torch

from fedmitr_flwr.models.patch_grid import PatchGrid
from fedmitr_flwr.pipeline.methods.co_boosting import hard_loss, perturbed, reweighted, vote_weight_step
from fedmitr_flwr.pipeline.methods.dense import boundary_loss
from fedmitr_flwr.pipeline.methods.generator import Generator, divergence, generate, round_starts
from fedmitr_flwr.settings import GeneratorSettings
from tests.unit.tiny import tiny_ensemble, tiny_grid

LABELS = torch.tensor([0, 1, 2, 2])
SMALL = GeneratorSettings(latent=5, width=3, iterations=3)


def distributions(seed=0, C=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, C, generator=generator).mul(2).softmax(1), torch.randn(4, C, generator=generator)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("size", [8, 10, 28, 32, 64, 100, 224])
def test_generator_makes_images_of_any_size_within_the_valid_range(size):
    grid = PatchGrid(2, size, (2, 2), torch.tensor([-1.0, 0.5]), torch.tensor([2.0, 0.75]))
    images = Generator(grid, SMALL)(torch.randn(3, 5, generator=seeded()))
    assert images.shape == (3, 2, size, size)
    assert bool((images >= grid.low.view(-1, 1, 1)).all())
    assert bool((images <= grid.high.view(-1, 1, 1)).all())


def test_generator_starts_anew_from_the_given_seed_alone():
    grid = tiny_grid()
    a, b = Generator(grid, SMALL), Generator(grid, SMALL)
    a.reset(seeded(1))
    b.reset(seeded(1))
    assert all(torch.equal(one, other) for one, other in zip(a.parameters(), b.parameters(), strict=True))
    assert float(a.first.weight.detach().std()) == pytest.approx(0.02, rel=0.2)


def test_generation_keeps_the_batch_of_the_least_loss():
    losses, batches = [], []

    def loss(images):
        batches.append(images.detach().clone())
        value = (images - 0.3).square().mean() * (5.0 if len(losses) == 2 else 1.0)  # the last is worst
        losses.append(float(value))
        return value

    images = generate(Generator(tiny_grid(), SMALL), 4, loss, SMALL, seeded())
    assert torch.equal(images, batches[losses.index(min(losses))])
    assert losses[1] < losses[0]


def test_a_generator_whose_loss_is_not_finite_is_an_error():
    with pytest.raises(RuntimeError, match=r"generator\.learning-rate"):
        generate(Generator(tiny_grid(), SMALL), 2, lambda images: images.sum() * torch.nan, SMALL, seeded())


def test_rounds_share_the_steps_as_passes_of_a_growing_pool():
    assert round_starts(4, 100) == [0, 10, 30, 60]
    assert round_starts(1, 7) == [0]
    assert round_starts(3, 1) == [0, 0, 0]


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_divergence_is_the_sum_over_classes(temperature):
    p, logits = distributions()
    softer = p ** (1 / temperature)
    softer = softer / softer.sum(1, keepdim=True)
    student = (logits / temperature).softmax(1)
    expected = temperature**2 * (softer * (softer / student).log()).sum(1)
    assert torch.allclose(divergence(p, logits, temperature), expected, atol=1e-5)


def test_boundary_loss_asks_for_disagreement_only_where_there_is_some():
    p, logits = distributions(1)
    logits[0] = p[0].log() * 2  # agrees with the ensemble
    got = boundary_loss(p, logits, LABELS, 0.5)
    for row in range(4):
        expected = -p[row, LABELS[row]].log()
        if p[row].argmax() != logits[row].argmax():
            expected = expected - 0.5 * (p[row] * (p[row].log() - logits[row].log_softmax(0))).sum()
        assert float(got[row]) == pytest.approx(float(expected), abs=1e-5)
    assert float(got[0]) == pytest.approx(float(-p[0, 0].log()), abs=1e-6)


def test_hard_loss_weights_each_image_by_what_the_ensemble_misses():
    p, logits = distributions(2)
    hit = p[torch.arange(4), LABELS]
    expected = (1 - hit) * -hit.log() - 2.0 * divergence(p, logits, 3.0)
    assert torch.allclose(hard_loss(p, logits, LABELS, 2.0), expected, atol=1e-6)
    p.requires_grad_(True)
    (gradient,) = torch.autograd.grad(hard_loss(p, logits, LABELS, 0.0).sum(), p)
    assert torch.allclose(gradient[torch.arange(4), LABELS], -(1 - hit) / hit, atol=1e-4)


def test_a_vote_weight_multiplies_the_weights_of_its_teacher():
    ensemble = tiny_ensemble()
    K = len(ensemble.teachers)
    votes = torch.linspace(0.2, 1.0, K)
    scaled = ensemble.weights * votes[:, None]
    assert torch.allclose(reweighted(ensemble, votes).weights, scaled / scaled.sum(0), atol=1e-6)
    assert torch.equal(reweighted(ensemble, torch.zeros(K)).weights, ensemble.weights)


def test_vote_weights_move_by_one_step_against_a_difference_quotient():
    ensemble = tiny_ensemble()
    K, C = ensemble.weights.shape
    votes = torch.full((K,), 1 / K)
    logits = torch.randn(K, 4, C, generator=seeded())

    def loss(votes):
        seen = reweighted(ensemble, votes).combine(logits)
        return float(-seen[torch.arange(4), LABELS % C].log().mean())

    got = vote_weight_step(ensemble, votes, logits, LABELS % C, 0.05)
    for k in range(K):
        nudge = torch.zeros(K)
        nudge[k] = 1e-2
        slope = loss(votes + nudge) - loss(votes - nudge)
        assert float(got[k]) == pytest.approx(1 / K - 0.05 * (1 if slope > 0 else -1))
    assert loss(got) < loss(votes)
    edge = vote_weight_step(ensemble, torch.tensor([0.0] * (K - 1) + [1.0]), logits, LABELS % C, 0.05)
    assert bool(((edge >= 0) & (edge <= 1)).all())


def test_perturbation_moves_pixels_by_its_size_within_the_range():
    ensemble, grid = tiny_ensemble(), tiny_grid()
    low, high = float(grid.low[0]), float(grid.high[0])
    images = torch.rand(3, 1, 16, 16, generator=seeded()) * (high - low) + low
    images[0, 0, 0, 0] = high
    patches = grid.to_patches(images)
    moved = perturbed(ensemble, patches, grid, 8.0, seeded(1))
    step = (high - low) * 8 / 255
    inside = (patches > low + step) & (patches < high - step)
    assert torch.allclose((moved - patches).abs()[inside], torch.tensor(step), atol=1e-6)
    assert bool(((moved >= low) & (moved <= high)).all())
    assert not torch.equal(moved, perturbed(ensemble, patches, grid, 8.0, seeded(2)))
    assert torch.equal(patches, perturbed(ensemble, patches, grid, 0.0, seeded(1)))
