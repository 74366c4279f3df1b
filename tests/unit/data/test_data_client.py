import numpy as np
import pytest

from fedmitr_flwr.data import ImageSpec, client_images, load_source
from fedmitr_flwr.settings import DataSettings, Settings, SettingsError
from tests.unit.data.data_fixtures import patterned, write_folder, write_npz

NAMES = ("cat", "dog", "elk")
PHOTOS = Settings(data=DataSettings(source="folder:/only/at/the/server", image_size=16))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FEDMITR_CACHE", str(tmp_path_factory.mktemp("cache")))


def test_simulated_clients_share_the_training_set_and_nothing_else():
    settings = Settings(data=DataSettings(source="digits"))
    source = load_source(settings.data)
    rows = []
    for client in range(4):
        images, spec = client_images(settings, {"partition-id": client, "num-partitions": 4}, tuple("0123456789"))
        assert spec == source.spec
        rows += images.rows.tolist()
    assert sorted(rows) == source.train.rows.tolist()


def test_a_simulated_client_may_have_no_images():
    settings = Settings(data=DataSettings(source="digits")).replace(**{"partition.alpha": 0.01})
    sizes = [len(client_images(settings, {"partition-id": k, "num-partitions": 50}, None)[0]) for k in range(50)]
    assert min(sizes) == 0


def test_a_site_maps_its_class_folders_by_name(tmp_path):
    write_folder(tmp_path, {"elk": 2, "cat": 3})
    images, spec = client_images(PHOTOS, {"data-path": str(tmp_path)}, NAMES)
    assert images.labels.tolist() == [0, 0, 0, 2, 2]
    assert spec.class_names == NAMES
    assert images.images([0, 4]).shape == (2, 3, 16, 16)


def test_a_sites_path_wins_over_its_part_of_the_source(tmp_path):
    write_folder(tmp_path, {"cat": 3})
    config = {"data-path": f"folder:{tmp_path}", "partition-id": 0, "num-partitions": 3}
    images, _ = client_images(PHOTOS, config, NAMES)
    assert images.histogram(3).tolist() == [3, 0, 0]


def test_a_site_trains_on_everything_but_its_own_test_folder(tmp_path):
    write_folder(tmp_path / "train", {"cat": 3, "dog": 2})
    write_folder(tmp_path / "test", {"cat": 4, "unheard-of": 1})
    images, _ = client_images(PHOTOS, {"data-path": str(tmp_path)}, NAMES)
    assert images.histogram(3).tolist() == [3, 2, 0]


def test_an_empty_class_folder_of_a_site_does_not_matter(tmp_path):
    write_folder(tmp_path, {"cat": 2, "unheard-of": 0})
    assert len(client_images(PHOTOS, {"data-path": str(tmp_path)}, NAMES)[0]) == 2


def test_a_site_with_an_archive_is_mapped_by_the_names_in_it(tmp_path):
    path = write_npz(tmp_path / "s.npz", per_class=(2, 3), class_names=np.array(["elk", "cat"]))
    images, spec = client_images(PHOTOS, {"data-path": str(path)}, NAMES)
    assert images.labels.tolist() == [2, 2, 0, 0, 0]
    assert images.images([0]).shape == (1, 3, spec.image_size, spec.image_size)


def test_the_log_of_a_site_says_which_images_it_uses(tmp_path, caplog):
    caplog.set_level("INFO", "fedmitr.data")
    test = np.array([True, False, False, False, True])
    path = write_npz(tmp_path / "s.npz", per_class=(2, 3), test=test, notes=np.zeros(1))
    client_images(PHOTOS, {"data-path": str(path)}, NAMES)
    assert (
        f"data-path = {path}: 3 images of 3 classes (cat, dog, elk), 3 channels, 16 x 16 pixels; 3 training; left out: "
        "the arrays notes, whose names have no meaning here, 2 images that it marks as test data"
    ) in caplog.text


def test_the_ending_of_an_archive_may_be_in_capitals(tmp_path):
    path = write_npz(tmp_path / "s.npz", per_class=(2, 3)).rename(tmp_path / "S.NPZ")
    assert len(client_images(PHOTOS, {"data-path": str(path)}, NAMES)[0]) == 5


