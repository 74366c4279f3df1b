"""Heads from pooled moments equal those of centralised training on all features, whatever the partition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import Ridge
from torch import Tensor

from fedmitr_flwr.ensemble.moments import ABSENT, Head, PooledMoments, discriminant_head, pool, ridge_head
from fedmitr_flwr.models.moments import Moments

CLASSES, WIDTH, IMAGES = 6, 20, 240
ABSENT_CLASS = 4


def draw(count: int = IMAGES, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features with a common offset and two directions of large variance, as a pretrained ViT has; no class 4."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES - 1, (count,), generator=generator)
    labels[labels == ABSENT_CLASS] = CLASSES - 1
    centres = torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(99))
    scales = torch.ones(WIDTH)
    scales[:2] = 6.0
    return 3.0 + centres[labels] + scales * torch.randn(count, WIDTH, generator=generator), labels


FEATURES, LABELS = draw()
TESTED = draw(300, seed=1)[0]


def one_class_each() -> list[NDArray[np.int64]]:
    return [np.flatnonzero(LABELS.numpy() == c) for c in range(CLASSES)]


def dirichlet(alpha: float, clients: int) -> list[NDArray[np.int64]]:
    rng, parts = np.random.default_rng(3), [[] for _ in range(clients)]
    for rows in one_class_each():
        shares = rng.dirichlet([alpha] * clients)
        for number, part in enumerate(np.split(rows, (shares.cumsum()[:-1] * len(rows)).astype(int))):
            parts[number].extend(part)
    return [np.array(part, dtype=np.int64) for part in parts]


PARTITIONS = {
    "one client": [np.arange(IMAGES)],
    "one class a client": one_class_each(),
    "Dirichlet(0.05), ten clients": dirichlet(0.05, 10),
    "Dirichlet(100), three clients": dirichlet(100.0, 3),
    "one image a client": [np.array([row]) for row in range(IMAGES)],
}
every_partition = pytest.mark.parametrize("partition", PARTITIONS)


def pooled(partition: str = "one client") -> PooledMoments:
    rows = [torch.from_numpy(part) for part in PARTITIONS[partition] if len(part)]
    return pool([Moments.of_features(FEATURES[part], LABELS[part], CLASSES) for part in rows])


def centred(logits: Tensor, present: Tensor) -> Tensor:
    """The logits of the classes with images, without what all of them share."""
    kept = logits[:, present]
    return kept - kept.mean(1, keepdim=True)


def said(head: Head) -> Tensor:
    return TESTED.double() @ head.weight.T + head.bias


@every_partition
@pytest.mark.parametrize("shrinkage", [0.01, 0.3, 1.0])
@pytest.mark.parametrize("equal_priors", [False, True])
def test_the_discriminant_is_the_centralised_one(partition: str, shrinkage: float, equal_priors: bool) -> None:
    central = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage, store_covariance=True)
    central.fit(FEATURES.double().numpy(), LABELS.numpy())
    n, present = IMAGES, len(central.classes_)
    precise = np.linalg.inv(central.covariance_ * n / (n - present))  # scikit-learn divides by n
    weight, means = central.means_ @ precise, central.means_
    bias = -0.5 * (weight * means).sum(1) + (0.0 if equal_priors else np.log(central.priors_))
    expected = torch.from_numpy(TESTED.double().numpy() @ weight.T + bias)
    counted = pooled(partition)
    logits = said(discriminant_head(counted, shrinkage, equal_priors=equal_priors))
    expected = centred(expected, torch.ones(present, dtype=torch.bool))
    assert (centred(logits, counted.present) - expected).abs().max() <= 1e-5 * expected.abs().max()


@every_partition
@pytest.mark.parametrize("strength", [0.01, 0.3, 10.0])
def test_ridge_is_the_centralised_least_squares_solution(partition: str, strength: float) -> None:
    x, targets = FEATURES.double().numpy(), torch.nn.functional.one_hot(LABELS, CLASSES).double().numpy()
    scatter = np.trace(np.cov(x.T, ddof=0)) * IMAGES
    central = Ridge(alpha=strength * scatter / WIDTH, fit_intercept=True, solver="cholesky").fit(x, targets)
    counted = pooled(partition)
    expected = centred(torch.from_numpy(central.predict(TESTED.double().numpy())), counted.present)
    logits = centred(said(ridge_head(counted, strength)), counted.present)
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    "head",
    [
        discriminant_head(pooled(), 0.1, equal_priors=True),
        discriminant_head(pooled(), 0.1, equal_priors=False),
        ridge_head(pooled(), 0.1),
    ],
)
def test_a_class_without_images_never_wins(head: Head) -> None:
    extreme = torch.cat([TESTED, -TESTED, 1e4 * TESTED, torch.zeros(1, WIDTH)]).double()
    logits = extreme @ head.weight.T + head.bias
    assert torch.equal(head.weight[ABSENT_CLASS], torch.zeros(WIDTH, dtype=torch.float64))
    assert head.bias[ABSENT_CLASS] == ABSENT
    assert bool((logits.max(1).values - logits[:, ABSENT_CLASS] > 99.0).all())
    assert bool((logits.float().softmax(1)[:, ABSENT_CLASS] < 1e-43).all())


def test_priors_from_counts_favour_the_frequent_class() -> None:
    features, labels = draw()
    rare = torch.cat([(labels == 0).nonzero()[:2, 0], (labels == 1).nonzero()[:, 0]])
    counted = pool([Moments.of_features(features[rare], labels[rare], CLASSES)])
    equal, counts = (discriminant_head(counted, 0.5, equal_priors=flag) for flag in (True, False))
    assert torch.equal(equal.weight, counts.weight)
    ratio = counted.counts[1] / counted.counts[0]
    assert float((counts.bias - equal.bias)[:2].diff()) == pytest.approx(float(ratio.log()))


@pytest.mark.parametrize("images", [1, 5])
def test_one_image_of_each_class_gives_the_nearest_image(images: int) -> None:
    labels = torch.arange(images)
    features = FEATURES[:images]
    counted = pool([Moments.of_features(features, labels, CLASSES)])
    nearest = torch.cdist(TESTED, features).argmin(1)
    head = discriminant_head(counted, 1e-6, equal_priors=True)
    assert torch.equal(said(head).argmax(1), nearest)
    assert bool(torch.isfinite(ridge_head(counted, 1e-6).weight).all())


def test_equal_features_everywhere_give_finite_heads() -> None:
    counted = pool([Moments.of_features(torch.ones(4, WIDTH), torch.tensor([0, 0, 1, 1]), CLASSES)])
    for head in (discriminant_head(counted, 0.1, equal_priors=True), ridge_head(counted, 0.1)):
        assert bool(torch.isfinite(head.weight).all())
        assert bool(torch.isfinite(head.bias).all())


def test_fewer_images_than_features_are_enough() -> None:
    counted = pool([Moments.of_features(FEATURES[:12], LABELS[:12], CLASSES)])
    for head in (discriminant_head(counted, 1e-6, equal_priors=True), ridge_head(counted, 1e-6)):
        right = (FEATURES[:12].double() @ head.weight.T + head.bias).argmax(1) == LABELS[:12]
        assert bool(right.all())


def test_a_client_that_counts_half_is_one_with_half_of_the_images() -> None:
    halves = [Moments.of_features(FEATURES, LABELS, CLASSES), Moments.of_features(*draw(50, seed=5), CLASSES)]
    doubled = Moments.of_features(torch.cat([FEATURES, FEATURES]), torch.cat([LABELS, LABELS]), CLASSES)
    counted = pool([doubled, halves[1]], torch.tensor([0.5, 1.0], dtype=torch.float64))
    expected = pool(halves)
    for name in ("counts", "sums", "second"):
        assert torch.allclose(getattr(counted, name), getattr(expected, name), rtol=1e-6)
