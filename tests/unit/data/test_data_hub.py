from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from fedmitr_flwr.data import load_source, load_spec, partition_indices
from fedmitr_flwr.data.presets import PRESETS, find_preset
from fedmitr_flwr.settings import DataSettings, PartitionSettings, SettingsError
from tests.unit.data.data_fixtures import patterned, write_folder

CLASSES = datasets.ClassLabel(names=["cat", "dog", "elk"])


def table(count=30, image="image", label="label", kind=CLASSES, size=8, **columns):
    features = {image: datasets.Image(), label: kind, **{name: kind for name, (_, kind) in columns.items()}}
    images = [Image.fromarray(pixels) for pixels in patterned(count, size)]
    values = {name: values for name, (values, _) in columns.items()}
    labels = [row % 3 for row in range(count)]
    names = ["cat", "dog", "elk"]
    labels = [names[row] for row in labels] if getattr(kind, "dtype", "") == "string" else labels
    return datasets.Dataset.from_dict({image: images, label: labels, **values}, features=datasets.Features(features))


def save(path: Path, **splits: datasets.Dataset) -> DataSettings:
    datasets.DatasetDict(splits).save_to_disk(str(path))
    return DataSettings(source=f"hub:{path}")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
    datasets.disable_progress_bars()


@pytest.mark.parametrize("hub_id", sorted(PRESETS))
def test_every_preset_reads_a_stand_in_with_its_columns_and_splits(tmp_path, hub_id):
    preset = find_preset(hub_id)
    domain = ([["art", "photo"][row % 2] for row in range(30)], datasets.Value("string"))
    splits = {
        name: table(image=preset.image_column, label=preset.label_column, domain=domain)
        for name in (preset.train, preset.test, preset.validation)
        if name
    }
    source = load_source(save(tmp_path / hub_id, **splits))
    assert source.spec.class_names == ("cat", "dog", "elk")
    assert source.spec.image_size == preset.geometry.image_size
    assert source.spec.mean == preset.geometry.mean
    size = preset.geometry.image_size
    assert source.train.images([0, 1]).shape == (2, 3, size, size)
    assert len(source.test) == (30 if preset.test else 6)
    assert len(source.train) + len(source.validation) + len(source.test) == 30 * len(splits)


def test_presets_know_the_published_numbers():
    assert {name: (p.classes, p.geometry.image_size) for name, p in PRESETS.items()} == {
        "uoft-cs/cifar10": (10, 32),
        "uoft-cs/cifar100": (100, 32),
        "zh-plus/tiny-imagenet": (200, 64),
        "timm/mini-imagenet": (100, 224),
        "flwrlabs/office-home": (65, 224),
    }
    assert PRESETS["uoft-cs/cifar100"].label_column == "fine_label"
    assert find_preset("somebody/else") is None


def test_columns_size_and_classes_are_inferred_without_a_preset(tmp_path):
    settings = save(tmp_path / "own", train=table(image="picture", label="kind"))
    source = load_source(settings)
    assert source.spec.class_names == ("cat", "dog", "elk")
    assert (source.spec.channels, source.spec.image_size) == (3, 8)
    assert load_spec(settings) == source.spec
    pixels = source.train.images(np.arange(len(source.train)))
    assert pixels[:, 0, 0, 0].tolist() == source.train.rows.tolist()
    assert source.train.labels.tolist() == (source.train.rows % 3).tolist()


def test_images_of_many_sizes_get_the_size_of_photographs(tmp_path):
    both = datasets.concatenate_datasets([table(10, size=8), table(10, size=12)])
    assert load_spec(save(tmp_path / "own", train=both)).image_size == 224


def test_labels_may_be_strings(tmp_path):
    source = load_source(save(tmp_path / "own", train=table(kind=datasets.Value("string"))))
    assert source.spec.class_names == ("cat", "dog", "elk")
    assert source.train.labels.tolist() == (source.train.rows % 3).tolist()


def test_a_test_split_with_withheld_labels_is_not_used(tmp_path):
    withheld = table(6).cast_column("label", datasets.Value("int64")).map(lambda row: {"label": -1})
    plain = {"train": table(30), "validation": table(9)}
    plain = {name: part.cast_column("label", datasets.Value("int64")) for name, part in plain.items()}
    source = load_source(save(tmp_path / "own", **plain, test=withheld))
    assert len(source.test) == 9
    assert source.test.rows.min() == 30


