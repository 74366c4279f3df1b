"""Labels of any type become their classes, or are refused: in archives, in tables, and between splits."""

import pickle
import time
import unicodedata
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from fedmitr_flwr.data import client_images, load_source, load_spec
from fedmitr_flwr.settings import DataSettings, Settings, SettingsError
from tests.unit.data.data_fixtures import patterned, write_npz

COLOURS = ("cat", "dog", "elk", "fox", "gnu")
THREE = np.arange(30) % 3


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
    datasets.disable_progress_bars()


def archive(path: Path, **arrays: np.ndarray) -> DataSettings:
    """Settings of an archive whose image i has the class i % 3."""
    return DataSettings(source=f"npz:{write_npz(path / 'x.npz', **arrays)}")


def names_by_row(source) -> dict[int, str]:
    """The class name of each image by its row in the source, over all three sets."""
    parts = (source.train, source.validation, source.test)
    return {row: source.spec.class_names[y] for part in parts for row, y in zip(part.rows, part.labels, strict=True)}


def picture(number: int) -> Image.Image:
    """An image whose pixels tell which of the classes it shows."""
    return Image.new("RGB", (8, 8), (50 * number, 0, 0))


def split(shown: list[int], kind: object, encode) -> datasets.Dataset:
    """A split whose image i shows the class `shown[i]` and has the label that `encode` gives it."""
    rows = {"image": [picture(number) for number in shown], "label": [encode(number) for number in shown]}
    return datasets.Dataset.from_dict(rows, features=datasets.Features({"image": datasets.Image(), "label": kind}))


def classes(*names: str) -> tuple[datasets.ClassLabel, object]:
    """A column of class names, and how the classes of `COLOURS` are encoded in it."""
    return datasets.ClassLabel(names=list(names)), lambda number: names.index(COLOURS[number])


TEXT = (datasets.Value("string"), lambda number: COLOURS[number])
NUMBERS = (datasets.Value("int64"), lambda number: number)


def texts(names):
    """A column of these texts."""
    return datasets.Value("string"), lambda number: names[number]


def named(names):
    """A column of these class names."""
    return datasets.ClassLabel(names=names), lambda number: number


def save(path: Path, **splits: datasets.Dataset) -> DataSettings:
    datasets.DatasetDict(splits).save_to_disk(str(path / "saved"))
    return DataSettings(source=f"hub:{path / 'saved'}")


def wrong_labels(source) -> int:
    """How many images of the three sets have the name of another class than the one that they show."""
    wrong = 0
    for part in (source.train, source.validation, source.test):
        shown = (part.images(np.arange(len(part)))[:, 0, 0, 0] // 50).tolist()
        wrong += sum(COLOURS[a] != source.spec.class_names[b] for a, b in zip(shown, part.labels, strict=True))
    return wrong


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        pytest.param(THREE + 1, ("1", "2", "3"), id="from-1"),
        pytest.param(np.array([900, 3, 77])[THREE], ("3", "77", "900"), id="gaps"),
        pytest.param(20240101 + THREE, ("20240101", "20240102", "20240103"), id="identifiers"),
        pytest.param(THREE.astype(np.uint64) + 2**63, tuple(str(2**63 + n) for n in range(3)), id="uint64"),
        pytest.param(np.array([2, 10, 0])[THREE].astype(">i2"), ("0", "2", "10"), id="big-endian"),
        pytest.param(THREE.astype(np.float32), ("0", "1", "2"), id="whole-floats"),
        pytest.param(THREE.astype(np.float16) + 5, ("5", "6", "7"), id="half-floats"),
        pytest.param(THREE == 1, ("0", "1"), id="booleans"),
        pytest.param(THREE[:, None] + 1, ("1", "2", "3"), id="a-column"),
        pytest.param(np.eye(3, dtype=np.uint8)[THREE], ("0", "1", "2"), id="one-hot"),
        pytest.param(np.eye(3)[THREE], ("0", "1", "2"), id="one-hot-floats"),
        pytest.param(np.array(["elk", "cat", "dog"])[THREE], ("cat", "dog", "elk"), id="texts"),
        pytest.param(np.array([b"elk", b"cat", b"d\xc3\xb6g"])[THREE], ("cat", "dög", "elk"), id="bytes"),
    ],
)
def test_labels_of_an_archive_become_their_distinct_classes_in_ascending_order(tmp_path, labels, names):
    settings = archive(tmp_path, label=labels)
    source = load_source(settings)
    assert source.spec.class_names == names
    assert load_spec(settings) == source.spec
    flat = labels.argmax(1) if labels.ndim == 2 and labels.shape[1] > 1 else labels.ravel()
    shown = [v.decode() if isinstance(v, bytes) else str(v if isinstance(v, str) else int(v)) for v in flat.tolist()]
    assert names_by_row(source) == dict(enumerate(shown))


