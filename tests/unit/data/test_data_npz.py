import numpy as np
import pytest

from fedmitr_flwr.data import load_source, load_spec
from fedmitr_flwr.settings import DataSettings, SettingsError
from tests.unit.data.data_fixtures import patterned, write_npz


def settings(path, **changes):
    return DataSettings(source=f"npz:{path}", **changes)


def test_an_archive_gives_images_names_domains_and_its_own_test_set(tmp_path):
    test = np.arange(30) % 5 == 0
    path = write_npz(
        tmp_path / "x.npz",
        class_names=np.array(["ant", "bee", "cow"]),
        domain=np.arange(30) % 2,
        domain_names=np.array(["day", "night"]),
        test=test,
    )
    source = load_source(settings(path))
    assert source.spec == load_spec(settings(path))
    assert source.spec.class_names == ("ant", "bee", "cow")
    assert (source.spec.channels, source.spec.image_size) == (3, 8)
    assert source.test.rows.tolist() == np.flatnonzero(test).tolist()
    assert len(source.train) + len(source.validation) == 24
    assert source.validation.histogram(3).tolist() == [1, 1, 1]
    assert source.train.columns["domain"].tolist() == [["day", "night"][row % 2] for row in source.train.rows]
    kept = source.train.images(np.arange(len(source.train)))
    assert kept[:, 0, 0, 0].tolist() == source.train.rows.tolist()


def test_grey_archives_without_names_or_test_set_work(tmp_path):
    path = write_npz(tmp_path / "x.npz", images=patterned(30)[..., 0])
    source = load_source(settings(path))
    assert source.spec.class_names == ("0", "1", "2")
    assert source.train.images([0]).shape == (1, 1, 8, 8)
    assert source.test.histogram(3).tolist() == [2, 2, 2]


def test_scarce_classes_keep_an_image_in_training(tmp_path):
    source = load_source(settings(write_npz(tmp_path / "x.npz", per_class=(20, 1, 2, 3))))
    assert source.train.histogram(4).tolist() == [14, 1, 1, 1]
    assert source.validation.histogram(4).tolist() == [2, 0, 0, 1]
    assert source.test.histogram(4).tolist() == [4, 0, 1, 1]


def test_even_a_large_fraction_leaves_an_image_of_each_class_in_training(tmp_path):
    path = write_npz(tmp_path / "x.npz", per_class=(3, 4, 5))
    source = load_source(settings(path, test_fraction=0.95, validation_fraction=0.95))
    assert source.train.histogram(3).tolist() == [1, 1, 1]


def test_named_classes_are_brought_in_the_order_asked_for(tmp_path):
    path = write_npz(tmp_path / "x.npz", per_class=(4, 6, 8), class_names=np.array(["ant", "bee", "cow"]))
    plain = load_source(settings(path))
    mixed = load_source(settings(path, class_names="cow, ant, bee"))
    assert mixed.spec.class_names == ("cow", "ant", "bee")
    assert mixed.train.rows.size == plain.train.rows.size
    position = {"ant": 1, "bee": 2, "cow": 0}
    names = ["ant"] * 4 + ["bee"] * 6 + ["cow"] * 8
    assert mixed.train.labels.tolist() == [position[names[row]] for row in mixed.train.rows]


