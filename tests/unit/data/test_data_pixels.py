"""Images of more than 8 bits, and images that EXIF data turns: the same pixels in every reader, or a refusal."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from fedmitr_flwr.data import ImageSpec, client_images, load_source
from fedmitr_flwr.data.client_images import site_images
from fedmitr_flwr.data.sources.decode import fit_image, open_image
from fedmitr_flwr.data.sources.raw import Origin
from fedmitr_flwr.results.finished_model import read_images
from fedmitr_flwr.settings import DataSettings, Settings, SettingsError
from tests.unit.data.data_fixtures import png16, tiff

RAMP = np.tile(np.linspace(0, 1, 64), (64, 1))
COLOURS = np.stack([RAMP, RAMP[:, ::-1], RAMP], -1)
SPEC = ImageSpec(("a", "b"), 3, 16, (0.5,) * 3, (0.5,) * 3)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FEDMITR_CACHE", str(tmp_path_factory.mktemp("cache")))


def bits16(values, white=65535):
    return np.round(values * white).astype(np.uint16)


def opaque(values):
    return np.concatenate([values, np.full((*values.shape[:2], 1), 65535, np.uint16)], -1)


def packed12(values):
    pairs = zip(values.ravel()[::2].tolist(), values.ravel()[1::2].tolist(), strict=True)
    return b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in pairs)


def pnm(kind, white, values):
    return f"{kind} 64 64 {white}\n".encode() + values.astype(">u2").tobytes()


# Each writes a ramp from black to white whose values say what white is.
TAKEN = {
    "16-bits.png": lambda path: png16(path, bits16(RAMP)),
    "16-bit-colours.png": lambda path: png16(path, bits16(COLOURS)),
    "16-bit-colours-with-alpha.png": lambda path: png16(path, opaque(bits16(COLOURS))),
    "16-bits.tif": lambda path: tiff(path, bits16(RAMP)),
    "16-bit-colours.tif": lambda path: tiff(path, bits16(COLOURS)),
    "16-bit-colours-deflated.tif": lambda path: tiff(path, bits16(COLOURS), deflate=True),
    "16-bits-in-32.tif": lambda path: tiff(path, (RAMP * 65535).astype(np.int32)),
    "16-bits-in-unsigned-32.tif": lambda path: tiff(path, (RAMP * 65535).astype(np.uint32)),
    "packed-12.tif": lambda path: tiff(path, bits16(RAMP), bits=12, content=packed12(bits16(RAMP, 4095))),
    "float-0-1.tif": lambda path: tiff(path, RAMP.astype(np.float32)),
    "float-0-255.tif": lambda path: tiff(path, (255 * RAMP).astype(np.float32)),
    "float-0-65535.tif": lambda path: tiff(path, (65535 * RAMP).astype(np.float32), deflate=True),
    "16-bits.pgm": lambda path: path.write_bytes(pnm("P5", 65535, bits16(RAMP))),
    "12-bits.pgm": lambda path: path.write_bytes(pnm("P5", 4095, bits16(RAMP, 4095))),
    "12-bit-colours.ppm": lambda path: path.write_bytes(pnm("P6", 4095, bits16(COLOURS, 4095))),
    "8-bits.png": lambda path: Image.fromarray((255 * RAMP).astype(np.uint8)).save(path),
}
DARK = "have no value above {}, so the value of white is not known"
REFUSED = {
    "12-bits.png": (lambda path: png16(path, bits16(RAMP, 4095)), DARK.format(4095)),
    "8-bits-in-16.tif": (lambda path: tiff(path, bits16(RAMP, 255)), DARK.format(255)),
    "8-bits-in-32.tif": (lambda path: tiff(path, (RAMP * 255).astype(np.int32)), DARK.format(255)),
    "12-bit-colours.png": (lambda path: png16(path, bits16(COLOURS, 4095)), DARK.format(4095)),
    "12-bit-grey-and-alpha.png": (lambda path: png16(path, opaque(bits16(RAMP, 4095)[..., None])), DARK.format(4095)),
    "12-bit-colours-and-alpha.png": (lambda path: png16(path, opaque(bits16(COLOURS, 4095))), DARK.format(4095)),
    "12-bit-colours.tif": (lambda path: tiff(path, bits16(COLOURS, 4095)), DARK.format(4095)),
    "12-bit-colours-deflated.tif": (lambda path: tiff(path, bits16(COLOURS, 4095), deflate=True), DARK.format(4095)),
    "12-bits-in-16.ppm": (lambda path: path.write_bytes(pnm("P6", 65535, bits16(COLOURS, 4095))), DARK.format(4351)),
    "12-bits-in-16.pgm": (lambda path: path.write_bytes(pnm("P5", 65535, bits16(RAMP, 4095))), DARK.format(4095)),
    "signed-16.tif": (lambda path: tiff(path, (RAMP * 65534 - 32767).astype(np.int16)), "it has the value -32767"),
    "signed-16-from-0.tif": (lambda path: tiff(path, (RAMP * 32767).astype(np.int16)), DARK.format(32767)),
    "signed-8.tif": (lambda path: tiff(path, (RAMP * 127).astype(np.int8)), "pixels with a sign are not supported"),
    "signed-32.tif": (lambda path: tiff(path, (RAMP * 2**31 - 1).astype(np.int32)), "values must be from 0 to 65535"),
    "planes.tif": (lambda path: tiff(path, bits16(COLOURS), planes=True), "separate planes is not supported"),
    "0-is-white.tif": (lambda path: tiff(path, bits16(RAMP), white_is_zero=True), "in which 0 is white"),
    "float-0-4095.tif": (lambda path: tiff(path, (4095 * RAMP).astype(np.float32)), "floating-point images is 4095"),
    "float-0-0.2.tif": (lambda path: tiff(path, (RAMP / 5).astype(np.float32)), "floating-point images is 0.2"),
    "float--1-1.tif": (lambda path: tiff(path, (2 * RAMP - 1).astype(np.float32)), "it has the value -1"),
    "float-nan.tif": (lambda path: tiff(path, (RAMP / RAMP).astype(np.float32)), "values that are not finite"),
    "float-colours.tif": (lambda path: tiff(path, COLOURS.astype(np.float32)), "kind of pixels that Pillow does not"),
    "float-64.tif": (lambda path: tiff(path, RAMP), "kind of pixels that Pillow does not"),
    "lab.tif": (lambda path: Image.new("LAB", (64, 64)).save(path), "pixels of the kind LAB"),
}


def write_source(root, name, write):
    for label in ("a", "b"):
        (root / label).mkdir(parents=True)
        for number in range(3):
            write(root / label / f"{number}-{name}")
    return root


def readers(root):
    """The pixels of the first image by every reader of files."""
    data = DataSettings(source=f"folder:{root}", image_size=16)
    source = load_source(data)
    first = source.train.reader.paths[source.train.rows[0]]
    site, _ = client_images(Settings(data=DataSettings(source="digits")), {"data-path": str(root)}, None, spec=SPEC)
    evaluated = site_images(data, Origin("--data", f"folder:{root}"), SPEC)
    yield source.train.images([0])[0]
    yield site.images([site.reader.paths.index(first)])[0]
    yield evaluated.images([evaluated.reader.paths.index(first)])[0]
    yield read_images([first], SPEC)[0]


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("name", TAKEN)
def test_a_ramp_stays_a_ramp_in_every_reader(tmp_path, name):
    write_source(tmp_path, name, TAKEN[name])
    expected = np.linspace(8, 247, 16)
    for pixels in readers(tmp_path):
        row = pixels.float().mean(1).numpy()
        assert np.abs(row[0] - expected).max() < 3
        assert np.abs(row[1] - (expected[::-1] if "colours" in name else expected)).max() < 3


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("name", REFUSED)
def test_a_ramp_that_would_be_another_is_refused_by_every_reader(tmp_path, name):
    write, message = REFUSED[name]
    write_source(tmp_path, name, write)
    data = DataSettings(source=f"folder:{tmp_path}", image_size=16)
    with pytest.raises(SettingsError, match=message):
        load_source(data)
    with pytest.raises(SettingsError, match=message):
        client_images(Settings(data=DataSettings(source="digits")), {"data-path": str(tmp_path)}, None, spec=SPEC)
    with pytest.raises(SettingsError, match=message):
        site_images(data, Origin("--data", f"folder:{tmp_path}"), SPEC)
    with pytest.raises(SettingsError, match=message):
        read_images([tmp_path / "a" / f"0-{name}"], SPEC)


def test_one_bright_image_of_a_source_decides_for_the_dark_ones(tmp_path):
    write_source(tmp_path, "dark.png", lambda path: png16(path, bits16(RAMP, 5000)))
    png16(tmp_path / "b" / "bright.png", bits16(COLOURS))
    source = load_source(DataSettings(source=f"folder:{tmp_path}", image_size=16))
    dark = [row for row, path in enumerate(source.train.reader.paths) if path.name != "bright.png"]
    assert source.train.reader.read(np.array(dark[:1]), 1, 16).max() == 5000 // 256 - 1
    pixels = read_images([tmp_path / "a" / "0-dark.png", tmp_path / "b" / "bright.png"], SPEC)
    assert [int(image.max()) for image in pixels] == [18, 247]


def test_the_value_of_white_is_known_again_from_the_cache(tmp_path, monkeypatch):
    from fedmitr_flwr.data.sources import folder

    write_source(tmp_path, "dark.png", lambda path: png16(path, bits16(RAMP, 4095)))
    clock = iter(range(100))
    monkeypatch.setattr(folder.time, "monotonic", lambda: float(next(clock)))
    data = DataSettings(source=f"folder:{tmp_path}", image_size=16)
    for _ in range(2):
        with pytest.raises(SettingsError, match=DARK.format(4095)):
            load_source(data)
        monkeypatch.setattr(folder, "inspect_files", pytest.fail)


def test_an_image_alone_is_refused_if_its_white_is_not_known(tmp_path):
    with (
        open_image(png16(tmp_path / "x.png", bits16(RAMP, 4095))) as image,
        pytest.raises(ValueError, match="no value"),
    ):
        fit_image(image, 1, 16)


def photograph(path, orientation, kind):
    """An upright picture with four different quarters, stored as its EXIF data says."""
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:16, :16], pixels[:16, 16:], pixels[16:, :16] = 255, 160, 80
    stored = {
        1: lambda image: image,
        2: lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: lambda image: image.transpose(Image.Transpose.ROTATE_180),
        4: lambda image: image.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: lambda image: image.transpose(Image.Transpose.TRANSPOSE),
        6: lambda image: image.transpose(Image.Transpose.ROTATE_90),
        7: lambda image: image.transpose(Image.Transpose.TRANSVERSE),
        8: lambda image: image.transpose(Image.Transpose.ROTATE_270),
    }[orientation](Image.fromarray(pixels))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(path, kind, exif=exif, **({"quality": 95} if kind == "JPEG" else {}))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("kind", "ending"), [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"), ("TIFF", "tif")])
def test_exif_data_turns_an_image_in_every_reader(tmp_path, orientation, kind, ending):
    write_source(tmp_path, f"photo.{ending}", lambda path: photograph(path, orientation, kind))
    for pixels in readers(tmp_path):
        quarters = [int(pixels[:, y, x].float().mean()) for y in (4, 12) for x in (4, 12)]
        assert np.abs(np.array(quarters) - [255, 160, 80, 0]).max() < 6


def save_table(root, files):
    """Save files as a Hub dataset: half of them are of class a."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = {"image": [str(path) for path in files], "label": [2 * row // len(files) for row in range(len(files))]}
    datasets.DatasetDict(train=datasets.Dataset.from_dict(rows, features=features)).save_to_disk(root)
    return DataSettings(source=f"hub:{root}", image_size=16)