def test_work_is_bounded_by_the_images_and_not_by_the_labels(tmp_path):
    start = time.process_time()
    assert load_source(archive(tmp_path, label=THREE * 2**60)).spec.num_classes == 3
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (THREE - 1, r"`label` has no label for 10 of 30 images \(row 0 is the first; .* here -1\)"),
        (np.where(THREE == 2, np.nan, THREE), r"`label` has no label for 10 of 30 images \(row 2 .* here nan\)"),
        (THREE + 0.5, r"`label` has values that are not whole numbers, such as 0.5; a label is a whole number"),
        (np.where(THREE == 2, np.inf, THREE), r"`label` has values that are not whole numbers, such as inf"),
        (THREE + 2.0**60, r"`label` has floats that are too large to be exact"),
        (np.array(["cat", "", "dog"])[THREE], r"`label` has no label for 10 of 30 images .* here ''"),
        (np.array([b"cat", b"\xff\xfe", b"dog"])[THREE], r"`label` has bytes that are no UTF-8 text"),
        (THREE.astype("datetime64[D]"), r"`label` is datetime64\[D\] of shape \(30,\); a label is"),
        (THREE + 0j, r"`label` is complex128 of shape"),
        (np.eye(3)[THREE] / 2, r"`label` has rows that are not one-hot .* row 0: 0.5, 0.0, 0.0"),
        (np.ones((30, 3), int), r"`label` has rows that are not one-hot"),
        (np.eye(3)[THREE][:, None], r"`label` is float64 of shape \(30, 1, 3\)"),
        (THREE.astype(object), r"`label` holds Python objects; arrays of objects are refused"),
        (np.arange(30), r"has 30 different labels \(0, 1, .*\) for its images, fewer than two images a label"),
        (np.arange(30) // 1.2 // 1, r"has 25 different labels"),
        (np.array([str(n) for n in range(30)]), r"has 30 different labels"),
    ],
)
def test_labels_that_do_not_name_a_class_are_refused_with_the_reason(tmp_path, labels, message):
    with pytest.raises(SettingsError, match=message):
        load_source(archive(tmp_path, label=labels))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"label": THREE + 1, "test": THREE == 2}, r"has no training image of 1 of its 3 classes: 3"),
        ({"class_names": np.array(["a", "b", "c", "d"])}, r"has no training image of 1 of its 4 classes: d"),
        ({"class_names": np.array(["a", "Test", "c"])}, r"classes that are called like splits: Test; the images"),
        ({"class_names": np.array(["train", "VAL", "c"])}, r"called like splits: VAL"),
        ({"class_names": np.array(["seg_train", "seg_test", "c"])}, r"called like splits: seg_train, seg_test"),
        ({"class_names": np.array(["training", "dog", "c"])}, r"called like splits: training"),
    ],
)
def test_classes_without_training_images_or_called_like_splits_are_refused(tmp_path, arrays, message):
    with pytest.raises(SettingsError, match=message):
        load_source(archive(tmp_path, **arrays))


@pytest.mark.parametrize(
    "names", [("bus", "train", "tram"), ("valid", "invalid", "torn"), ("bullet train", "test tube", "c")]
)
def test_a_class_that_is_no_split_may_have_a_word_of_one(tmp_path, names):
    assert load_source(archive(tmp_path, class_names=np.array(names))).spec.class_names == names


