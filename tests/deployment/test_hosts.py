"""A federation on five hosts that are network namespaces: real Flower processes, TLS, keys, each site its own data."""

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.deployment.hosts import (
    BIN,
    CONNECTION,
    CONTROL,
    FLEET,
    ROOT,
    SITES,
    UNITS,
    Federation,
    Lab,
    missing,
    wait_for,
)

pytestmark = [
    pytest.mark.deployment,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(missing()), reason=missing() or "-"),
]
# So long that something can happen in the middle: about 20 s of one core for each site.
LONG = ("train.min-steps=1000", "run.min-clients=2", "run.min-fraction=0.6")


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    folder = tmp_path_factory.mktemp("lab")
    pki, data = folder / "pki", folder / "data"
    with Lab(folder / "hosts") as lab:
        federation = Federation(lab, pki, data, folder / "outputs")
        sites = [part for site in SITES for part in ("--site", site)]
        lab.output("server", "fedmitr", "certs", str(pki), "--name", lab.address("server"), *sites)
        lab.output("operator", "fedmitr", "split", str(data), str(ROOT / "conf" / "quick.toml"), "--clients", "3")
        # As in the firewall table of docs/deployment.md: the SuperLink itself is for the operator alone.
        rule = ("INPUT", "--protocol", "tcp", "--dport", str(CONTROL), "!", "--source", lab.address("operator"))
        lab.output("server", "iptables", "--append", *rule, "!", "--in-interface", "lo", "--jump", "DROP")
        for host in ("operator", "stranger"):
            configure(federation, host, f"{lab.address('server')}:{CONTROL}", pki / "ca.crt")
        federation.start_server()
        for site in SITES:
            federation.nodes[site] = federation.register(site)
            federation.start_site(site)
        federation.wait_online(*SITES)
        yield federation


@pytest.fixture(autouse=True)
def whole(federation: Federation) -> None:
    """Each test begins with all services up; what an earlier one ended is started again."""
    for site in SITES:
        if f"supernode-{site}" not in federation.lab.processes:
            federation.start_site(site)
    federation.wait_online(*SITES, seconds=120)


def configure(federation: Federation, host: str, address: str, ca: Path) -> None:
    home = federation.lab.folder / host / "flower"
    home.mkdir(parents=True, exist_ok=True)
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\naddress = "{address}"\n'
        f'root-certificates = "{ca}"\n'
    )


def metrics(federation: Federation, name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((federation.outputs / name / "metrics.json").read_text())
    return result


def finish(process: subprocess.Popen[str], seconds: float = 300) -> tuple[int, str]:
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


def test_a_failed_run_is_told_by_the_exit_code(federation: Federation):
    with federation.running("too-few", "run.min-clients=4", "run.wait-nodes-seconds=5") as process:
        code, output = finish(process)
    assert code == 1
    assert "run.min-clients = 4" in output


def test_the_operator_can_stop_a_run(federation: Federation):
    with federation.running("stopped", "run.min-clients=4", "run.wait-nodes-seconds=300") as process:
        wait_for((federation.outputs / "stopped" / "log.txt").exists, 90, "the run")
        listed = federation.lab.output("operator", "flwr", "ls", CONNECTION, "--format", "json")
        (run,) = [run for run in json.loads(listed[listed.index("{") :])["runs"] if run["status"] == "running"]
        federation.lab.output("operator", "flwr", "stop", run["run-id"], CONNECTION)
        code, output = finish(process)
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
    with federation.running("supernode", *LONG, "run.deadline-seconds=120") as process:
        federation.wait_training("east")
        federation.lab.end("supernode-east")
        federation.start_site("east")
        code, output = finish(process)
    assert code == 0, output
    clients = metrics(federation, "supernode")["clients"]
    assert clients["accepted"] + clients["failed"] == 3
    assert clients["accepted"] >= 2


def test_a_site_that_is_gone_does_not_hold_the_run_beyond_its_deadline(federation: Federation):
    start = time.monotonic()
    with federation.running("gone", *LONG, "run.deadline-seconds=100") as process:
        federation.wait_training("east")
        federation.lab.netns("cut", "east")
        try:
            code, output = finish(process)
        finally:
            federation.lab.netns("heal", "east")
    assert code == 0, output
    clients = metrics(federation, "gone")["clients"]
    assert (clients["accepted"], clients["failed"]) == (2, 1), output
    assert time.monotonic() - start < 100 + 60


def refusal(federation: Federation, *arguments: str, host: str = "stranger") -> str:
    """Run a SuperNode that should be turned away, and return what it says."""
    command = ("flower-supernode", "--superlink", f"{federation.lab.address('server')}:{FLEET}", *arguments)
    result = federation.lab.run(host, *command, timeout=60)
    assert result.returncode != 0, result.stdout
    return " ".join(result.stdout.split())


def test_who_is_not_registered_is_told_why(federation: Federation, tmp_path: Path):
    subprocess.run([str(BIN / "fedmitr"), "certs", str(tmp_path / "pki"), "--name", "x", "--site", "x"], check=True)
    ca = ("--root-certificates", str(federation.pki / "ca.crt"))
    key = ("--auth-supernode-private-key", str(tmp_path / "pki" / "x" / "node.key"))
    # The codes are Flower's own words for it; docs/deployment.md has ours.
    assert "[code: 2004]" in refusal(federation, *ca, *key)
    assert "[code: 2001]" in refusal(federation, *ca)
    assert "CERTIFICATE_VERIFY_FAILED" in refusal(
        federation, "--root-certificates", str(tmp_path / "pki" / "ca.crt"), *key
    )
    assert "Exit Code: 303" in refusal(federation, "--insecure", *key)


@pytest.mark.parametrize("path", ["/v1/control/list-runs", "/v1/runtime/acquire-task", "/docs", "/openapi.json", "/"])
def test_the_gate_passes_nothing_but_the_fleet_api(federation: Federation, path: str):
    address = f"https://{federation.lab.address('server')}"
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
    ca = federation.pki / "ca.crt"
    configure(federation, "north", f"{federation.lab.address('server')}:{FLEET}", ca)
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


def test_the_servers_state_can_be_restored(federation: Federation, tmp_path: Path):
    state = federation.lab.folder / "server" / "lib"
    federation.lab.end("superlink", children=False)
    shutil.copytree(state, tmp_path / "backup")
    shutil.rmtree(state)
    shutil.copytree(tmp_path / "backup", state)
    federation.start_superlink()
    federation.wait_online(*SITES)


def test_a_removed_site_stays_out_and_a_new_key_comes_in(federation: Federation):
    lab = federation.lab
    lab.output("operator", "flwr", "supernode", "unregister", federation.nodes["east"], CONNECTION)
    wait_for(lambda: federation.nodes["east"] not in federation.online(), 60, "east offline")
    if "supernode-east" in lab.processes:
        lab.end("supernode-east")
    said = refusal(
        federation,
        *("--root-certificates", str(federation.pki / "ca.crt")),
        *("--auth-supernode-private-key", str(federation.pki / "east" / "node.key")),
        host="east",
    )
    assert "[code: 2004]" in said
    (federation.pki / "east").rename(federation.pki / "east-old")
    lab.output("east", "fedmitr", "certs", str(federation.pki), "--site", "east")
    federation.nodes["east"] = federation.register("east")
    federation.start_site("east")
    federation.wait_online("east")
