"""A source divided among sites in files: what a site reads is what a simulated client gets."""

from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from fedmitr_flwr.cli import app
from fedmitr_flwr.data import client_images, load_source
from fedmitr_flwr.launch.site_data import write_parts
from fedmitr_flwr.settings import Settings, SettingsError

SETTINGS = Settings.from_run_config({"data.source": "digits", "partition.alpha": 0.3})


def test_a_site_has_exactly_the_images_of_the_simulated_client(tmp_path: Path):
    told = write_parts(SETTINGS, 3, tmp_path)
    spec = load_source(SETTINGS.data).spec
    for client, (path, count, _) in enumerate(told):
        assert path == tmp_path / f"site-{client}" / "images.npz"
        simulated, _ = client_images(SETTINGS, {"partition-id": client, "num-partitions": 3}, None, spec=spec)
        site, site_spec = client_images(SETTINGS, {"data-path": str(path)}, None, spec=spec)
        assert site_spec == spec
        assert count == len(site) == len(simulated)
        assert np.array_equal(site.labels, simulated.labels)
        rows = np.arange(count)
        assert torch.equal(site.images(rows), simulated.images(rows))


def test_colour_survives(tmp_path: Path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "all.npz", images=pixels, label=np.arange(40) % 4)
    settings = Settings.from_run_config({"data.source": f"npz:{tmp_path}/all.npz", "partition.kind": "iid"})
    ((path, count, classes),) = write_parts(settings, 1, tmp_path)
    train = load_source(settings.data).train
    assert np.array_equal(np.load(path)["images"], train.images(np.arange(count)).permute(0, 2, 3, 1).numpy())
    assert classes == 4


def test_nothing_is_overwritten(tmp_path: Path):
    (tmp_path / "site-1").mkdir()
    (tmp_path / "site-1" / "images.npz").write_text("precious")
    with pytest.raises(SettingsError, match=r"site-1.*never overwritten"):
        write_parts(SETTINGS, 2, tmp_path)
    assert not (tmp_path / "site-0").exists()


def test_the_command_says_what_each_site_has_and_refuses_with_code_2(tmp_path: Path):
    arguments = ["split", str(tmp_path), "--clients", "2", "--set", "data.source=digits", "--set", "partition.kind=iid"]
    first = CliRunner().invoke(app, arguments)
    assert first.exit_code == 0, first.output
    assert f"{tmp_path}/site-1/images.npz: " in first.output
    assert "of 10 classes" in first.output
    assert CliRunner().invoke(app, arguments).exit_code == 2
