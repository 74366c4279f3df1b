import logging
import unicodedata

import numpy as np
import pytest

from fedmitr_flwr.data import ImageSpec, client_images, load_source, load_spec
from fedmitr_flwr.data.client_images import site_images
from fedmitr_flwr.data.sources.names import SplitNamesError, split_folders
from fedmitr_flwr.data.sources.raw import TEST, TRAIN, VALIDATION, Origin
from fedmitr_flwr.settings import DataSettings, Settings, SettingsError
from tests.unit.data.data_fixtures import write_folder, write_npz

COMPOSED = "caf\u00e9"
DECOMPOSED = "cafe\u0301"
SPEC = ImageSpec((COMPOSED, "dog"), 3, 8, (0.5,) * 3, (0.5,) * 3)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FEDMITR_CACHE", str(tmp_path_factory.mktemp("cache")))


def settings(path, **changes):
    return DataSettings(source=f"folder:{path}", **{"image_size": 8, **changes})


def folders_of(images):
    return {str(images.reader.paths[row].parent.parent) for row in images.rows}


def site(path, spec=SPEC):
    return client_images(Settings(data=settings("/none")), {"data-path": str(path)}, None, spec=spec)[0]


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["train", "test"], {TRAIN: "train", TEST: "test"}),
        (["train", "val"], {TRAIN: "train", TEST: "val"}),
        (["test", "train", "val"], {TRAIN: "train", TEST: "test", VALIDATION: "val"}),
        (["Training", "Testing"], {TRAIN: "Training", TEST: "Testing"}),
        (["TRAIN", "VAL"], {TRAIN: "TRAIN", TEST: "VAL"}),
        (["seg_train", "seg_test", "seg_pred"], {TRAIN: "seg_train", TEST: "seg_test"}),
        (["train_set", "val_set", "test_set"], {TRAIN: "train_set", TEST: "test_set", VALIDATION: "val_set"}),
        (["TrainImages", "TestImages"], {TRAIN: "TrainImages", TEST: "TestImages"}),
        (["train2017", "val2017"], {TRAIN: "train2017", TEST: "val2017"}),
        (["trainset", "testset"], {TRAIN: "trainset", TEST: "testset"}),
        (["Training Data", "Hold-out"], {TRAIN: "Training Data", TEST: "Hold-out"}),
        (["flowers-train", "flowers-dev"], {TRAIN: "flowers-train", TEST: "flowers-dev"}),
        (["Entrenamiento", "Prueba", "Validaci\u00f3n"], {0: "Entrenamiento", 2: "Prueba", 1: "Validaci\u00f3n"}),
        (["Trainingsdaten", "Testdaten"], {TRAIN: "Trainingsdaten", TEST: "Testdaten"}),
        (["entrai\u0302nement", "test"], {TRAIN: "entrai\u0302nement", TEST: "test"}),
        (["\u8bad\u7ec3\u96c6", "\u6d4b\u8bd5\u96c6"], {TRAIN: "\u8bad\u7ec3\u96c6", TEST: "\u6d4b\u8bd5\u96c6"}),
        (["trainval", "test"], {TRAIN: "trainval", TEST: "test"}),
        (["train", "eval", "validation"], {TRAIN: "train", TEST: "eval", VALIDATION: "validation"}),
        (["train", "test", "extra"], {TRAIN: "train", TEST: "test"}),
        (["train", "val", "valid"], {TRAIN: "train", TEST: "val"}),
        (["train", "test", "Testing"], {TRAIN: "train", TEST: "test"}),
        (["bus", "train"], {}),
        (["valid", "invalid"], {}),
        (["positive_test", "negative_test"], {}),
        (["training", "constraint", "contest"], {}),
        (["train", "test_tube"], {}),
    ],
)
def test_splits_are_found_by_the_words_of_their_names(names, found):
    assert split_folders(names) == found


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["test", "val"], "look like splits, but there is no folder for training"),
        (["Train", "TRAINING", "test"], "look like one split"),
        (["train_cat", "test_cat", "train_dog", "test_dog"], "look like splits of single classes"),
    ],
)
def test_names_that_may_be_splits_or_not_are_refused(names, message):
    with pytest.raises(SplitNamesError, match=message):
        split_folders(names)


