import os

import numpy as np
import pytest

from fedmitr_flwr.data import load_source, load_spec
from fedmitr_flwr.data.sources import folder as folder_module
from fedmitr_flwr.settings import DataSettings, SettingsError
from tests.unit.data.data_fixtures import write_folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FEDMITR_CACHE", str(tmp_path_factory.mktemp("cache")))


def settings(path, **changes):
    return DataSettings(source=f"folder:{path}", **{"image_size": 8, **changes})


def files(images):
    return [images.reader.paths[row] for row in images.rows]


def test_one_folder_a_class_is_split_by_class(tmp_path):
    write_folder(tmp_path, {"dog": 10, "cat": 20})
    source = load_source(settings(tmp_path))
    assert source.spec.class_names == ("cat", "dog")
    assert source.test.histogram(2).tolist() == [4, 2]
    for part in (source.train, source.validation, source.test):
        assert [path.parent.name for path in files(part)] == [["cat", "dog"][label] for label in part.labels]
    assert files(load_source(settings(tmp_path)).train) == files(source.train)


def test_photographs_become_224_colour_squares_by_default(tmp_path):
    write_folder(tmp_path, {"cat": 3, "dog": 3}, size=(300, 240), ending="jpg")
    source = load_source(DataSettings(source=f"folder:{tmp_path}"))
    assert source.spec.image_size == 224
    assert source.train.images([0]).shape == (1, 3, 224, 224)


@pytest.mark.parametrize("name", ["test", "val"])
def test_a_given_split_is_kept(tmp_path, name):
    write_folder(tmp_path / "train", {"cat": 6, "dog": 6})
    write_folder(tmp_path / name, {"cat": 2, "dog": 1})
    source = load_source(settings(tmp_path))
    assert {path.parent.parent.name for path in files(source.test)} == {name}
    assert source.test.histogram(2).tolist() == [2, 1]
    assert source.validation.histogram(2).tolist() == [1, 1]
    assert {path.parent.parent.name for path in files(source.train) + files(source.validation)} == {"train"}


def test_given_test_and_validation_folders_are_both_kept(tmp_path):
    for name in ("train", "val", "test"):
        write_folder(tmp_path / name, {"cat": 3, "dog": 3})
    source = load_source(settings(tmp_path))
    assert {path.parent.parent.name for path in files(source.validation)} == {"val"}
    assert {path.parent.parent.name for path in files(source.test)} == {"test"}
    assert len(source.train) == 6


def test_a_class_called_train_is_not_taken_for_a_split(tmp_path):
    write_folder(tmp_path, {"bus": 4, "train": 4})
    assert load_spec(settings(tmp_path)).class_names == ("bus", "train")


def test_other_files_and_hidden_folders_are_ignored(tmp_path):
    write_folder(tmp_path, {"cat": 4, "dog": 4, ".thumbnails": 2, "__MACOSX": 1})
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / "readme.md").write_text("none either")
    source = load_source(settings(tmp_path))
    assert source.spec.class_names == ("cat", "dog")
    assert len(source.train) + len(source.validation) + len(source.test) == 8


def test_the_spec_needs_names_only(tmp_path, monkeypatch):
    write_folder(tmp_path, {"cat": 2, "dog": 2})
    monkeypatch.setattr(folder_module, "inspect_files", pytest.fail)
    assert load_spec(settings(tmp_path)).class_names == ("cat", "dog")


def test_a_server_without_data_gets_its_spec_from_the_class_names(tmp_path):
    spec = load_spec(settings(tmp_path / "elsewhere", class_names="dog,cat", image_size=32))
    assert spec.class_names == ("dog", "cat")
    assert (spec.channels, spec.image_size) == (3, 32)


@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_a_cut_off_image_is_found_before_anything_starts(tmp_path, ending):
    write_folder(tmp_path, {"cat": 3, "dog": 3}, size=(64, 64), ending=ending)
    victim = tmp_path / "dog" / f"1.{ending}"
    victim.write_bytes(victim.read_bytes()[:-400])
    with pytest.raises(SettingsError, match=rf"data.source = .*cannot read the image .*dog/1\.{ending}"):
        load_source(settings(tmp_path))


