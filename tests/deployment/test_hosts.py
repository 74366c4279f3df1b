"""A federation on five hosts that are network namespaces: real Flower processes, TLS, keys, each site its own data."""

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.deployment.hosts import (
    BIN,
    CONNECTION,
    CONTROL,
    FLEET,
    SERVER_NAME,
    SITES,
    UNITS,
    Federation,
    Lab,
    missing,
    wait_for,
)
from tests.pages import ROOT, documented

pytestmark = [
    pytest.mark.deployment,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(bool(missing()), reason=missing() or "-"),
]
# So long that something can happen in the middle: more than 10 s of one core for each site.
LONG = ("train.min-steps=600", "run.min-clients=2", "run.min-fraction=0.6")


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    folder = tmp_path_factory.mktemp("lab")
    with Lab(folder / "hosts") as lab:
        federation = Federation(lab, folder / "data")
        federation.documented("operator", "certs")
        lab.output(
            "operator", "fedmitr", "split", str(federation.data), str(ROOT / "conf" / "quick.toml"), "--clients", "3"
        )
        federation.documented("server", "firewall")
        configure(federation, "operator", CONTROL)
        federation.start_server()
        federation.register("north")
        federation.register("south", north="south")
        federation.register("east", "add")
        for site in SITES:
            federation.start_site(site)
        federation.wait_online(*SITES)
        yield federation


@pytest.fixture(autouse=True)
def whole(federation: Federation) -> None:
    """Each test begins with all services up; what an earlier one ended is started again."""
    for site in SITES:
        if f"supernode-{site}" not in federation.lab.processes:
            federation.start_site(site)
    federation.wait_online(*SITES)


def configure(federation: Federation, host: str, port: int) -> None:
    """Give a host the documented configuration of Flower's commands, for a port of the server."""
    home = federation.lab.folder / host / "flower"
    home.mkdir(parents=True, exist_ok=True)
    places = {"/home/operator/federation": str(federation.pki), ":8000": f":{port}"}
    (home / "config.toml").write_text(documented("connection", **places))