def test_fewer_classes_by_the_settings_may_leave_out_those_without_images(tmp_path):
    settings = archive(tmp_path, class_names=np.array(["a", "b", "c", "d"])).model_copy(update={"classes": 3})
    assert load_source(settings).spec.class_names == ("a", "b", "c")


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(np.array([b"cat", b"dog", "élk".encode()]), id="bytes"),
        pytest.param(np.array([["cat"], ["dog"], ["élk"]]), id="a-column"),
        pytest.param(np.array([["cat", "dog", "élk"]]), id="a-row"),
        pytest.param(np.array(["cat  ", "dog  ", "élk  "]), id="padded"),
    ],
)
@pytest.mark.parametrize("labels", [THREE, THREE.astype(float), THREE[:, None], np.eye(3)[THREE]])
def test_class_names_of_an_archive_may_have_any_form_that_is_certain(tmp_path, names, labels):
    source = load_source(archive(tmp_path, label=labels, class_names=names))
    assert source.spec.class_names == ("cat", "dog", "élk")
    assert names_by_row(source) == {row: ("cat", "dog", "élk")[row % 3] for row in range(30)}


def test_texts_are_matched_to_class_names_in_the_order_of_the_names(tmp_path):
    names = np.array(["elk", "cat", "dog"])
    source = load_source(archive(tmp_path, label=np.array(["cat", "dog", "elk"])[THREE], class_names=names))
    assert source.spec.class_names == ("elk", "cat", "dog")
    assert names_by_row(source) == {row: ("cat", "dog", "elk")[row % 3] for row in range(30)}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"class_names": np.array("cat")}, r"`class_names` must be a list of texts, .* but is <U3 of shape \(\)"),
        ({"class_names": np.array([])}, r"`class_names` must be a list of texts"),
        ({"class_names": np.array([["a", "b"], ["c", "d"]])}, r"`class_names` must be a list .* shape \(2, 2\)"),
        ({"class_names": np.array([0.5, 1.5, 2.5])}, r"`class_names` must be a list .* float64"),
        ({"class_names": np.array(["a", " ", "c"])}, r"`class_names` has an empty name at position 1"),
        ({"class_names": np.array([b"a", b"\xff", b"c"])}, r"`class_names` has bytes that are no UTF-8 text"),
        ({"class_names": np.array(["a", "b", "a "])}, r"two classes of the same name"),
        ({"class_names": np.array(["a", "b", "c"], object)}, r"`class_names` holds Python objects"),
        ({"class_names": np.array(["a", "b", "c"]), "label": THREE + 1}, r"`label` must have values from 0 to 2"),
        (
            {"class_names": np.array(["a", "b"]), "label": np.array(["a", "b", "c"])[THREE]},
            r"`label` has labels that are not among the class names: c",
        ),
        (
            {"class_names": np.array(["a", "b", "c", "d"]), "label": np.eye(3)[THREE]},
            r"one-hot rows of 3 entries, but array `class_names` has 4 names",
        ),
        ({"images": None, "train_images": patterned(30)}, r"no array `images`; .* its arrays are: label, train_images"),
        ({"label": None, "labels": THREE}, r"no array `label`; .* its arrays are: images, labels"),
        ({"domain": np.array(["a", "b", "c"])[THREE], "domain_names": np.array(["a", "b"])}, r"`domain` has labels"),
    ],
)
def test_other_arrays_that_do_not_fit_are_refused(tmp_path, arrays, message):
    with pytest.raises(SettingsError, match=message):
        load_source(archive(tmp_path, **arrays))


@pytest.mark.parametrize("domain", [np.array([b"day", b"night"]), np.array(["day", "night"])])
def test_domains_may_be_bytes(tmp_path, domain):
    source = load_source(archive(tmp_path, domain=domain[np.arange(30) % 2]))
    assert source.train.columns["domain"].tolist() == [["day", "night"][row % 2] for row in source.train.rows]