def test_named_classes_are_not_renamed_by_position(tmp_path):
    path = write_npz(tmp_path / "x.npz", class_names=np.array(["ant", "bee", "cow"]))
    with pytest.raises(SettingsError, match=r"data.class-names = .*'dog' is not one of ant, bee, cow"):
        load_source(settings(path, class_names="ant,cow,dog"))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": patterned(30).astype(np.complex64)}, r"`images` must be uint8 .* but is complex64 of shape"),
        ({"images": patterned(30)[:, :5]}, r"`images` must be uint8 or other numbers, of shape .*\(30, 5, 8, 3\)"),
        ({"images": None}, r"no array `images`"),
        ({"label": None}, r"no array `label`"),
        (
            {"label": np.arange(29)},
            r"`label` must have one label for each of the 30 images, but .* \(29,\)",
        ),
        ({"label": np.full(30, -1)}, r"`label` has no label for 30 of 30 images .* below 0, here -1"),
        (
            {"class_names": np.array(["ant", "bee"])},
            r"`label` must have values from 0 to 1, but .* from 0 to 2",
        ),
        ({"class_names": np.array(["ant", "bee", "bee"])}, r"two classes of the same name"),
        ({"test": np.ones(30)}, r"`test` must be booleans"),
        ({"domain": np.arange(30), "domain_names": np.array(["day"])}, r"`domain` must have values from 0 to 0"),
        ({"class_names": np.array(["ant", None, "bee"], dtype=object)}, r"arrays of objects are refused"),
        ({"label": np.zeros(30, np.int64)}, r"has only one class"),
        ({"test": np.ones(30, bool)}, r"training images of fewer than two classes"),
    ],
)
def test_archives_that_do_not_fit_are_refused_by_name(tmp_path, arrays, message):
    path = write_npz(tmp_path / "x.npz", **arrays)
    with pytest.raises(SettingsError, match=message) as caught:
        load_source(settings(path))
    assert f'data.source = "npz:{path}"' in str(caught.value)


def test_a_missing_or_foreign_file_is_named(tmp_path):
    with pytest.raises(SettingsError, match=r"the file .* does not exist"):
        load_source(settings(tmp_path / "none.npz"))
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(SettingsError, match=r"text\.npz is not a readable \.npz archive"):
        load_spec(settings(tmp_path / "text.npz"))


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("Test", "rename it to `test`"),
        ("Class-Names", "rename it to `class_names`"),
        ("labels", "rename it to `label`"),
        ("is_test", "would not be used; all images belong into `images`"),
        ("x_test", "would not be used; all images"),
        ("train_mask", "would not be used; all images"),
        ("Split", "would not be used; all images"),
        ("validation", "would not be used; all images"),
    ],
)
def test_an_array_that_seems_to_be_a_split_or_a_known_one_is_refused(tmp_path, name, hint):
    path = write_npz(tmp_path / "x.npz", **{name: np.arange(30) > 20})
    for load in (load_source, load_spec):
        with pytest.raises(SettingsError, match=f"has the array `{name}`, which .*{hint}"):
            load(settings(path))


def test_arrays_of_other_names_are_left_out(tmp_path, caplog):
    path = write_npz(tmp_path / "x.npz", weight=np.ones(30), patient=np.arange(30), latest=np.ones(30))
    assert len(load_source(settings(path)).test) > 0
    assert "left out: the arrays weight, patient, latest" in caplog.text


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def changed(content: bytes) -> bytes:
    middle = content.index(b"images.npy") + 400  # within the pixels
    return content[:middle] + bytes(255 - byte for byte in content[middle : middle + 50]) + content[middle + 50 :]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, r"x\.npz is not a readable \.npz archive: File is not a zip file"),
        (changed, r"x\.npz cannot be read: Bad CRC-32 for file 'images.npy'"),
        (lambda content: b"", r"x\.npz is not a readable \.npz archive: File is not a zip file"),
        (lambda content: content.replace(b"NUMPY", b"numpy"), r"x\.npz is not a readable \.npz archive: "),
    ],
)
def test_a_damaged_file_is_one_line_that_names_it(tmp_path, damage, message):
    path = write_npz(tmp_path / "x.npz")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(SettingsError, match=message) as caught:
        load_source(settings(path))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["~nonesuch/x.npz", "x" * 300 + ".npz"])
def test_a_path_that_cannot_be_used_is_one_line_with_the_whole_value(name):
    with pytest.raises(SettingsError, match=rf'^data.source = "npz:{name}": ') as caught:
        load_source(settings(name))
    assert len(str(caught.value).splitlines()) == 1
