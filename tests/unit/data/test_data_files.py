"""Files below a folder: links, rights, endings and names that are not UTF-8."""

import builtins
import logging
import os
import socket
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from fedmitr_flwr.data import ImageSpec, client_images, load_source, load_spec
from fedmitr_flwr.data.client_images import site_images
from fedmitr_flwr.data.sources.raw import Origin
from fedmitr_flwr.settings import DataSettings, Settings, SettingsError
from tests.unit.data.data_fixtures import write_folder

SPEC = ImageSpec(("cat", "dog", "elk"), 3, 8, (0.5,) * 3, (0.5,) * 3)
LATIN = os.fsdecode(b"caf\xe9")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FEDMITR_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def root(tmp_path):
    return write_folder(tmp_path / "photos", {"cat": 4, "dog": 4})


@pytest.fixture
def forbid(monkeypatch):
    """Take the rights to a path away, also from root, who has them always."""
    forbidden = set()
    listdir, stat, opened = os.listdir, os.stat, builtins.open

    def denied(path):
        if not isinstance(path, int) and Path(os.fsdecode(path)) in forbidden:
            raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "listdir", lambda path=".": denied(path) or listdir(path))
    monkeypatch.setattr(builtins, "open", lambda path, *args, **kwargs: denied(path) or opened(path, *args, **kwargs))

    def status(path, *args, **options):
        if not isinstance(path, int) and any(parent in forbidden for parent in Path(os.fsdecode(path)).parents):
            raise PermissionError(13, "Permission denied", path)
        return stat(path, *args, **options)

    monkeypatch.setattr(os, "stat", status)
    return forbidden.add


def load(path):
    return load_source(DataSettings(source=f"folder:{path}", image_size=8))


def site(path):
    return client_images(Settings(data=DataSettings(source="digits")), {"data-path": str(path)}, None, spec=SPEC)[0]


def count(source):
    return len(source.train) + len(source.validation) + len(source.test)


def refused(path, message):
    """Every reader of folders refuses this one."""
    with pytest.raises(SettingsError, match=message):
        load(path)
    with pytest.raises(SettingsError, match=message):
        site(path)
    with pytest.raises(SettingsError, match=message):
        site_images(DataSettings(source="digits"), Origin("--data", f"folder:{path}"), SPEC)


@pytest.mark.parametrize("place", ["cat/x.png", "cat/more", "elk", "cat/notes.txt"])
def test_a_link_that_leads_nowhere_is_refused(root, place):
    (root / place).symlink_to("/not/mounted")
    refused(root, f"the link .*{place} leads nowhere \\(/not/mounted does not exist\\)")


@pytest.mark.parametrize(
    ("place", "target"),
    [("cat/all", "."), ("cat/root", ".."), ("cat/up", "../.."), ("cat/self", "self"), ("cat/a/b/c", "../../../cat")],
)
def test_a_link_in_a_circle_is_refused(root, place, target):
    (root / place).parent.mkdir(parents=True, exist_ok=True)
    (root / place).symlink_to(target)
    refused(root, "leads in a circle|Too many levels of symbolic links")


def test_a_circle_of_two_links_outside_is_refused(root, tmp_path):
    other = write_folder(tmp_path / "other", {"more": 2})
    (root / "cat" / "out").symlink_to(other)
    (other / "back").symlink_to(root / "cat")
    refused(root, "leads in a circle")


def test_folders_deeper_than_the_stack_of_python_are_searched(root, monkeypatch):
    monkeypatch.chdir(root / "cat")
    for _ in range(1050):
        os.mkdir("d")
        os.chdir("d")
    Image.new("RGB", (9, 9)).save("deep.png")
    os.chdir(root)
    try:
        assert site(root).histogram(3).tolist() == [5, 4, 0]
    finally:
        subprocess.run(["rm", "-rf", root / "cat"], check=True)