def saved_photograph(path, size):
    photograph(path, 6, "JPEG")
    with Image.open(path) as image:
        image.resize((size, size)).save(path, exif=image.getexif(), quality=95)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("photo.jpg", lambda path: saved_photograph(path, 32)),
        ("large-photo.jpg", lambda path: saved_photograph(path, 500)),
        *((name, TAKEN[name]) for name in ("16-bits.png", "16-bit-colours.png", "float-0-1.tif", "12-bits.pgm")),
    ],
)
def test_a_hub_dataset_gives_the_pixels_of_the_folder(tmp_path, name, write):
    write_source(tmp_path / "photos", name, write)
    files = sorted((tmp_path / "photos").rglob("*.*"))
    table = load_source(save_table(tmp_path / "table", files)).train
    folder = load_source(DataSettings(source=f"folder:{tmp_path / 'photos'}", image_size=16)).train
    assert (table.reader.read(table.rows, 3, 16) == folder.reader.read(folder.rows, 3, 16)).all()


@pytest.mark.parametrize("name", ["12-bits.png", "12-bit-colours.png", "8-bits-in-32.tif", "float-nan.tif"])
@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_hub_dataset_whose_white_is_not_known_is_refused(tmp_path, name):
    write, message = REFUSED[name]
    write_source(tmp_path / "photos", name, write)
    files = sorted((tmp_path / "photos").rglob("*.*"))
    with pytest.raises(SettingsError, match=f'data.source = "hub:.*{message}'):
        load_source(save_table(tmp_path / "table", files))