@pytest.mark.parametrize(
    ("train", "test", "beyond"),
    [
        ("Training", "Testing", ""),
        ("seg_train/seg_train", "seg_test/seg_test", ""),
        ("TRAIN", "EVAL", ""),
        ("dataset/train", "dataset/test", "dataset"),
        ("archive/data/Train", "archive/data/Val", "archive/data"),
    ],
)
def test_split_folders_of_any_spelling_and_depth_are_kept_apart(tmp_path, train, test, beyond):
    write_folder(tmp_path / train, {"cat": 6, "dog": 6})
    write_folder(tmp_path / test, {"cat": 2, "dog": 1})
    source = load_source(settings(tmp_path))
    assert source.spec.class_names == ("cat", "dog")
    assert load_spec(settings(tmp_path)).class_names == ("cat", "dog")
    assert folders_of(source.test) == {str(tmp_path / test)}
    assert source.test.histogram(2).tolist() == [2, 1]
    assert folders_of(source.train) | folders_of(source.validation) == {str(tmp_path / train)}


def test_a_site_trains_on_the_training_split_only_whatever_it_is_called(tmp_path):
    write_folder(tmp_path / "photos" / "Training", {"dog": 3})
    write_folder(tmp_path / "photos" / "Validation", {"dog": 4})
    write_folder(tmp_path / "photos" / "Testing", {"elk": 5})
    assert site(tmp_path).histogram(2).tolist() == [0, 3]


def test_images_of_a_class_called_train_at_a_site_are_used(tmp_path):
    write_folder(tmp_path, {"train": 3})
    spec = ImageSpec(("bus", "train"), 3, 8, (0.5,) * 3, (0.5,) * 3)
    assert site(tmp_path, spec).histogram(2).tolist() == [0, 3]


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["cat", "dog", "test"], "test has the name of a split, but no folder for training"),
        (["cat", "dog", "Validation"], "Validation has the name of a split"),
        (["test/cat", "test/dog", "val/cat", "val/dog"], "'test', 'val' look like splits, but there is no folder for"),
        (
            ["cat/train", "cat/test", "dog/train", "dog/test"],
            r"class folder .*cat has split folders in it \(test, train",
        ),
        (["train/cat", "train/dog", "unlabelled"], "train looks like a split, because it has folders and no images"),
        (["Train", "Test"], "Train has no class folders, but is the training split beside .*Test; put"),
        (["train_cat", "test_cat", "train_dog", "test_dog"], "look like splits of single classes"),
    ],
)
def test_folders_that_are_splits_and_not_classes_are_refused(tmp_path, folders, message):
    write_folder(tmp_path, dict.fromkeys(folders, 3))
    with pytest.raises(SettingsError, match=message):
        load_source(settings(tmp_path))
    with pytest.raises(SettingsError, match=message):
        load_spec(settings(tmp_path))
    with pytest.raises(SettingsError, match=message):
        site(tmp_path)


