"""A byte that changes on the disk never becomes another model: the work is done again, or the file is named."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from fedmitr_flwr.pipeline.checkpoints import Progress
from tests.unit.federation.tiny_run import SETTINGS, install_all, resume, run_app, weights

SEED = 20
# What a resume does not read: the log, events and pictures of the run.
UNREAD = {".lock", "log.txt", "metrics.jsonl"}


class KilledError(BaseException):
    """Ends a run where a killed process would end it."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run that was cut off in the midst of distillation, and the digest of the model of the same run in one go."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        install_all(patch)
        place: dict[str, str | int | float | bool] = {**SETTINGS, "run.output": str(folder)}
        run_app({**place, "run.name": "whole"})
        written = []
        offer = Progress.offer

        def cut(self: Progress, make: object) -> None:
            offer(self, make)  # type: ignore[arg-type]
            written.append(1)
            if len(written) == 2:
                raise KilledError

        patch.setattr(Progress, "offer", cut)
        with pytest.raises(KilledError):
            run_app({**place, "run.name": "cut"})
    return folder / "cut", weights(folder / "whole")


def files(run: Path) -> list[str]:
    found = [path.relative_to(run).as_posix() for path in sorted(run.rglob("*")) if path.is_file()]
    return [name for name in found if name not in UNREAD]


def flip(path: Path, chosen: random.Random) -> str:
    """Change one byte; return where and how."""
    content = bytearray(path.read_bytes())
    # Half of the flips meet the first 300 bytes: headers are short, and most of what is not a tensor is in them.
    place = chosen.randrange(len(content) if chosen.random() < 0.5 else min(300, len(content)))
    change = chosen.randrange(1, 256)
    content[place] ^= change
    path.write_bytes(bytes(content))
    return f"byte {place} of {path.name} ^ {change:#04x}"


def outcome_after_flip(made: tuple[Path, str], name: str, chosen: random.Random, folder: Path) -> str:
    """Flip a byte of one file of a copy, resume it, and check the outcome: the same model, or the file is named."""
    cut, expected = made
    copy = folder / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(cut, copy)
    where = flip(copy / name, chosen)
    (copy / "log.txt").unlink()
    error = None
    try:
        resume(copy)
    except Exception as problem:
        error = problem
    if error is not None:
        assert Path(name).stem in str(error), f"{where}: {error!r}"
        assert not (copy / "model").exists(), where
        return "refused"
    assert weights(copy) == expected, where
    warnings = [line for line in (copy / "log.txt").read_text().splitlines() if " WARNING " in line]
    if not warnings:
        return "unchanged"
    assert any(Path(name).name in line for line in warnings), f"{where}: {warnings}"
    return "made again"


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    install_all(monkeypatch)


def test_a_run_that_is_cut_off_holds_all_kinds_of_files(made: tuple[Path, str]) -> None:
    assert files(made[0]) == [
        "checkpoints/initial.safetensors",
        "checkpoints/round-1/distill.safetensors",
        "checkpoints/round-1/inversion-000000.safetensors",
        "checkpoints/round-1/inversion-000001.safetensors",
        "config.json",
        "status.json",
        "uploads/round-1/collected.json",
        *(f"uploads/round-1/partition-{number}.safetensors" for number in range(3)),
    ]


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize(
    ("name", "outcome"),
    [
        ("checkpoints/initial.safetensors", "made again"),
        ("checkpoints/round-1/distill.safetensors", "made again"),
        ("checkpoints/round-1/inversion-000001.safetensors", "made again"),
        ("uploads/round-1/partition-1.safetensors", "refused"),
        ("uploads/round-1/collected.json", "refused"),
        ("config.json", "refused"),
    ],
)
def test_what_can_be_made_again_is_made_again_and_the_rest_is_refused(
    made: tuple[Path, str], name: str, outcome: str, tmp_path: Path
) -> None:
    chosen = random.Random(SEED)
    while (found := outcome_after_flip(made, name, chosen, tmp_path)) == "unchanged":
        assert name.endswith(".json")  # a blank that becomes another blank
    assert found == outcome


@pytest.mark.slow
@pytest.mark.usefixtures("quiet")
@pytest.mark.timeout(1800)
def test_a_flipped_byte_in_any_file_gives_the_same_model_or_a_refusal(made: tuple[Path, str], tmp_path: Path) -> None:
    chosen = random.Random(SEED)
    names = files(made[0])
    outcomes = [
        outcome_after_flip(made, name, chosen, tmp_path) for _ in range(-(-120 // len(names))) for name in names
    ]
    assert len(outcomes) >= 120
    assert set(outcomes) == {"refused", "made again", "unchanged"}
