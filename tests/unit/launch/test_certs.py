"""Keys and certificates of a federation: do they work, who may read them, is anything ever overwritten."""

import ipaddress
import socket
import ssl
import threading
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key
from flwr.supercore.primitives.asymmetric import uses_nist_ec_curve
from typer.testing import CliRunner

from fedmitr_flwr.cli import app
from fedmitr_flwr.launch.certs import make
from fedmitr_flwr.settings import SettingsError


def _mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def _handshake(folder: Path, ca: Path, name: str) -> str:
    """Connect with TLS to a server that has the folder's certificate; return the error, or nothing."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(folder / "server" / "server.crt", folder / "server" / "server.key")
    near, far = socket.socketpair()

    def serve() -> None:
        try:
            with server.wrap_socket(far, server_side=True):
                pass
        except (ssl.SSLError, OSError):
            far.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with ssl.create_default_context(cafile=ca).wrap_socket(near, server_hostname=name):
            return ""
    except ssl.SSLError as error:
        return str(error)
    finally:
        near.close()
        thread.join()


def test_a_client_with_the_ca_accepts_the_server_under_every_name_and_no_other(tmp_path: Path):
    make(tmp_path / "pki", ["fl.example.org", "superlink", "10.0.0.5", "2001:db8::1"], [])
    ca = tmp_path / "pki" / "ca.crt"
    for name in ("fl.example.org", "superlink", "10.0.0.5", "2001:db8::1", "localhost", "127.0.0.1"):
        assert _handshake(tmp_path / "pki", ca, name) == ""
    assert "Hostname mismatch" in _handshake(tmp_path / "pki", ca, "other.example.org")


def test_the_wrong_ca_is_refused(tmp_path: Path):
    make(tmp_path / "ours", ["fl.example.org"], [])
    make(tmp_path / "theirs", ["fl.example.org"], [])
    assert "CERTIFICATE_VERIFY_FAILED" in _handshake(
        tmp_path / "ours", tmp_path / "theirs" / "ca.crt", "fl.example.org"
    )


def test_private_files_are_for_the_owner_alone(tmp_path: Path):
    made = make(tmp_path / "pki", ["fl.example.org"], ["north"])
    public = {"ca.crt", "server.crt", "node.pub"}
    assert {path.name for path in made} == public | {"ca.key", "server.key", "node.key", "executor.secret"}
    assert [path for path in made if _mode(path) != (0o644 if path.name in public else 0o600)] == []
    assert {_mode(folder) for folder in (tmp_path / "pki", *(tmp_path / "pki").glob("*/"))} == {0o700}


def test_a_site_key_is_what_flower_registers(tmp_path: Path):
    make(tmp_path, [], ["north", "south"])
    public = load_ssh_public_key((tmp_path / "north" / "node.pub").read_bytes())
    private = load_ssh_private_key((tmp_path / "north" / "node.key").read_bytes(), password=None)
    assert isinstance(public, ec.EllipticCurvePublicKey)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    assert uses_nist_ec_curve(public)
    assert private.public_key() == public
    assert (tmp_path / "north" / "node.pub").read_text().endswith(" north\n")
    contents = _files(tmp_path)
    assert len(set(contents.values())) == len(contents)  # nothing is shared between sites
    assert not (tmp_path / "ca.key").exists()


def test_a_new_certificate_and_new_sites_join_the_same_ca(tmp_path: Path):
    make(tmp_path, ["old.example.org"], ["north"])
    before = _files(tmp_path)
    (tmp_path / "server").rename(tmp_path / "server-old")
    make(tmp_path, ["new.example.org"], ["south"])
    after = _files(tmp_path)
    assert {name: after[name] for name in before if "server" not in name} == {
        name: text for name, text in before.items() if "server" not in name
    }
    assert after["server/server.crt"] != before["server/server.crt"]
    assert _handshake(tmp_path, tmp_path / "ca.crt", "new.example.org") == ""


@pytest.mark.parametrize(
    ("names", "sites", "there"),
    [(["fl.example.org"], ["south"], "server/server.key"), ([], ["south", "north"], "north/node.key")],
)
def test_nothing_is_overwritten_and_nothing_made_by_half(
    tmp_path: Path, names: list[str], sites: list[str], there: str
):
    make(tmp_path, ["fl.example.org"], ["north"])
    before = _files(tmp_path)
    with pytest.raises(SettingsError, match=f"{there}.*never overwritten"):
        make(tmp_path, names, sites)
    assert _files(tmp_path) == before


def test_half_a_ca_is_not_silently_replaced(tmp_path: Path):
    make(tmp_path, ["fl.example.org"], [])
    (tmp_path / "server").rename(tmp_path / "old")
    (tmp_path / "ca.key").unlink()
    with pytest.raises(SettingsError, match=r"ca\.crt.*without ca\.key"):
        make(tmp_path, ["fl.example.org"], [])


def test_a_key_of_another_ca_is_found_out(tmp_path: Path):
    make(tmp_path / "a", ["fl.example.org"], [])
    make(tmp_path / "b", ["fl.example.org"], [])
    (tmp_path / "a" / "ca.key").write_bytes((tmp_path / "b" / "ca.key").read_bytes())
    (tmp_path / "a" / "server").rename(tmp_path / "old")
    with pytest.raises(SettingsError, match="is not the key of"):
        make(tmp_path / "a", ["fl.example.org"], [])


@pytest.mark.parametrize("name", ["https://fl.example.org", "fl.example.org:8000", "10.0.0.256", "a b", "", "-a"])
def test_a_bad_server_name_is_named(tmp_path: Path, name: str):
    with pytest.raises(SettingsError, match="--name"):
        make(tmp_path / "pki", [name], [])
    assert not (tmp_path / "pki").exists()


@pytest.mark.parametrize("site", ["../north", "server", "", "north/1", ".north", "ca.key"])
def test_a_bad_site_name_is_named(tmp_path: Path, site: str):
    with pytest.raises(SettingsError, match="--site"):
        make(tmp_path / "pki", [], [site])
    assert not (tmp_path / "pki").exists()


def test_the_certificate_lasts_as_long_as_asked_and_is_for_servers_only(tmp_path: Path):
    make(tmp_path, ["10.0.0.5"], [], days=30)
    certificate = x509.load_pem_x509_certificate((tmp_path / "server" / "server.crt").read_bytes())
    assert 29 <= (certificate.not_valid_after_utc - certificate.not_valid_before_utc).days <= 30
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    alternatives = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert ipaddress.ip_address("10.0.0.5") in alternatives.get_values_for_type(x509.IPAddress)


def test_the_command_prints_what_it_made_and_refuses_with_code_2(tmp_path: Path):
    arguments = ["certs", str(tmp_path / "pki"), "--name", "fl.example.org", "--site", "north"]
    first = CliRunner().invoke(app, arguments)
    assert first.exit_code == 0, first.output
    assert str(tmp_path / "pki" / "north" / "node.pub") in first.output.splitlines()
    second = CliRunner().invoke(app, arguments)
    assert second.exit_code == 2
    assert "never overwritten" in second.output
    assert CliRunner().invoke(app, ["certs", str(tmp_path / "none")]).exit_code == 2


def test_an_unwritable_place_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match="cannot be written"):
        make(tmp_path / "file", [], ["north"])