def test_parquet_files_are_read_from_a_folder(tmp_path):
    table(24).to_parquet(tmp_path / "train-00000.parquet")
    table(6).to_parquet(tmp_path / "test-00000.parquet")
    source = load_source(DataSettings(source=f"hub:{tmp_path}"))
    assert len(source.test) == 6
    assert len(source.train) + len(source.validation) == 24


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["Training", "Testing"], "Testing.parquet, which `datasets` reads as training data"),
        (["TRAIN", "TEST"], "TEST.parquet, which `datasets` reads as training data"),
        (["part1", "holdout"], "holdout.parquet, which `datasets` reads as training data"),
        (["a", "VAL/b"], "VAL/b.parquet, which `datasets` reads as training data"),
        (["train", "TEST"], "TEST.parquet, which `datasets` does not read"),
        (["train", "Prueba"], "Prueba.parquet, which `datasets` does not read"),
    ],
)
def test_files_of_a_held_out_split_that_datasets_does_not_know_are_refused(tmp_path, files, said):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        table().to_parquet(tmp_path / f"{name}.parquet")
    with pytest.raises(SettingsError, match=said):
        load_source(DataSettings(source=f"hub:{tmp_path}"))


@pytest.mark.parametrize(
    ("files", "test", "left_out"),
    [
        (["train-00000-of-00001-ab1", "validation-00000-of-00001-ab2"], 30, ""),
        (["seg_train", "seg_test"], 30, ""),
        (["train", "test", "extra"], 30, "left out: 1 files that `datasets` does not read (extra.parquet)"),
        (["train"], 3, ""),
    ],
)
def test_files_of_splits_that_datasets_knows_are_read(tmp_path, caplog, files, test, left_out):
    for name in files:
        table().to_parquet(tmp_path / f"{name}.parquet")
    assert len(load_source(DataSettings(source=f"hub:{tmp_path}", test_fraction=0.1)).test) == test
    assert (left_out or "{") in caplog.text + "{"


def test_a_card_may_put_any_file_into_any_split(tmp_path):
    for name in ("TEST", "other"):
        table().to_parquet(tmp_path / f"{name}.parquet")
    lines = ["---", "configs:", "- config_name: default", "  data_files:"]
    lines += ["  - {split: train, path: other.parquet}", "  - {split: test, path: TEST.parquet}", "---", "A card."]
    (tmp_path / "README.md").write_text("\n".join(lines))
    assert len(load_source(DataSettings(source=f"hub:{tmp_path}")).test) == 30


@pytest.mark.parametrize(
    ("splits", "test", "validation"),
    [
        (["training", "testing"], 12, None),
        (["seg_train", "seg_test"], 12, None),
        (["train", "eval"], 12, None),
        (["train", "dev", "holdout"], 12, 15),
        (["train", "valid", "testing"], 15, None),
    ],
)
def test_splits_of_other_names_are_found_by_their_words(tmp_path, splits, test, validation):
    sizes = {"valid": 15, "dev": 15}
    tables = {name: table(sizes.get(name, 12 if place else 30)) for place, name in enumerate(splits)}
    source = load_source(save(tmp_path, **tables))
    assert len(source.test) == test
    assert validation in (None, len(source.validation))
    assert len(source.train) + (len(source.validation) if validation is None else 0) == 30