PIXELS = patterned(30)


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        pytest.param(PIXELS.astype(np.float32) / 255, PIXELS, id="floats-to-1"),
        pytest.param(PIXELS.astype(np.float16), PIXELS, id="floats-to-255"),
        pytest.param(PIXELS.astype(np.int64), PIXELS, id="int64"),
        pytest.param(PIXELS.astype(np.uint16) * 257, PIXELS, id="16-bits"),
        pytest.param(PIXELS.astype(">u2"), PIXELS, id="8-bits-in-16"),
        pytest.param(PIXELS > 127, np.where(PIXELS > 127, 255, 0), id="booleans"),
        pytest.param(PIXELS.astype(np.float64) * 257, PIXELS, id="floats-to-65535"),
    ],
)
def test_pixels_of_other_types_are_scaled_by_their_white(tmp_path, images, expected):
    source = load_source(archive(tmp_path, images=images))
    seen = source.train.images(np.arange(len(source.train))).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(seen, expected[source.train.rows])


@pytest.mark.parametrize(
    "images",
    [
        pytest.param(PIXELS.astype(np.float32) / 127.5 - 1, id="minus-1-to-1"),
        pytest.param(PIXELS.astype(np.float32) / 255 * 1.01, id="above-1"),
        pytest.param(PIXELS.astype(np.uint16) * 16, id="12-bits"),
        pytest.param((PIXELS > 127).astype(np.int32), id="zeros-and-ones"),
        pytest.param(PIXELS.astype(np.int32) * 2**16, id="beyond-16-bits"),
        pytest.param(np.where(PIXELS > 250, np.nan, PIXELS / 255), id="nan"),
        pytest.param(PIXELS.astype(np.float32) / 1000, id="dark"),
    ],
)
def test_pixels_whose_white_is_not_certain_are_refused(tmp_path, images):
    with pytest.raises(SettingsError, match=r"`images` is .* with values from .* do not tell the value of white"):
        load_source(archive(tmp_path, images=images))


def test_nearly_black_pixels_are_reported(tmp_path, caplog):
    load_source(archive(tmp_path, images=(PIXELS > 127).astype(np.uint8)))
    assert "all images are nearly black" in caplog.text


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-200],
        lambda content: content[:400] + b"\0" * 900 + content[1300:],
        lambda content: content.replace(b"'descr'", b"'decsr'"),
    ],
)
def test_a_damaged_archive_is_refused(tmp_path, damage):
    settings = archive(tmp_path)
    file = tmp_path / "x.npz"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(SettingsError, match=r"x\.npz (is not a readable|cannot be read)"):
        load_source(settings)


@pytest.mark.parametrize("name", ["label", "class_names", "test", "images"])
def test_a_pickle_in_an_archive_is_refused_and_not_read(tmp_path, name):
    path = write_npz(tmp_path / "x.npz", **{name: None})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(f"{name}.npy", pickle.dumps(Trap(tmp_path / "ran")))
    with pytest.raises(SettingsError, match=r"is not an array in NumPy's format|is not a readable"):
        load_source(DataSettings(source=f"npz:{path}"))
    assert not (tmp_path / "ran").exists()