def test_links_out_of_the_folder_are_followed(root, tmp_path):
    store = write_folder(tmp_path / "store", {"new": 3, "elk": 5})
    (root / "cat" / "more").symlink_to(store / "new")
    (root / "elk").symlink_to(store / "elk")
    (root / "dog" / "one.png").symlink_to(store / "new" / ".." / "elk" / ".." / ".." / "single.png")
    Image.new("RGB", (9, 9)).save(tmp_path / "single.png")
    assert site(root).histogram(3).tolist() == [7, 5, 5]
    assert count(load(root)) == 17


def test_a_file_that_its_class_has_already_counts_once(root, caplog):
    (root / "cat" / "again.png").symlink_to("0.png")
    (root / "cat" / "hard.png").hardlink_to(root / "cat" / "1.png")
    (root / "cat" / "sub").mkdir()
    (root / "dog" / "sub").symlink_to(root / "dog" / ".." / "dog2")
    write_folder(root.parent, {"photos/dog2": 1})
    (root / "dog2").rename(root.parent / "dog2")
    (root / "dog" / "sub").unlink()
    (root / "dog" / "sub").symlink_to(root.parent / "dog2")
    (root / "dog" / "sub2").symlink_to(root.parent / "dog2")
    assert site(root).histogram(3).tolist() == [4, 5, 0]
    assert "3 links to files that their class has already" in caplog.text


def test_a_file_in_two_classes_is_refused(root):
    (root / "cat" / "x.png").symlink_to("../dog/0.png")
    refused(root, "cat/x.png and .*dog/0.png are the same file in two classes")


def test_a_class_folder_that_is_a_link_to_another_is_refused(root):
    (root / "elk").symlink_to("dog")
    refused(root, "are the same file in two classes")


@pytest.mark.parametrize("hard", [True, False])
def test_a_file_in_training_and_test_is_refused(tmp_path, hard):
    root = write_folder(tmp_path / "train", {"cat": 4, "dog": 4}).parent
    write_folder(root / "test", {"cat": 1, "dog": 1})
    copy = root / "test" / "dog" / "copy.png"
    copy.hardlink_to(root / "train" / "dog" / "2.png") if hard else copy.symlink_to("../../train/dog/2.png")
    with pytest.raises(SettingsError, match=r"train/dog/2\.png and .*dog/copy\.png are the same file in two splits"):
        load(root)
    assert site(root).histogram(3).tolist() == [4, 4, 0]


def test_a_test_folder_that_is_the_training_folder_is_refused(tmp_path):
    write_folder(tmp_path / "train", {"cat": 4, "dog": 4})
    (tmp_path / "test").symlink_to("train")
    with pytest.raises(SettingsError, match="are the same file in two splits"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("forbidden", "message"),
    [
        ("cat", "photos/cat cannot be read: Permission denied"),
        ("cat/more", "photos/cat/more cannot be read: Permission denied"),
        ("cat/0.png", "photos/cat/0.png: Permission denied"),
        ("cat/picture", "photos/cat/picture cannot be read: Permission denied"),
        (".", "photos cannot be read: Permission denied"),
        ("..", "photos cannot be read: Permission denied"),
    ],
)
def test_what_may_not_be_read_is_refused(root, forbid, forbidden, message):
    write_folder(root, {"cat/more": 3})
    (root / "cat" / "1.png").rename(root / "cat" / "picture")
    forbid(Path(os.path.normpath(root / forbidden)))
    refused(root, message)


def test_a_root_that_may_not_be_entered_is_refused_for_the_spec_too(root, forbid):
    forbid(root.parent)
    with pytest.raises(SettingsError, match="Permission denied"):
        load_spec(DataSettings(source=f"folder:{root}"))


def test_a_file_name_that_is_not_utf8_is_read(root):
    (root / "cat" / "0.png").rename(root / "cat" / f"{LATIN}.png")
    assert site(root).histogram(3).tolist() == [4, 4, 0]
    (root / "cat" / f"{LATIN}.png").write_bytes(b"nothing")
    refused(root, r"cat/caf\\xe9\.png: it is damaged")


@pytest.mark.parametrize(("name", "why"), [(LATIN, "is not valid UTF-8"), ("c\x1b[31mat", "has control characters")])
def test_a_class_folder_of_such_a_name_is_refused(root, name, why):
    (root / "cat").rename(root / name)
    refused(root, why)


