"""A digest of the code, by which server and clients find out whether they run the same code.

They may not: sites can have installed another version, and Flower's Ray workers can import another project's
``client_app``, because the working directory of the SuperLink is first on their ``sys.path``.
"""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("fedmitr_flwr", "client_app", "server_app")


class CodeMismatchError(RuntimeError):
    """Server and client run different code."""


def code_digest() -> str:
    """Return the SHA-256 of the names and contents of all Python files of the three packages, as imported here.

    Raises
    ------
    RuntimeError
        If a package is not found as a folder.
    """
    digest = hashlib.sha256()
    for package in PACKAGES:
        folder = package_folder(package)
        for path in sorted(folder.rglob("*.py"), key=lambda path: path.relative_to(folder).as_posix()):
            if path.name.startswith("test_"):
                continue  # `flwr build` drops them from the bundle
            content = path.read_bytes()
            name = f"{package}/{path.relative_to(folder).as_posix()}"
            digest.update(f"{name}\0{len(content)}\0".encode())
            digest.update(content)
    return digest.hexdigest()


def package_folder(package: str) -> Path:
    """Return the folder from which this process imports a package."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError(f"cannot find the code of {package} to compute its digest")
    return Path(next(iter(spec.submodule_search_locations)))


def check_digest(expected: str) -> str:
    """Return the digest of the code here, if it equals the server's.

    Raises
    ------
    CodeMismatchError
        If it differs. The message names both digests and the folders from which the code here was imported.
    """
    own = code_digest()
    if own != expected:
        folders = ", ".join(str(package_folder(package)) for package in PACKAGES)
        raise CodeMismatchError(
            f"code mismatch: the server runs {short(expected)}, this client runs {short(own)}, "
            f"imported from {folders}. "
            "Install the server's version here; in a simulation, start the SuperLink in another directory "
            "or use `fedmitr simulate`."
        )
    return own


def short(digest: str) -> str:
    """Return the first twelve characters of a digest, which are enough to tell versions apart."""
    return digest[:12]