@pytest.mark.parametrize(
    "names",
    [
        ("fold1", "fold2", "fold3"),
        ("Part_A1", "Part_A2"),
        ("2019", "2020"),
        ("Charite", "Mayo", "UCSF"),
        ("imagesTr", "imagesTs"),
        ("te", "tr"),
        ("\u043e\u0431\u0443\u0447\u0435\u043d\u0438\u0435", "\u0442\u0435\u0441\u0442"),
    ],
)
def test_folders_that_all_have_the_same_folders_are_classes_only_if_their_names_are_given(tmp_path, names):
    for name in names:
        write_folder(tmp_path / name, {"cat": 3, "dog": 3})
    write_folder(tmp_path / names[-1], {"elk": 3})
    message = r"have the same folders \(cat, dog\) and no images beside them.* set data.class-names"
    with pytest.raises(SettingsError, match=message):
        load_source(settings(tmp_path))
    with pytest.raises(SettingsError, match=message):
        site(tmp_path)
    assert load_source(settings(tmp_path, class_names=",".join(names))).spec.class_names == names
    spec = ImageSpec(names, 3, 8, (0.5,) * 3, (0.5,) * 3)
    assert site(tmp_path, spec).histogram(len(names)).tolist() == [6] * (len(names) - 1) + [9]


def test_one_folder_in_every_class_folder_is_no_class(tmp_path, caplog):
    for name in ("n01", "n02"):
        write_folder(tmp_path / name, {"images": 3})
    assert load_source(settings(tmp_path)).spec.class_names == ("n01", "n02")
    assert "have the same folders (images)" in caplog.text


def test_class_folders_that_share_some_of_their_folders_are_classes(tmp_path):
    write_folder(tmp_path / "cat", {"day": 3, "night": 3})
    write_folder(tmp_path / "dog", {"day": 3})
    write_folder(tmp_path / "elk", {"day": 3, "night": 3, ".": 1})
    assert load_source(settings(tmp_path)).spec.class_names == ("cat", "dog", "elk")


@pytest.mark.parametrize("names", [("fold1", "fold2"), ("batch-0", "Batch-1")])
def test_numbered_parts_with_one_folder_are_refused(tmp_path, names):
    for name in names:
        write_folder(tmp_path / name, {"cat": 3})
    with pytest.raises(SettingsError, match=r"have the same folders \(cat\) and no images beside them"):
        load_source(settings(tmp_path))


def test_the_log_names_splits_and_what_lies_beside_them(tmp_path, caplog):
    caplog.set_level(logging.INFO, "fedmitr.data")
    write_folder(tmp_path / "Training", {"cat": 3, "dog": 3})
    write_folder(tmp_path / "Testing", {"cat": 2})
    write_folder(tmp_path / "extra", {"cat": 9})
    load_source(settings(tmp_path))
    assert "8 images of 2 classes (8 .png); 6 training images from Training, 2 test images from Testing" in caplog.text
    assert "left out: 1 folders beside the splits (extra)" in caplog.text
    assert "Testing has no image of: dog" in caplog.text


def test_evaluation_refuses_a_folder_of_several_splits(tmp_path):
    write_folder(tmp_path / "train", {"dog": 3})
    write_folder(tmp_path / "test", {"dog": 3})
    data = DataSettings(source="digits")
    with pytest.raises(SettingsError, match="has the splits train, test; name the folder of one of them"):
        site_images(data, Origin("--data", f"folder:{tmp_path}"), SPEC)
    assert len(site_images(data, Origin("--data", f"folder:{tmp_path}/test"), SPEC)) == 3


@pytest.mark.parametrize(
    ("train", "test"),
    [(DECOMPOSED, COMPOSED), (COMPOSED, DECOMPOSED), (f" {COMPOSED}", f"{COMPOSED} "), (COMPOSED, f"\ufeff{COMPOSED}")],
)
def test_unicode_forms_and_blanks_do_not_make_other_classes(tmp_path, train, test):
    write_folder(tmp_path / "train", {train: 3, "dog": 3})
    write_folder(tmp_path / "test", {test: 2, "dog": 1})
    source = load_source(settings(tmp_path))
    assert source.spec.class_names == (COMPOSED, "dog")
    assert source.test.histogram(2).tolist() == [2, 1]
    assert site(tmp_path / "test").histogram(2).tolist() == [2, 1]


