"""Who gets into a federation on hosts of a network, and what a site can reach and claim."""

import pytest

from tests.deployment.federation import CONNECTION, CONTROL, FLEET, Federation, finish, refusal
from tests.deployment.lab import BIN, SERVER_NAME, missing

pytestmark = [
    pytest.mark.deployment,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(bool(missing()), reason=missing() or "-"),
    pytest.mark.usefixtures("whole"),
]


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
    code = ("--output", "/dev/null", "--write-out", "%{http_code}")
    gate = f"{address}:{FLEET}"
    for spelling in (
        path,
        f"/{path}",
        f"/v1/fleet/../..{path}",
        f"/v1/fleet/%2e%2e/%2e%2e{path}",
        f"/v1/fleet/x?{path}",
    ):
        assert federation.lab.output("north", *fetch, *code, "--request", "POST", gate + spelling) == "403", spelling
    assert federation.lab.output("north", *fetch, *code, f"{gate}/health") == "200"
    # Past the gate there is no way from a site.
    assert federation.lab.run("north", *fetch, f"{address}:{CONTROL}/health").returncode == 28


def test_flowers_own_commands_do_nothing_from_a_site(federation: Federation):
    federation.configure("north", FLEET)
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
    assert federation.metrics("impostor")["clients"] == {
        "asked": 3,
        "accepted": 2,
        "refused": 1,
        "failed": 0,
        "empty": 0,
    }
    node = federation.nodes["south"]
    assert f"upload of node {node} refused: claims to be north, but node {node} is south in run.roster" in output