def metrics(federation: Federation, name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((federation.outputs / name / "metrics.json").read_text())
    return result


def finish(process: subprocess.Popen[str], seconds: float = 900) -> tuple[int, str]:
    output, _ = process.communicate(timeout=seconds)
    return process.returncode, output


def test_the_same_result_as_in_simulation(federation: Federation, simulated: dict[str, Any]):
    with federation.running("plain") as process:
        code, output = finish(process)
    assert code == 0, output
    ours = metrics(federation, "plain")
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
    ours = metrics(federation, "leaves-1")
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
    assert metrics(federation, "cut")["clients"]["accepted"] == 3, output


def test_a_restarted_superlink_does_not_end_the_run(federation: Federation):
    with federation.running("restarted", *LONG) as process:
        federation.wait_training("north")
        federation.lab.end("superlink", children=False)
        time.sleep(5)
        federation.start_superlink()
        code, output = finish(process)
    assert code == 0, output
    assert metrics(federation, "restarted")["clients"]["accepted"] == 3, output


def test_a_site_whose_supernode_restarts_in_training_counts_as_failed(federation: Federation):
    with federation.running("supernode", *LONG, "run.deadline-seconds=240") as process:
        federation.wait_training("east")
        federation.lab.end("supernode-east")
        federation.start_site("east")
        code, output = finish(process)
    assert code == 0, output
    clients = metrics(federation, "supernode")["clients"]
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
    ours = metrics(federation, "gone")
    assert (ours["clients"]["accepted"], ours["clients"]["failed"]) == (2, 1), output
    assert 119 < ours["seconds"]["clients"] < 150


def refusal(federation: Federation, *arguments: str, host: str = "stranger") -> str:
    """Run a SuperNode that should be turned away, and return what it says."""
    result = federation.lab.run(host, "flower-supernode", "--superlink", f"{SERVER_NAME}:{FLEET}", *arguments)
    assert result.returncode != 0, result.stdout
    return " ".join(result.stdout.split())


def test_who_is_not_registered_is_told_why(federation: Federation):
    federation.documented("stranger", "own-key")
    other = federation.lab.folder / "stranger"
    federation.lab.output("stranger", "fedmitr", "certs", "other", "--name", "x")
    ca = ("--root-certificates", str(federation.pki / "ca.crt"))
    key = ("--auth-supernode-private-key", str(other / "mine" / "north" / "node.key"))
    # The codes are Flower's own words for it; docs/deployment.md has ours.
    assert "[code: 2004]" in refusal(federation, *ca, *key)
    assert "[code: 2001]" in refusal(federation, *ca)
    assert "CERTIFICATE_VERIFY_FAILED" in refusal(federation, "--root-certificates", str(other / "other/ca.crt"), *key)
    assert "Exit Code: 303" in refusal(federation, "--insecure", *key)


# Fetches the messages of a node with the key in a file; prints the answer's status.
FETCH = """
import sys
from base64 import b64encode
from pathlib import Path
import requests
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.proto.fleet_pb2 import PullMessagesRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
address, ca, key_file, node = sys.argv[1:]
key = load_ssh_private_key(Path(key_file).read_bytes(), None)
time = now().isoformat()
headers = {
    "content-type": PROTOBUF_MEDIA_TYPE,
    TIMESTAMP_HEADER: time,
    FLEET_HTTP_PUBLIC_KEY_HEADER: b64encode(public_key_to_bytes(key.public_key())).decode(),
    FLEET_HTTP_SIGNATURE_HEADER: b64encode(sign_message(key, time.encode())).decode(),
}
body = PullMessagesRequest(node=Node(node_id=int(node))).SerializeToString()
print(requests.post(f"{address}/v1/fleet/pull-messages", body, headers=headers, verify=ca, timeout=10).status_code)
"""


def test_a_key_fetches_the_messages_of_its_own_node_only(federation: Federation):
    key, ca = str(federation.pki / "south" / "node.key"), str(federation.pki / "ca.crt")
    for site, status in (("south", "200"), ("north", "401")):
        node, gate = federation.nodes[site], f"https://{SERVER_NAME}:{FLEET}"
        said = federation.lab.output("south", str(BIN / "python"), "-c", FETCH, gate, ca, key, node)
        assert said.split()[-1] == status, site


@pytest.mark.parametrize("path", ["/v1/control/list-runs", "/v1/runtime/acquire-task", "/docs", "/openapi.json", "/"])
def test_the_gate_passes_nothing_but_the_fleet_api(federation: Federation, path: str):
    address = f"https://{SERVER_NAME}"
    fetch = ("curl", "--silent", "--cacert", str(federation.pki / "ca.crt"), "--path-as-is", "--max-time", "5")
    code = ("--output", "/dev/null", "--write-out", "%{http_code}", "--request", "POST")
    gate = f"{address}:{FLEET}"
    for spelling in (
        path,
        f"/{path}",
        f"/v1/fleet/../..{path}",
        f"/v1/fleet/%2e%2e/%2e%2e{path}",
        f"/v1/fleet/x?{path}",
    ):
        assert federation.lab.output("north", *fetch, *code, gate + spelling) == "403", spelling
    assert federation.lab.output("north", *fetch, f"{gate}/health") != ""
    # Past the gate there is no way from a site.
    assert federation.lab.run("north", *fetch, f"{address}:{CONTROL}/health").returncode == 28


def test_flowers_own_commands_do_nothing_from_a_site(federation: Federation):
    configure(federation, "north", FLEET)
    result = federation.lab.run("north", "flwr", "ls", CONNECTION, "--format", "json")
    assert "403" in result.stdout or "forbidden" in result.stdout.lower(), result.stdout
    assert "run-id" not in result.stdout


def test_an_upload_under_another_sites_name_is_refused(federation: Federation):
    federation.lab.end("supernode-south")
    federation.start_site("south", name="north")
    federation.wait_online("south")
    try:
        with federation.running("impostor", "run.min-clients=2") as process:
            code, output = finish(process)
    finally:
        federation.lab.end("supernode-south")
    assert code == 0, output
    assert metrics(federation, "impostor")["clients"] == {
        "asked": 3,
        "accepted": 2,
        "refused": 1,
        "failed": 0,
        "empty": 0,
    }
    node = federation.nodes["south"]
    assert f"upload of node {node} refused: claims to be north, but node {node} is south in run.roster" in output


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd-analyze")
def test_systemd_takes_the_units(federation: Federation, tmp_path: Path):
    # All that they start is what the other tests start; here is the rest of them.
    units = [tmp_path / unit.name for unit in UNITS.glob("*.service")]
    assert len(units) == 4
    for unit in units:
        unit.write_text(federation.localised("server", (UNITS / unit.name).read_text()))
    result = subprocess.run(
        ["systemd-analyze", "verify", *map(str, units)], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stderr) == (0, "")


def test_the_servers_state_can_be_restored(federation: Federation):
    lab = federation.lab
    lab.end("superlink", children=False)
    federation.documented("server", "backup")
    (lab.folder / "server" / "lib" / "superlink.db").unlink()
    shutil.rmtree(lab.folder / "server" / "lib" / "superlink")
    federation.documented("server", "restore")
    federation.start_superlink()
    federation.wait_online(*SITES)


def test_the_servers_certificate_is_renewed_and_sites_need_nothing(federation: Federation):
    lab = federation.lab
    old = (federation.pki / "server" / "server.crt").read_text()
    federation.documented("operator", "renew")
    assert (federation.pki / "server" / "server.crt").read_text() != old
    for unit in ("gate", "serverapp", "superlink"):
        lab.end(unit)
    federation.start_server()
    presented = lab.output("north", str(BIN / "python"), "-c", CERTIFICATE, SERVER_NAME, str(FLEET))
    assert presented.strip() == (federation.pki / "server" / "server.crt").read_text().strip()
    federation.wait_online(*SITES)


CERTIFICATE = "import ssl, sys; print(ssl.get_server_certificate((sys.argv[1], int(sys.argv[2]))))"


def test_a_key_is_rotated_and_the_old_one_is_of_no_use(federation: Federation):
    lab, old = federation.lab, federation.nodes["north"]
    federation.register("north", "rotate", **{"NODE-ID": old})
    wait_for(lambda: old not in federation.online(), 60, "the old node offline")
    if "supernode-north" in lab.processes:
        lab.end("supernode-north")
    said = refusal(
        federation,
        *("--root-certificates", str(federation.pki / "ca.crt")),
        *("--auth-supernode-private-key", str(federation.pki / "north-old" / "node.key")),
        host="north",
    )
    assert "[code: 2004]" in said
    federation.start_site("north")
    federation.wait_online("north")