def test_a_folder_below_a_name_that_is_not_utf8_is_read(root):
    moved = root.rename(root.parent / LATIN)
    assert site(moved).histogram(3).tolist() == [4, 4, 0]


def test_files_are_read_by_content_and_not_by_ending(root, caplog):
    caplog.set_level(logging.INFO, "fedmitr.data")
    for number, (ending, kind) in enumerate(
        [(".gif", "GIF"), (".jfif", "JPEG"), (".avif", "AVIF"), ("", "JPEG"), (".photo", "PNG"), (".JP2", "JPEG2000")]
    ):
        Image.new("RGB", (16, 16), (number, 0, 0)).save(root / "dog" / f"new{ending}", kind)
    assert site(root).histogram(3).tolist() == [4, 10, 0]
    assert "14 images of 2 classes (8 .png, 1 .avif, 1 .gif, 1 .jfif, 1 .jp2, 1 .photo, 1 without an ending)" in (
        caplog.text
    )
    assert caplog.text.count("left out") == caplog.text.count("left out: nothing") == 1


def test_what_is_left_out_is_said_with_counts(root, caplog):
    caplog.set_level(logging.INFO, "fedmitr.data")
    for name in ("cat/1.heic", "cat/2.heic", "dog/notes.txt", "dog/noending"):
        (root / name).write_bytes(b"\0\0\0\x18ftypheic" if name.endswith("heic") else b"text")
    for name in ("loose.png", "labels.csv", "cat/.hidden.png", "cat/Thumbs.db"):
        (root / name).write_bytes(b"")
    write_folder(root / "cat", {".ipynb_checkpoints": 2, "__MACOSX": 2})
    os.mkfifo(root / "cat" / "pipe.png")
    source = load(root)
    assert count(source) == 8
    text = caplog.text
    assert "left out: 4 files that are no image that can be read (2 .heic, 1 .txt, 1 without an ending), " in text
    assert "2 files that lie in no class folder (1 .csv, 1 .png), 1 pipes, sockets or devices (cat/pipe.png)" in text
    assert "left out: 4 hidden files and folders" in text


def test_a_socket_does_not_stop_the_search(root, monkeypatch):
    monkeypatch.chdir(root / "cat")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("s.png")
        assert count(load(root)) == 8


def test_a_class_whose_files_are_all_left_out_is_refused_with_their_endings(root):
    (root / "elk").mkdir()
    for number in range(3):
        (root / "elk" / f"{number}.heic").write_bytes(b"\0\0\0\x18ftypheic")
    with pytest.raises(SettingsError, match=r"elk has no image file; its files are .* \(3 \.heic\)"):
        load(root)


@pytest.mark.parametrize(
    ("name", "content"), [("x.gif", b"GIF89a"), ("x", b"\xff\xd8\xff\xe0 cut off"), ("x.avif", b"")]
)
def test_a_damaged_file_of_a_known_kind_is_refused_and_not_left_out(root, name, content):
    (root / "cat" / name).write_bytes(content)
    refused(root, f"cannot read the image .*cat/{name}: ") if name != "x" else None


def test_a_file_of_several_pictures_is_said(root, caplog):
    frames = [Image.new("L", (16, 16), shade) for shade in (0, 100, 200)]
    frames[0].save(root / "cat" / "moving.gif", save_all=True, append_images=frames[1:])
    frames[0].save(root / "cat" / "pages.tif", save_all=True, append_images=frames[1:])
    assert count(load(root)) == 10
    assert "all but the first picture of 2 files" in caplog.text


def test_a_format_that_another_program_would_decode_is_not_opened(root):
    (root / "cat" / "x.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")
    refused(root, r"cannot read the image .*cat/x\.png: it is damaged")


def test_a_folder_that_is_changed_is_inspected_again(root):
    assert count(load(root)) == 8
    (root / "cat" / "0.png").unlink()
    (root / "cat" / "0.png").symlink_to("/not/there")
    refused(root, "leads nowhere")