def test_a_file_that_is_no_image_at_all_is_named_with_the_number_of_others(tmp_path):
    write_folder(tmp_path, {"cat": 3, "dog": 3})
    (tmp_path / "cat" / "0.png").write_bytes(b"hello")
    (tmp_path / "dog" / "2.png").write_bytes(b"")
    with pytest.raises(SettingsError, match=r"cat/0\.png: .*1 more damaged"):
        load_source(settings(tmp_path))


def test_an_image_that_breaks_later_is_named_too(tmp_path):
    write_folder(tmp_path, {"cat": 3, "dog": 3})
    source = load_source(settings(tmp_path))
    for path in files(source.train):
        path.write_bytes(b"gone")
    with pytest.raises(SettingsError, match=r"cannot read the image .*\.png"):
        source.train.images([0])


def test_a_checked_folder_is_not_checked_again_until_a_file_changes(tmp_path, monkeypatch):
    write_folder(tmp_path, {"cat": 3, "dog": 3})
    checked = []
    clock = iter(range(100))
    monkeypatch.setattr(folder_module.time, "monotonic", lambda: float(next(clock)))
    inspect = folder_module.inspect_files
    monkeypatch.setattr(folder_module, "inspect_files", lambda paths: checked.append(len(paths)) or inspect(paths))
    load_source(settings(tmp_path))
    load_source(settings(tmp_path))
    assert checked == [6]
    changed = tmp_path / "cat" / "0.png"
    os.utime(changed, ns=(0, 0))
    load_source(settings(tmp_path))
    assert checked == [6, 6]


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ({"cat": 5}, "has only one class \\(cat\\)"),
        ({"cat": 5, "dog": 0}, "class folder .*dog has no image"),
        ({}, "has no class folders; put the images of each class into a folder"),
        ({"cat": 1, "dog": 1}, "has no image for the test set"),
    ],
)
def test_folders_that_cannot_be_learnt_from_are_refused(tmp_path, classes, message):
    write_folder(tmp_path, classes)
    with pytest.raises(SettingsError, match=message):
        load_source(settings(tmp_path))


def test_a_test_folder_with_a_class_of_its_own_is_refused(tmp_path):
    write_folder(tmp_path / "train", {"cat": 3, "dog": 3})
    write_folder(tmp_path / "test", {"cat": 1, "elk": 1})
    with pytest.raises(SettingsError, match=r"class folder 'elk', but .*train does not"):
        load_source(settings(tmp_path))


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(SettingsError, match=r'data.source = "folder:.*nowhere": the folder .*nowhere does not exist'):
        load_source(settings(tmp_path / "nowhere"))


def test_a_path_given_for_the_source_is_never_a_built_in_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingsError, match=r'data-path = "digits": the folder digits does not exist'):
        load_source(settings("unused"), data_path="digits")
    write_folder(tmp_path / "digits", {"one": 4, "two": 4})
    assert load_source(settings("unused"), data_path="digits").spec.class_names == ("one", "two")


def test_wrong_number_of_means_is_refused(tmp_path):
    write_folder(tmp_path, {"cat": 3, "dog": 3})
    with pytest.raises(SettingsError, match=r"data.mean = \"0.5\": must have as many entries as .* channels \(3\)"):
        load_spec(settings(tmp_path, mean=(0.5,), std=(0.5,)))


def test_pixels_are_those_of_the_file(tmp_path):
    write_folder(tmp_path, {"cat": 3, "dog": 3}, size=(8, 8))
    source = load_source(settings(tmp_path))
    from PIL import Image

    with Image.open(files(source.train)[1]) as image:
        assert np.array_equal(source.train.images([1])[0].permute(1, 2, 0).numpy(), np.asarray(image))