def test_a_dark_image_of_a_hub_dataset_is_read_as_the_bright_ones(tmp_path):
    files = [png16(tmp_path / f"{row}.png", bits16(COLOURS, 65535 if row == 5 else 5000)) for row in range(6)]
    source = load_source(save_table(tmp_path / "table", files))
    assert source.train.reader.read(np.array([0, 5]), 3, 16).amax((1, 2, 3)).tolist() == [18, 247]


@pytest.mark.parametrize("value", [0, 9, 42])
def test_an_orientation_that_means_nothing_changes_nothing(value):
    stream = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = value
    Image.fromarray((255 * RAMP).astype(np.uint8)).save(stream, "JPEG", exif=exif)
    with open_image(stream) as image:
        assert (np.diff(fit_image(image, 1, 16)[0, 0].astype(int)) > 0).all()


def test_damaged_exif_data_does_not_matter():
    stream = io.BytesIO()
    Image.fromarray((255 * RAMP).astype(np.uint8)).save(stream, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01")
    with open_image(stream) as image:
        assert (np.diff(fit_image(image, 1, 16)[0, 0].astype(int)) > 0).all()


def with_clear(path, *values):
    """Add the chunk to a PNG of 16 bits that makes one value transparent."""
    content = path.read_bytes()
    chunk = b"tRNS" + struct.pack(f">{len(values)}H", *values)
    chunk = struct.pack(">I", 2 * len(values)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    place = content.index(b"IDAT") - 4
    path.write_bytes(content[:place] + chunk + content[place:])
    return path


def test_the_transparent_value_of_16_bits_becomes_white_and_no_other(tmp_path):
    grey = np.array([[0, 0x1234], [0x1235, 65535]], np.uint16).repeat(8, 0).repeat(8, 1)
    for channels in (1, 3):
        with open_image(with_clear(png16(tmp_path / "grey.png", grey), 0x1234)) as image:
            found = fit_image(image, channels, 16)
        assert (found[:, ::8, ::8] == [[0, 255], [0x12, 255]]).all()
    colours = np.zeros((16, 16, 3), np.uint16)
    colours[:8, 8:], colours[8:] = (0x1200, 0x3400, 0x5600), 65535
    with open_image(with_clear(png16(tmp_path / "colours.png", colours), 0x1200, 0x3400, 0x5600)) as image:
        found = fit_image(image, 3, 16)
    assert (found[:, ::8, ::8] == [[0, 255], [255, 255]]).all()