def test_a_domain_column_divides_the_clients(tmp_path):
    kind = datasets.ClassLabel(names=["Art", "Clipart", "Product"])
    domain = ([row // 10 for row in range(30)], kind)
    source = load_source(save(tmp_path / "flwrlabs/office-home", train=table(domain=domain)))
    parts = partition_indices(source.train, PartitionSettings(kind="natural"), 3)
    assert [np.unique(source.train.columns["domain"][part]).tolist() for part in parts] == [
        ["Art"],
        ["Clipart"],
        ["Product"],
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_column": "img"}, r'data.image-column = "img": .* image columns are: image \(all: image, label\)'),
        ({"image_column": "label"}, r'data.image-column = "label": must be an image column'),
        ({"label_column": "fine"}, r'data.label-column = "fine": .* its columns are: image, label'),
        ({"label_column": "image"}, r'data.label-column = "image": must be the label column'),
    ],
)
def test_a_missing_column_is_named_with_those_that_exist(tmp_path, changes, message):
    settings = save(tmp_path / "own", train=table()).model_copy(update=changes)
    with pytest.raises(SettingsError, match=message):
        load_source(settings)


def test_a_label_column_that_cannot_be_told_is_asked_for(tmp_path):
    other = datasets.ClassLabel(names=["x", "y", "z"])
    settings = save(tmp_path / "own", train=table(label="fine", coarse=([0] * 30, other)))
    with pytest.raises(SettingsError, match=r'data.label-column = "": .* image, fine, coarse'):
        load_source(settings)
    assert load_source(settings.model_copy(update={"label_column": "fine"})).spec.num_classes == 3


def test_more_classes_than_the_dataset_has_are_refused(tmp_path):
    settings = save(tmp_path / "own", train=table()).model_copy(update={"classes": 4})
    with pytest.raises(SettingsError, match=r"data.classes = 4: .* 3"):
        load_source(settings)


def test_a_dataset_without_a_training_split_is_refused(tmp_path):
    with pytest.raises(SettingsError, match="no split 'train'; its splits are: test"):
        load_source(save(tmp_path / "own", test=table()))


def test_a_corrupt_image_is_named_by_its_source(tmp_path):
    encoded = table(12, image="img").cast_column("img", datasets.Image(decode=False))
    bytes_of = [row["img"]["bytes"] for row in encoded]

    def broken(rows):
        cells = [{"bytes": b"no" if row in rows else bytes_of[row], "path": None} for row in range(12)]
        changed = encoded.remove_columns("img").add_column("img", cells)
        return save(tmp_path / f"{len(rows)}/uoft-cs/cifar10", train=changed, test=encoded)

    message = r'data.source = "hub:.*": an image among the rows \[.*\] cannot be read: it is damaged'
    with pytest.raises(SettingsError, match=message):
        load_source(broken(range(12)))
    source = load_source(broken([2]))  # row 2 is not among those that are decoded when a dataset is opened
    assert source.test.images([0]).shape == (1, 3, 32, 32)
    with pytest.raises(SettingsError, match=message):
        source.train.reader.read(np.array([2]), 3, 32)


def test_a_split_with_other_columns_is_named(tmp_path):
    settings = save(tmp_path / "own", train=table(), test=table(6, label="target"))
    with pytest.raises(
        SettingsError,
        match=r'data.label-column = "label": must be a column of the split .test.; .*: image, t',
    ):
        load_source(settings)


@pytest.mark.parametrize("error", [ConnectionError("cannot reach the Hub"), FileNotFoundError("no such dataset")])
def test_a_network_failure_says_what_to_do(monkeypatch, error):
    def fail(*_args, **_kwargs):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(SettingsError, match=r'data.source = "hub:a/b": cannot be loaded .*network, or use hub:PATH'):
        load_source(DataSettings(source="hub:a/b"))


def test_a_preset_gives_the_spec_without_the_data_when_the_classes_are_named(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", pytest.fail)
    named = DataSettings(source="hub:uoft-cs/cifar10", classes=2, class_names="airplane,automobile")
    assert load_spec(named).image_size == 32
    with pytest.raises(SettingsError, match=r"data.class-names = .* must name 10 classes, but names 2"):
        load_spec(named.model_copy(update={"classes": 0}))


def test_a_missing_local_copy_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", pytest.fail)
    with pytest.raises(SettingsError, match=r"the folder .*gone does not exist"):
        load_source(DataSettings(source=f"hub:{tmp_path}/gone"))


def test_a_folder_of_image_files_has_as_a_dataset_what_it_has_as_a_folder(tmp_path):
    write_folder(tmp_path / "seg_train", {"cat": 4, "dog": 4})
    write_folder(tmp_path / "seg_test", {"cat": 2, "dog": 1})
    sources = [load_source(DataSettings(source=f"{kind}:{tmp_path}", image_size=8)) for kind in ("hub", "folder")]
    for source in sources:
        assert source.test.histogram(2).tolist() == [2, 1]
        assert source.train.histogram(2).sum() + source.validation.histogram(2).sum() == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: (root / "test").rename(root / "Holdout"), "0 test .* are 8 training images, 4 test"),
        (lambda root: (root / "train/cat/0.png").rename(root / "train/cat/0"), "7 training images, .* are 8 training"),
        (lambda root: (root / "train/cat/x.png").symlink_to("/not/there"), "leads nowhere"),
        (lambda root: (root / "train/cat/all").symlink_to("."), "leads in a circle"),
        (lambda root: (root / "test/cat/x.png").symlink_to("../../train/cat/0.png"), "the same file in two splits"),
    ],
)
def test_a_folder_in_which_datasets_overlooks_something_is_refused(tmp_path, change, message):
    write_folder(tmp_path / "train", {"cat": 4, "dog": 4})
    write_folder(tmp_path / "test", {"cat": 2, "dog": 2})
    change(tmp_path)
    with pytest.raises(SettingsError, match=message):
        load_source(DataSettings(source=f"hub:{tmp_path}", image_size=8))


def test_the_log_says_that_only_the_first_of_several_pictures_is_read(tmp_path, caplog):
    first, other = (Image.fromarray(pixels) for pixels in patterned(2))
    first.save(tmp_path / "x.gif", save_all=True, append_images=[other])
    rows = {"image": [{"bytes": (tmp_path / "x.gif").read_bytes(), "path": None}] * 12, "label": [0, 1, 2] * 4}
    kinds = datasets.Features({"image": datasets.Image(), "label": CLASSES})
    load_source(save(tmp_path / "saved", train=datasets.Dataset.from_dict(rows, features=kinds)))
    assert "left out: all but the first picture of images with several" in caplog.text