class Trap:
    """An object that makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_given_names_rename_label_numbers_only_where_they_are_positions(tmp_path):
    renamed = archive(tmp_path).model_copy(update={"class_names": "ant,bee,cow"})
    assert load_source(renamed).spec.class_names == ("ant", "bee", "cow")
    settings = archive(tmp_path, label=THREE + 1)
    ordered = load_source(settings.model_copy(update={"class_names": "3,1,2"}))
    assert names_by_row(ordered) == {row: str(row % 3 + 1) for row in range(30)}
    with pytest.raises(SettingsError, match=r"'ant' is not one of 1, 2, 3"):
        load_source(settings.model_copy(update={"class_names": "ant,bee,cow"}))


@pytest.mark.parametrize(
    ("labels", "federation", "expected"),
    [
        ([0, 2, 2], ("cat", "dog", "elk"), [0, 2, 2]),
        ([2, 1, 1], ("cat", "dog", "elk"), [2, 1, 1]),
        ([3, 1, 3], ("1", "2", "3"), [2, 0, 2]),
        ([1.0, 2.0, 1.0], ("0", "1", "2"), [1, 2, 1]),
        (np.eye(3)[[1, 2, 1]], ("cat", "dog", "elk"), [1, 2, 1]),
        (np.array(["elk", "cat", "elk"]), ("cat", "dog", "elk"), [2, 0, 2]),
    ],
)
def test_a_site_is_matched_by_its_numbers_also_if_it_lacks_classes(tmp_path, labels, federation, expected):
    path = write_npz(tmp_path / "s.npz", images=patterned(3), label=np.asarray(labels))
    settings = Settings(data=DataSettings(source="folder:/only/at/the/server", image_size=8))
    images, _ = client_images(settings, {"data-path": str(path)}, federation)
    assert images.labels.tolist() == expected


@pytest.mark.parametrize(
    ("labels", "federation", "message"),
    [
        ([0, 1, 3], ("cat", "dog", "elk"), "label 3, but the federation has 3 classes"),
        ([0, 1, 1], ("1", "2", "3"), "classes that the federation does not have: 0; its classes are 1, 2, 3"),
        ([1, 2**62, 1], ("cat", "dog", "elk"), "label 4611686018427387904, but the federation has 3 classes"),
    ],
)
def test_a_sites_numbers_that_are_no_classes_of_the_federation_are_refused(tmp_path, labels, federation, message):
    path = write_npz(tmp_path / "s.npz", images=patterned(3), label=np.asarray(labels))
    settings = Settings(data=DataSettings(source="folder:/only/at/the/server", image_size=8))
    with pytest.raises(SettingsError, match=message):
        client_images(settings, {"data-path": str(path)}, federation)


TRAIN = [0, 1, 2] * 6


@pytest.mark.parametrize(
    ("train", "test", "shown"),
    [
        pytest.param(classes("cat", "dog", "elk"), classes("cat", "elk"), [0, 2], id="lacks-one"),
        pytest.param(classes("cat", "dog", "elk"), classes("elk", "dog", "cat"), [0, 1, 2], id="reversed"),
        pytest.param(classes("cat", "dog", "elk"), TEXT, [0, 1, 2], id="texts-in-test"),
        pytest.param(TEXT, classes("elk", "dog", "cat"), [0, 1, 2], id="texts-in-train"),
        pytest.param(classes("elk", "cat", "dog"), classes("gnu", "dog", "cat", "elk"), [0, 2], id="unused-extra"),
        pytest.param(TEXT, TEXT, [2], id="texts"),
    ],
)
@pytest.mark.parametrize("name", ["test", "validation", "Test"])
def test_labels_of_splits_are_matched_by_name(tmp_path, train, test, shown, name):
    settings = save(tmp_path, train=split(TRAIN, *train), **{name: split(shown * 4, *test)})
    source = load_source(settings)
    assert wrong_labels(source) == 0
    assert source.spec.num_classes == 3
    assert len(source.test) == 4 * len(shown)


@pytest.mark.parametrize(
    ("train", "test", "shown", "message"),
    [
        pytest.param(
            classes("cat", "dog", "elk"),
            classes("cat", "dog", "elk", "fox"),
            [0, 3],
            r"has labels in the split 'test' that the split 'train' does not have: fox; the labels of 'train' are cat",
            id="extra-class",
        ),
        pytest.param(TEXT, TEXT, [0, 4], "does not have: gnu", id="extra-text"),
        pytest.param(
            NUMBERS, NUMBERS, [0, 4], "does not have: 4; the labels of 'train' are 0, 1, 2", id="extra-number"
        ),
        pytest.param(
            classes("cat", "dog", "elk"),
            NUMBERS,
            [0, 1],
            r"has numbers without names in the split 'test' and the class names cat, dog, elk in the split 'train'",
            id="numbers-in-test",
        ),
        pytest.param(
            NUMBERS, classes("cat", "dog", "elk"), [0, 1], "numbers without names in the split 'train'", id="in-train"
        ),
        pytest.param(NUMBERS, TEXT, [0, 1], "does not have: cat, dog", id="texts-and-numbers"),
    ],
)
def test_labels_of_splits_that_cannot_be_matched_are_refused(tmp_path, train, test, shown, message):
    settings = save(tmp_path, train=split(TRAIN, *train), test=split(shown * 4, *test))
    with pytest.raises(SettingsError, match=rf'data.label-column = "label": the column of hub:.* {message}'):
        load_source(settings)


@pytest.mark.parametrize(("train", "test"), [(texts, texts), (named, texts), (texts, named), (named, named)])
def test_composed_and_decomposed_names_of_splits_are_one_class(tmp_path, train, test):
    first, second = [unicodedata.normalize("NFC", "café"), "dog"], [unicodedata.normalize("NFD", "café"), "dog"]
    settings = save(tmp_path, train=split([0, 1] * 9, *train(first)), test=split([1, 0, 0], *test(second)))
    assert load_source(settings).test.labels.tolist() == [
        load_source(settings).spec.class_names.index(name) for name in ("dog", first[0], first[0])
    ]


def test_names_that_differ_only_in_case_are_refused_with_the_reason(tmp_path):
    settings = save(tmp_path, train=split([0, 1] * 9, *TEXT), test=split([0, 1], *texts(["Cat", "dog"])))
    with pytest.raises(SettingsError, match=r"does not have: Cat; .* differs from 'cat' only in upper and lower case"):
        load_source(settings)


def test_numbers_are_matched_to_names_that_are_the_same_numbers(tmp_path):
    digits = datasets.ClassLabel(names=["0", "1", "2"])
    text = (datasets.Value("string"), str)
    settings = save(
        tmp_path, train=split(TRAIN, *NUMBERS), test=split([2, 0], digits, int), validation=split([1, 2], *text)
    )
    source = load_source(settings)
    assert [source.spec.class_names[y] for y in source.test.labels] == ["2", "0"]
    assert [source.spec.class_names[y] for y in source.validation.labels] == ["1", "2"]


def test_domains_of_splits_are_read_by_the_names_of_their_own_split(tmp_path):
    def part(shown, names, codes):
        kind = datasets.ClassLabel(names=names)
        return split(shown, *NUMBERS).add_column("domain", codes).cast_column("domain", kind)

    train, test = part(TRAIN, ["art", "photo"], [0, 1] * 9), part([0, 1], ["x", "y", "photo"], [2, 2])
    source = load_source(save(tmp_path, train=train, test=test))
    assert source.test.columns["domain"].tolist() == ["photo", "photo"]


def test_each_split_may_be_saved_alone(tmp_path):
    train, test = split(TRAIN, *classes("cat", "dog", "elk")), split([0, 2, 2], *classes("elk", "cat"))
    train.save_to_disk(str(tmp_path / "train"))
    test.save_to_disk(str(tmp_path / "test"))
    source = load_source(DataSettings(source=f"hub:{tmp_path}"))
    assert wrong_labels(source) == 0
    assert len(source.test) == 3


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (classes("cat", "dog", "elk"), classes("cat", "elk")),
        (classes("cat", "dog", "elk"), classes("elk", "dog", "cat")),
        (classes("cat", "dog", "elk"), NUMBERS),
        (NUMBERS, classes("cat", "dog", "elk")),
    ],
)
@pytest.mark.parametrize("files", [("train-0", "test-0"), ("train-0", "train-1"), ("train", "validation")])
def test_parquet_files_with_different_class_names_are_refused(tmp_path, first, second, files):
    split(TRAIN, *first).to_parquet(tmp_path / f"{files[0]}.parquet")
    split([0, 2, 0], *second).to_parquet(tmp_path / f"{files[1]}.parquet")
    with pytest.raises(
        SettingsError, match=r"has files with different class names for the column 'label': .* in \S+ and"
    ):
        load_source(DataSettings(source=f"hub:{tmp_path}"))


def test_a_card_may_declare_the_names_of_files_without_names(tmp_path):
    split(TRAIN, *NUMBERS).to_parquet(tmp_path / "train-0.parquet")
    names = "".join(f"          '{number}': {name}\n" for number, name in enumerate(("elk", "cat", "dog")))
    (tmp_path / "README.md").write_text(
        "---\ndataset_info:\n  features:\n  - name: image\n    dtype: image\n  - name: label\n    dtype:\n"
        f"      class_label:\n        names:\n{names}  splits:\n  - name: train\n    num_examples: 18\n---\n"
    )
    assert load_source(DataSettings(source=f"hub:{tmp_path}")).spec.class_names == ("elk", "cat", "dog")


def test_a_folder_of_images_has_one_list_of_classes(tmp_path):
    for part, numbers in (("train", (0, 1, 2)), ("test", (0, 2))):
        for number in numbers:
            (tmp_path / part / COLOURS[number]).mkdir(parents=True)
            for copy in range(4):
                picture(number).save(tmp_path / part / COLOURS[number] / f"{copy}.png")
    source = load_source(DataSettings(source=f"hub:{tmp_path}"))
    assert wrong_labels(source) == 0
    assert len(source.test) == 8


LIST = datasets.List
FLOATS = datasets.Value("float64")


@pytest.mark.parametrize(
    ("kind", "encode"),
    [
        pytest.param(FLOATS, float, id="floats"),
        pytest.param(datasets.Value("float16"), float, id="half-floats"),
        pytest.param(datasets.Value("uint64"), lambda n: n + 2**40, id="uint64"),
        pytest.param(datasets.Value("large_string"), str, id="large-strings"),
        pytest.param(datasets.Value("binary"), lambda n: str(n).encode(), id="bytes"),
        pytest.param(datasets.Value("decimal128(10, 2)"), lambda n: __import__("decimal").Decimal(n), id="decimals"),
        pytest.param(LIST(datasets.Value("int8")), lambda n: [int(n == c) for c in range(3)], id="one-hot"),
        pytest.param(LIST(FLOATS, length=3), lambda n: [float(n == c) for c in range(3)], id="one-hot-fixed"),
        pytest.param(LIST(datasets.Value("bool")), lambda n: [n == c for c in range(3)], id="one-hot-booleans"),
        pytest.param(LIST(datasets.Value("int64")), lambda n: [n], id="lists-of-one"),
        pytest.param(LIST(LIST(datasets.Value("int64"))), lambda n: [[n]], id="nested-lists-of-one"),
        pytest.param(LIST(datasets.ClassLabel(names=["0", "1", "2"])), lambda n: [n], id="lists-of-one-class"),
    ],
)
def test_label_columns_of_other_types_are_taken_where_they_are_certain(tmp_path, kind, encode):
    source = load_source(save(tmp_path, train=split(TRAIN, kind, encode)))
    parts = (source.train, source.validation, source.test)
    shown = np.concatenate([part.images(np.arange(len(part)))[:, 0, 0, 0] // 50 for part in parts])
    assert shown.tolist() == np.concatenate([part.labels for part in parts]).tolist()


def test_booleans_are_the_classes_0_and_1(tmp_path):
    source = load_source(save(tmp_path, train=split([0, 1] * 9, datasets.Value("bool"), bool)))
    assert source.spec.class_names == ("0", "1")


@pytest.mark.parametrize(
    ("kind", "encode", "message"),
    [
        (FLOATS, lambda n: n + 0.25, "has values that are not whole numbers, such as 0.25"),
        (LIST(FLOATS), lambda n: [0.1, 0.2, 0.7], "has rows that are not one-hot .* row 0: 0.1, 0.2, 0.7"),
        (LIST(datasets.Value("int64")), lambda n: [1, 1, 0], "has rows that are not one-hot"),
        (LIST(datasets.Value("int64")), lambda n: list(range(n + 1)), "has lists of 1 to 3 labels"),
        (LIST(LIST(datasets.Value("int64"))), lambda n: [[n], [n]], "holds values of the type list"),
        (LIST(datasets.ClassLabel(names=["a", "b"])), lambda n: [0, 1], "has lists of 2 to 2 labels"),
        ({"name": datasets.Value("string")}, lambda n: {"name": str(n)}, r"holds values with several fields \(name\)"),
        (datasets.Value("timestamp[s]"), lambda n: n, r"holds values of the type timestamp"),
        (datasets.Value("int64"), lambda n: None if n == 1 else n, "has no label for 6 of 18 images .row 1 .* None"),
        (datasets.Value("string"), lambda n: "" if n == 1 else "x", "has no label for 6 of 18 images .row 1 .* ''"),
        (datasets.Value("int64"), lambda n: -n, "has no label for 12 of 18 images .row 1 .* here -"),
        (LIST(datasets.Value("int64")), lambda n: [], "has no label for 18 of 18 images .* an empty list"),
        (datasets.Value("null"), lambda n: None, "has no label for 18 of 18 images"),
    ],
)
def test_other_label_columns_are_refused_with_what_is_wrong(tmp_path, kind, encode, message):
    settings = save(tmp_path, train=split(TRAIN, kind, encode))
    with pytest.raises(SettingsError, match=rf'data.label-column = "label": the column of hub:.* {message}'):
        load_source(settings)


def encoded(number: int) -> bytes:
    import io

    file = io.BytesIO()
    picture(number).save(file, "png")
    return file.getvalue()


@pytest.mark.parametrize(
    ("kind", "encode"),
    [
        (datasets.Value("binary"), encoded),
        (datasets.Value("large_binary"), encoded),
        (
            {"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
            lambda n: {"bytes": encoded(n), "path": None},
        ),
        (datasets.Image(decode=False), lambda n: {"bytes": encoded(n), "path": None}),
    ],
)
def test_image_columns_with_the_bytes_of_files_are_read(tmp_path, kind, encode):
    rows = {"image": [encode(number) for number in TRAIN], "label": TRAIN}
    features = datasets.Features({"image": kind, "label": datasets.Value("int64")})
    source = load_source(save(tmp_path, train=datasets.Dataset.from_dict(rows, features=features)))
    seen = source.train.images(np.arange(len(source.train)))
    assert (seen[:, 0, 0, 0] // 50).tolist() == source.train.labels.tolist()


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        (datasets.Value("string"), "a.png", r"image holds Value\('string'\), but must hold one image a row"),
        (LIST(datasets.Image()), [picture(0)], r"image holds List\(Image.*but must hold one image a row"),
        (datasets.Array2D((8, 8), "uint8"), np.zeros((8, 8), np.uint8), r"image holds Array2D.*see npz:PATH"),
        ({"bytes": datasets.Value("binary"), "size": datasets.Value("int64")}, {"bytes": b"", "size": 1}, "must hold"),
        (datasets.Image(), None, r"no image in 18 of 18 rows \(row 0 is the first\)"),
        (datasets.Value("binary"), b"not an image", "cannot be read"),
    ],
)
def test_other_image_columns_are_refused_with_what_is_wrong(tmp_path, kind, value, message):
    rows = {"image": [value] * 18, "label": TRAIN}
    features = datasets.Features({"image": kind, "label": datasets.Value("int64")})
    settings = save(tmp_path, train=datasets.Dataset.from_dict(rows, features=features))
    with pytest.raises(SettingsError, match=message):
        load_source(settings.model_copy(update={"image_column": "image"}))


def test_the_log_says_in_one_line_what_was_found_and_left_out(tmp_path, caplog):
    caplog.set_level("INFO", "fedmitr.data")
    withheld = split([0, 1, 2], datasets.Value("int64"), lambda _: -1)
    settings = save(tmp_path, train=split(TRAIN, *NUMBERS), test=withheld, extra=split([0, 1], *NUMBERS))
    load_source(settings)
    load_source(archive(tmp_path, notes=np.arange(3)).model_copy(update={"classes": 2}))
    load_source(DataSettings(source="digits"))
    said = [record.getMessage() for record in caplog.records if record.name == "fedmitr.data"]
    assert said == [
        f"data.source = {settings.source}: 18 images of 3 classes (0, 1, 2), 3 channels, 8 x 8 pixels; "
        "12 training, 3 validation, 3 test; "
        "left out: the split extra (2 images), the split test (3 images without labels)",
        f"data.source = npz:{tmp_path}/x.npz: 20 images of 2 classes (0, 1), 3 channels, 8 x 8 pixels; "
        "14 training, 2 validation, 4 test; "
        "left out: the arrays notes, whose names have no meaning here, 10 images of 2, because data.classes is 2",
        "data.source = digits: 1797 images of 10 classes (0, 1, 2, 3, 4, 5 and 4 more), 1 channels, 8 x 8 pixels; "
        "1295 training, 143 validation, 359 test; left out: nothing",
    ]
