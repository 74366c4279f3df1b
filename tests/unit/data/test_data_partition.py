import numpy as np
import pytest

from fedmitr_flwr.data import partition_indices
from fedmitr_flwr.settings import PartitionSettings, SettingsError
from tests.unit.data.data_fixtures import labelled

TRAIN = labelled(np.repeat(np.arange(10), 60), domain=np.resize(["art", "photo", "real"], 600))


def covers(parts, count):
    return np.array_equal(np.sort(np.concatenate(parts)), np.arange(count))


@pytest.mark.parametrize(
    ("settings", "clients"),
    [
        (PartitionSettings(kind="dirichlet", alpha=0.1), 10),
        (PartitionSettings(kind="dirichlet", alpha=0.05), 100),
        (PartitionSettings(kind="dirichlet", alpha=0.001), 100),
        (PartitionSettings(kind="dirichlet", alpha=1000.0), 1),
        (PartitionSettings(kind="iid"), 7),
        (PartitionSettings(kind="iid"), 60),
        (PartitionSettings(kind="pathological", classes_per_client=2), 20),
        (PartitionSettings(kind="natural", column="domain"), 3),
        (PartitionSettings(kind="natural", column="label"), 10),
    ],
)
def test_every_training_image_belongs_to_exactly_one_client(settings, clients):
    parts = partition_indices(TRAIN, settings, clients)
    assert len(parts) == clients
    assert covers(parts, 600)
    assert all(part.dtype == np.int64 and np.all(np.diff(part) > 0) for part in parts)


def test_extreme_skew_leaves_clients_empty_or_with_one_class():
    parts = partition_indices(TRAIN, PartitionSettings(alpha=0.05), 100)
    classes = [len(np.unique(TRAIN.labels[part])) for part in parts]
    assert 0 in classes
    assert 1 in classes


def test_dirichlet_shares_are_drawn_class_by_class_without_balancing():
    draws = np.random.default_rng(7)
    expected = [[] for _ in range(10)]
    for label in range(10):
        ends = (np.cumsum(draws.dirichlet([0.1] * 10)) * 60).astype(int)[:-1]
        for client, piece in enumerate(np.split(np.flatnonzero(TRAIN.labels == label), ends)):
            expected[client] += piece.tolist()
    parts = partition_indices(TRAIN, PartitionSettings(alpha=0.1, seed=7), 10)
    assert [part.tolist() for part in parts] == expected


def test_a_smaller_alpha_is_more_skewed():
    def largest_share(alpha):
        parts = partition_indices(TRAIN, PartitionSettings(alpha=alpha), 10)
        counts = np.stack([TRAIN.subset(part).histogram(10) for part in parts])
        return (counts.max(0) / 60).mean()

    assert largest_share(0.05) > 0.5 > 0.3 > largest_share(100.0)


def test_no_client_is_smaller_than_the_smallest_size():
    parts = partition_indices(TRAIN, PartitionSettings(alpha=1.0, min_size=20), 10)
    assert min(len(part) for part in parts) >= 20


def test_iid_clients_have_all_classes_though_the_images_lie_sorted():
    parts = partition_indices(TRAIN, PartitionSettings(kind="iid"), 5)
    assert [len(part) for part in parts] == [120] * 5
    assert all(TRAIN.subset(part).histogram(10).min() > 0 for part in parts)


def test_pathological_clients_have_the_classes_they_are_allowed():
    parts = partition_indices(TRAIN, PartitionSettings(kind="pathological", classes_per_client=3), 12)
    assert [len(np.unique(TRAIN.labels[part])) for part in parts] == [3] * 12


def test_natural_clients_have_one_value_each():
    parts = partition_indices(TRAIN, PartitionSettings(kind="natural"), 3)
    assert [np.unique(TRAIN.columns["domain"][part]).tolist() for part in parts] == [["art"], ["photo"], ["real"]]


@pytest.mark.parametrize("kind", ["dirichlet", "iid", "pathological"])
def test_a_partition_follows_its_seed_alone(kind):
    def divide(seed):
        return [part.tolist() for part in partition_indices(TRAIN, PartitionSettings(kind=kind, seed=seed), 8)]

    assert divide(3) == divide(3)
    assert divide(3) != divide(4)


def test_dividing_draws_no_bars_and_warns_of_nothing(capfd, recwarn):
    partition_indices(TRAIN, PartitionSettings(kind="natural"), 3)
    partition_indices(TRAIN, PartitionSettings(kind="pathological"), 3)
    partition_indices(TRAIN, PartitionSettings(alpha=0.5, min_size=5), 10)
    assert capfd.readouterr() == ("", "")
    assert not [warning for warning in recwarn if "partition" in str(warning.message).lower()]


@pytest.mark.parametrize(
    ("settings", "clients", "message"),
    [
        (PartitionSettings(), 601, r"num-supernodes = 601: .* number of training images, 600"),
        (PartitionSettings(kind="iid"), 0, r"num-supernodes = 0"),
        (PartitionSettings(min_size=70), 10, r"partition.min-size = 70: cannot be met by 10 clients with 600"),
        (PartitionSettings(min_size=50), 10, r"partition.min-size = 50: was not met .* partition.alpha = 0.1"),
        (
            PartitionSettings(kind="pathological", classes_per_client=11),
            5,
            r"partition.classes-per-client = 11: must be at most the number of classes, 10",
        ),
        (
            PartitionSettings(kind="pathological", classes_per_client=10),
            100,
            r"partition.classes-per-client = 10: does not work with 100 clients",
        ),
        (
            PartitionSettings(kind="natural"),
            5,
            r"partition.kind = \"natural\": .*'domain': there are 3 values \(art, photo, real\) and 5 clients",
        ),
        (
            PartitionSettings(kind="natural", column="site"),
            3,
            r"partition.column = \"site\": .* columns are: domain",
        ),
    ],
)
def test_impossible_partitions_name_key_value_and_what_is_allowed(settings, clients, message):
    with pytest.raises(SettingsError, match=message):
        partition_indices(TRAIN, settings, clients)
