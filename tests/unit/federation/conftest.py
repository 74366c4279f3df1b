"""Fixtures of several tests of the federation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fedmitr_flwr.runs.directory import RunDirectory
from tests.unit.federation.fake_federation import install


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put fakes in the place of training, waiting and the processes of Flower."""
    install(monkeypatch)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunDirectory]:
    """Open a new directory of a run."""
    with RunDirectory.create(str(tmp_path), "run") as directory:
        yield directory
