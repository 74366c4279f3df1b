"""What an administrator changes in a federation on hosts of a network: state, certificate, keys, units."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.deployment.federation import FLEET, UNITS, Federation, refusal
from tests.deployment.lab import BIN, SERVER_NAME, SITES, missing, wait_for

pytestmark = [
    pytest.mark.deployment,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(bool(missing()), reason=missing() or "-"),
    pytest.mark.usefixtures("whole"),
]


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
