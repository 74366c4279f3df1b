"""``fedmitr certs``: make the keys and certificates of a federation, without overwriting any.

A certificate authority (CA) signs the server's certificate, which TLS needs. Each site's SuperNode has a key pair: the
private key stays at the site, and the public key is registered at the SuperLink. An executor secret allows our
executors, and no other program, to fetch work from a SuperLink or a SuperNode.
"""

from __future__ import annotations

import ipaddress
import os
import re
import secrets
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedmitr_flwr.settings import SettingsError

CA_KEY, CA_CERTIFICATE = "ca.key", "ca.crt"
SERVER, SERVER_KEY, SERVER_CERTIFICATE = "server", "server.key", "server.crt"
NODE_KEY, NODE_PUBLIC_KEY = "node.key", "node.pub"
EXECUTOR_SECRET = "executor.secret"

_PRIVATE, _PUBLIC = 0o600, 0o644
_LOCAL = ("localhost", "127.0.0.1", "::1")
_CA_DAYS = 3650
# Clocks differ: a certificate that is valid from now on is not valid yet on a machine whose clock is late.
_BACKDATE = timedelta(hours=1)
_HOST_NAME = re.compile(
    r"(?=.{1,253}$)[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9])?(\.[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9])?)*", re.I
)
_SITE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def make(directory: Path, names: Sequence[str], sites: Sequence[str], days: int = 397) -> list[Path]:
    """Make the files of a server, of sites, or of both.

    Names and existing files are checked before the first file is written.

    Parameters
    ----------
    directory
        Created with mode 700 if it does not exist.
    names
        Host names and IP addresses of the server. Without any, no server certificate is made.
    sites
        Names of the sites.
    days
        Validity of the server's certificate in days.

    Returns
    -------
    list
        The files in the order in which they were made. Private files have mode 600, the others 644.

    Raises
    ------
    SettingsError
        If a name is not valid, a file exists already, only one of the CA's two files exists, or a file cannot be
        written.
    """
    if not names and not sites:
        raise SettingsError(
            ("fedmitr certs", "", "needs --name for the server's certificate, --site for a site's keys, or both")
        )
    alternatives = [_alternative(name) for name in dict.fromkeys((*names, *_LOCAL))]
    for site in sites:
        _check_site(site, sites)
    server = directory / SERVER
    wanted = [server / name for name in (SERVER_KEY, SERVER_CERTIFICATE, EXECUTOR_SECRET)] if names else []
    wanted += [directory / site / name for site in sites for name in (NODE_KEY, NODE_PUBLIC_KEY, EXECUTOR_SECRET)]
    for path in wanted:
        if path.exists():
            raise SettingsError(
                ("file", str(path), "exists already and is never overwritten; move it away to replace it")
            )
    try:
        content = _server(directory, names[0], alternatives, days) if names else {}
        for site in sites:
            content |= _site(directory / site, site)
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path, (mode, text) in content.items():
            _write(path, mode, text)
    except OSError as error:
        raise SettingsError(("DIR", str(directory), f"cannot be written: {error.strerror or error}")) from None
    return list(content)


_Content = dict[Path, tuple[int, bytes]]


def _server(directory: Path, common_name: str, alternatives: Sequence[x509.GeneralName], days: int) -> _Content:
    """Return the server's files, and those of the CA if there is none yet."""
    content: _Content = {}
    key_path, certificate_path = directory / CA_KEY, directory / CA_CERTIFICATE
    if key_path.exists() != certificate_path.exists():
        there, lacking = (key_path, CA_CERTIFICATE) if key_path.exists() else (certificate_path, CA_KEY)
        raise SettingsError(("file", str(there), f"exists without {lacking}; a server's certificate needs both"))
    if key_path.exists():
        ca_key, ca = _read_ca(key_path, certificate_path)
    else:
        ca_key = ec.generate_private_key(ec.SECP384R1())
        ca = _ca_certificate(ca_key)
        content[key_path] = (_PRIVATE, _pem(ca_key))
        content[certificate_path] = (_PUBLIC, ca.public_bytes(serialization.Encoding.PEM))
    key = ec.generate_private_key(ec.SECP256R1())
    builder = _builder(_name(common_name), ca.subject, key.public_key(), min(days, _days_left(ca, certificate_path)))
    certificate = (
        builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA384())
    )
    folder = directory / SERVER
    content[folder / SERVER_KEY] = (_PRIVATE, _pem(key))
    content[folder / SERVER_CERTIFICATE] = (_PUBLIC, certificate.public_bytes(serialization.Encoding.PEM))
    content[folder / EXECUTOR_SECRET] = (_PRIVATE, _secret())
    return content


def _ca_certificate(key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    # A random name, so that a program does not confuse a new CA with the one that it replaces.
    name = _name(f"FedMITR federation CA {secrets.token_hex(4)}")
    return (
        _builder(name, name, key.public_key(), _CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .sign(key, hashes.SHA384())
    )


def _read_ca(key_path: Path, certificate_path: Path) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    try:
        key = serialization.load_pem_private_key(key_path.read_bytes(), password=None)
        certificate = x509.load_pem_x509_certificate(certificate_path.read_bytes())
    except (ValueError, TypeError) as error:
        raise SettingsError(("file", str(key_path), f"or {certificate_path.name} cannot be read: {error}")) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise SettingsError(("file", str(key_path), f"is not the key of {certificate_path}"))
    return key, certificate


def _days_left(ca: x509.Certificate, path: Path) -> int:
    left = (ca.not_valid_after_utc - datetime.now(UTC)).days
    if left < 1:
        raise SettingsError(("file", str(path), f"expired on {ca.not_valid_after_utc:%Y-%m-%d}; make a new CA"))
    return left


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATE)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _site(folder: Path, site: str) -> _Content:
    """Return a site's files. Flower requires a key on a NIST curve, with the public key in OpenSSH's format."""
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return {
        folder / NODE_KEY: (_PRIVATE, private),
        folder / NODE_PUBLIC_KEY: (_PUBLIC, public + f" {site}\n".encode()),
        folder / EXECUTOR_SECRET: (_PRIVATE, _secret()),
    }


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _secret() -> bytes:
    """Return 32 random bytes in hexadecimal, which an editor does not change. Flower uses all bytes of the file."""
    return secrets.token_hex(32).encode()


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text[:64])])


def _alternative(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        if re.fullmatch(r"[0-9.]+", name) or not _HOST_NAME.fullmatch(name):
            allowed = "must be a host name such as fl.example.org or an IP address, without port or protocol"
            raise SettingsError(("--name", name, allowed)) from None
        return x509.DNSName(name)


def _check_site(site: str, sites: Sequence[str]) -> None:
    if site == SERVER or site in (CA_KEY, CA_CERTIFICATE) or not _SITE_NAME.fullmatch(site):
        allowed = f"must be 1 to 64 letters, digits, dots, - or _, begin with a letter or digit, and not be {SERVER!r}"
        raise SettingsError(("--site", site, allowed))
    if sites.count(site) > 1:
        raise SettingsError(("--site", site, "is given twice"))


def _write(path: Path, mode: int, content: bytes) -> None:
    """Create a file with exactly this mode. An existing file or link is an error."""
    path.parent.mkdir(mode=0o700, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        os.fchmod(descriptor, mode)
        file.write(content)
