"""Runs on hosts of a network: real Flower processes, TLS, keys, each site its own data, and what can befall them."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.deployment.federation import CONNECTION, Federation, finish
from tests.deployment.lab import missing, wait_for
from tests.pages import ROOT, documented

pytestmark = [
    pytest.mark.deployment,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(bool(missing()), reason=missing() or "-"),
    pytest.mark.usefixtures("whole"),
]
# So long that something can happen in the middle: more than 10 s of one core for each site.
LONG = ("train.min-steps=1500", "run.min-clients=2", "run.min-fraction=0.6")


def test_the_same_result_as_in_simulation(federation: Federation, simulated: dict[str, Any]):
    with federation.running("plain") as process:
        code, output = finish(process)
    assert code == 0, output
    ours = federation.metrics("plain")
    assert ours["clients"] == simulated["clients"]
    assert ours["clients"]["accepted"] == 3
    assert ours["accuracy"] == pytest.approx(simulated["accuracy"], abs=0.005)
    assert f"global model        {ours['accuracy']['global']:.4f}" in output
    assert (federation.outputs / "plain" / "model" / "model.safetensors").exists()


def test_a_site_is_added_with_folders_of_images_and_the_documented_run_works(federation: Federation):
    lab = federation.lab
    federation.register("west", "add", east="west")
    images = lab.folder / "west" / "images"
    write_folder(federation.data / "site-0" / "images.npz", images, 300)
    federation.start_site("west", data=images)
    federation.wait_online("west")
    write_folder(federation.data / "site-1" / "images.npz", lab.folder / "server" / "test-images", 400)
    roster = ",".join(f"{site}={node}" for site, node in federation.nodes.items())
    places = {
        "north=3491849761794000023,south=17907860190907262098": roster,
        "/srv/test-images": str(lab.folder / "server" / "test-images"),
        "run.min-clients = 2 ": "run.min-clients = 4 ",
    }
    settings = federation.localised("server", documented("settings", **places))
    quick = (ROOT / "conf" / "quick.toml").read_text().replace("data.source", "data.image-size = 8  # ")
    (lab.folder / "operator" / "run.toml").write_text(settings + quick)
    try:
        federation.documented("operator", "run")
    finally:
        lab.end("supernode-west")
        federation.documented("operator", "remove", **{"NODE-ID": federation.nodes.pop("west")})
    ours = federation.metrics("leaves-1")
    assert ours["clients"]["accepted"] == 4
    assert ours["accuracy"]["global"] is not None
    for name in ("model", "config.json", "report.html", "synthetic.png", "log.txt"):
        assert (federation.outputs / "leaves-1" / name).exists(), name


def write_folder(archive: Path, folder: Path, count: int) -> None:
    """Turn the first images of an archive into files, in one folder a class."""
    with np.load(archive) as loaded:
        names, labels, images = loaded["class_names"], loaded["label"], loaded["images"]
    for number, (label, image) in enumerate(zip(labels[:count], images[:count], strict=True)):
        path = folder / str(names[label]) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)


def test_a_failed_run_is_told_by_the_exit_code(federation: Federation):
    with federation.running("too-few", "run.min-clients=4", "run.wait-nodes-seconds=5") as process:
        code, output = finish(process)
    assert code == 1
    assert "run.min-clients = 4" in output


def test_the_operator_can_stop_a_run(federation: Federation):
    with federation.running("stopped", "run.min-clients=4", "run.wait-nodes-seconds=300") as process:
        wait_for((federation.outputs / "stopped" / "log.txt").exists, 240, "the run")
        listed = federation.lab.output("operator", "flwr", "ls", CONNECTION, "--format", "json")
        (run,) = [run for run in json.loads(listed[listed.index("{") :])["runs"] if run["status"] == "running"]
        log = ("flwr", "log", run["run-id"], CONNECTION, "--show")
        wait_for(lambda: "[ROUND 1/1]" in federation.lab.output("operator", *log), 240, "the log at the SuperLink")
        said = federation.documented("operator", "follow", **{"RUN-ID": run["run-id"]})
        code, output = finish(process)
    assert "[ROUND 1/1]" in said
    assert code == 1
    assert f"run {run['run-id']} is finished:stopped" in output


def test_a_site_cut_off_for_20_seconds_loses_nothing(federation: Federation):
    with federation.running("cut", *LONG) as process:
        federation.wait_training("south")
        federation.lab.netns("cut", "south")
        time.sleep(20)
        federation.lab.netns("heal", "south")
        code, output = finish(process)
    assert code == 0, output
    assert federation.metrics("cut")["clients"]["accepted"] == 3, output


def test_a_restarted_superlink_does_not_end_the_run(federation: Federation):
    with federation.running("restarted", *LONG) as process:
        federation.wait_training("north")
        federation.lab.end("superlink", children=False)
        time.sleep(5)
        federation.start_superlink()
        code, output = finish(process)
    assert code == 0, output
    assert federation.metrics("restarted")["clients"]["accepted"] == 3, output


def test_a_site_whose_supernode_restarts_in_training_counts_as_failed(federation: Federation):
    with federation.running("supernode", *LONG, "run.deadline-seconds=240") as process:
        federation.wait_training("east")
        federation.lab.end("supernode-east")
        federation.start_site("east")
        code, output = finish(process)
    assert code == 0, output
    clients = federation.metrics("supernode")["clients"]
    assert clients["accepted"] + clients["failed"] == 3
    assert clients["accepted"] >= 2


def test_a_site_that_is_gone_does_not_hold_the_run_beyond_its_deadline(federation: Federation):
    # Nothing but the deadline ends this: a lost site has longer to come back.
    deadline = ("run.deadline-seconds=120", "run.wait-nodes-seconds=900")
    with federation.running("gone", *LONG, *deadline) as process:
        federation.wait_training("east")
        federation.lab.netns("cut", "east")
        try:
            code, output = finish(process)
        finally:
            federation.lab.netns("heal", "east")
    assert code == 0, output
    ours = federation.metrics("gone")
    assert (ours["clients"]["accepted"], ours["clients"]["failed"]) == (2, 1), output
    assert 119 < ours["seconds"]["clients"] < 150