def test_the_federations_names_and_the_settings_are_matched_in_any_form(tmp_path):
    write_folder(tmp_path, {COMPOSED: 3, "dog": 4})
    old = ImageSpec((DECOMPOSED, "dog"), 3, 8, (0.5,) * 3, (0.5,) * 3)
    assert site(tmp_path, old).histogram(2).tolist() == [3, 4]
    spec = load_source(settings(tmp_path, class_names=f"dog,{DECOMPOSED} ")).spec
    assert spec.class_names == ("dog", COMPOSED)


def test_names_in_an_archive_are_matched_in_any_form(tmp_path):
    path = write_npz(tmp_path / "s.npz", per_class=(2, 3), class_names=np.array(["dog ", DECOMPOSED]))
    assert site(path).histogram(2).tolist() == [3, 2]
    assert load_source(DataSettings(source=f"npz:{path}")).spec.class_names == ("dog", COMPOSED)


def test_a_simulated_client_and_the_server_may_write_a_name_in_two_forms(tmp_path):
    write_folder(tmp_path, {DECOMPOSED: 3, "dog": 3})
    task = Settings(data=settings(tmp_path))
    names = (DECOMPOSED, "dog")
    images, spec = client_images(task, {"partition-id": 0, "num-partitions": 1}, names)
    assert spec.class_names == (COMPOSED, "dog")
    assert len(images) > 0


@pytest.mark.parametrize(
    "pair", [(COMPOSED, DECOMPOSED), ("cat", "cat "), ("cat", "c\u00adat"), ("two words", "two\u00a0words")]
)
def test_two_classes_that_look_alike_are_refused(tmp_path, pair):
    write_folder(tmp_path, {pair[0]: 3, pair[1]: 3, "elk": 2})
    with pytest.raises(SettingsError, match="two class folders whose names look alike"):
        load_source(settings(tmp_path))
    path = write_npz(tmp_path / "s.npz", class_names=np.array([*pair, "elk"]))
    with pytest.raises(SettingsError, match=r"two classes (whose names look alike|of the same name)"):
        load_source(DataSettings(source=f"npz:{path}"))
    with pytest.raises(SettingsError, match="look alike"):
        load_spec(settings(tmp_path, class_names=f"{pair[0]},{pair[1]},\u00a0"))


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("Dog", "'Dog' differs from 'dog' only in upper and lower case"),
        ("\uff44og", r"'\uff44og' \(\\uff44og\) differs from 'dog' only in the form of its characters in Unicode"),
        ("d\u043eg", r"d\\u043eg"),
    ],
)
def test_a_name_that_only_looks_right_is_refused_with_the_difference(tmp_path, name, hint):
    write_folder(tmp_path, {name: 2})
    with pytest.raises(SettingsError, match=hint):
        site(tmp_path)
    write_folder(tmp_path / "split" / "train", {COMPOSED: 2, "dog": 2})
    write_folder(tmp_path / "split" / "test", {name: 2})
    with pytest.raises(SettingsError, match=hint):
        load_source(settings(tmp_path / "split"))


def test_letters_of_both_cases_are_two_classes(tmp_path, caplog):
    write_folder(tmp_path, {"a": 3, "A": 3})
    assert load_source(settings(tmp_path)).spec.class_names == ("A", "a")
    assert not caplog.records
    write_folder(tmp_path / "words", {"cat": 3, "Cat": 3})
    load_source(settings(tmp_path / "words"))
    assert "classes that differ only in case: Cat, cat" in caplog.text


def test_classes_are_sorted_by_their_composed_names(tmp_path):
    names = ["f", DECOMPOSED, "cafz"]
    write_folder(tmp_path, dict.fromkeys(names, 3))
    expected = tuple(sorted(unicodedata.normalize("NFC", name) for name in names))
    source = load_source(settings(tmp_path))
    assert source.spec.class_names == expected
    for label, row in zip(source.train.labels, source.train.rows, strict=True):
        name = source.train.reader.paths[row].parent.name
        assert unicodedata.normalize("NFC", name) == expected[label]