def test_a_site_with_an_archive_without_names_is_mapped_by_number(tmp_path):
    test = np.array([True, False, False, False, True])
    path = write_npz(tmp_path / "s.npz", per_class=(2, 3), test=test)
    images, _ = client_images(PHOTOS, {"data-path": f"npz:{path}"}, NAMES)
    assert images.rows.tolist() == [1, 2, 3]
    assert images.labels.tolist() == [0, 1, 1]


def test_colour_images_of_a_site_become_grey_where_the_federation_is_grey(tmp_path):
    write_folder(tmp_path, {"7": 2})
    images, spec = client_images(Settings(), {"data-path": str(tmp_path)}, tuple("0123456789"))
    assert images.images([0, 1]).shape == (2, 1, 28, 28)
    assert images.labels.tolist() == [7, 7]
    assert spec.channels == 1


def test_the_servers_spec_rules_over_what_a_site_would_guess(tmp_path):
    path = write_npz(tmp_path / "s.npz", per_class=(2, 3))
    told = ImageSpec(NAMES, 1, 20, (0.1,), (0.2,))
    settings = Settings(data=DataSettings(source="npz:/only/at/the/server.npz"))
    images, spec = client_images(settings, {"data-path": str(path)}, None, spec=told)
    assert spec == told
    assert images.images([0]).shape == (1, 1, 20, 20)


def test_without_it_an_archive_federation_goes_by_the_sites_own_images(tmp_path):
    path = write_npz(tmp_path / "s.npz", per_class=(2, 3))
    settings = Settings(data=DataSettings(source="npz:/only/at/the/server.npz"))
    assert client_images(settings, {"data-path": str(path)}, NAMES)[1].image_size == 8


@pytest.mark.parametrize("class_names", [tuple("abcdefghij"), ("0", "1")])
def test_a_client_whose_source_has_other_classes_than_the_server_refuses(class_names):
    settings = Settings(data=DataSettings(source="digits"))
    with pytest.raises(SettingsError, match=r'data.source = "digits": differs from the server'):
        client_images(settings, {"partition-id": 0, "num-partitions": 2}, class_names)


def test_a_class_folder_that_the_federation_does_not_know_is_refused(tmp_path):
    write_folder(tmp_path, {"cat": 2, "yak": 1})
    with pytest.raises(SettingsError, match=r'data-path = ".*": .* does not have: yak; its classes are cat, dog, elk'):
        client_images(PHOTOS, {"data-path": str(tmp_path)}, NAMES)


def test_labels_beyond_the_federations_classes_are_refused(tmp_path):
    path = write_npz(tmp_path / "s.npz", per_class=(1, 1, 1, 1))
    with pytest.raises(SettingsError, match="label 3, but the federation has 3 classes"):
        client_images(PHOTOS, {"data-path": str(path)}, NAMES)


def test_images_of_other_channels_are_refused(tmp_path):
    path = write_npz(tmp_path / "s.npz", per_class=(1, 1), images=patterned(2, channels=4))
    with pytest.raises(SettingsError, match="4 channels, but the federation uses 3"):
        client_images(PHOTOS, {"data-path": str(path)}, NAMES)


def test_a_corrupt_image_of_a_site_is_named(tmp_path):
    write_folder(tmp_path, {"cat": 2})
    (tmp_path / "cat" / "1.png").write_bytes(b"broken")
    with pytest.raises(SettingsError, match=r"data-path = .*cannot read the image .*cat/1\.png"):
        client_images(PHOTOS, {"data-path": str(tmp_path)}, NAMES)


@pytest.mark.parametrize("name", ["gone", "gone.npz", "npz:gone.npz", "digits"])
def test_a_missing_site_path_is_named(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingsError, match=rf'data-path = "{name}": .*set data-path in its node config'):
        client_images(PHOTOS, {"data-path": name}, NAMES)


@pytest.mark.parametrize("config", [{}, {"partition-id": 0}, {"partition-id": 3, "num-partitions": 3}])
def test_a_node_that_does_not_know_its_part_says_what_it_needs(config):
    with pytest.raises(SettingsError, match=r"partition-id = .* needs data-path, or integers partition-id"):
        client_images(Settings(data=DataSettings(source="digits")), config, None)
