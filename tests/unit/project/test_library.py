"""The library as others use it: its public names, its types, its examples."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import fedmitr_flwr

ROOT = Path(__file__).resolve().parents[3]


def python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.parametrize("name", [name for name in fedmitr_flwr.__all__ if name != "__version__"])
def test_every_public_name_is_there_and_described(name: str) -> None:
    assert getattr(fedmitr_flwr, name).__doc__
    assert name in dir(fedmitr_flwr)


def test_a_wrong_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nonesuch'"):
        _ = fedmitr_flwr.nonesuch  # type: ignore[attr-defined]


def test_importing_the_library_imports_neither_torch_nor_flower(tmp_path: Path) -> None:
    program = "import sys, fedmitr_flwr; sys.exit('torch' in sys.modules or 'flwr' in sys.modules)"
    assert python("-c", program, cwd=tmp_path).returncode == 0


@pytest.mark.slow
def test_type_checkers_see_the_public_names(tmp_path: Path) -> None:
    pytest.importorskip("mypy", reason="mypy is not installed")
    assert (ROOT / "fedmitr_flwr" / "py.typed").is_file()
    (tmp_path / "user.py").write_text(
        "import fedmitr_flwr as fm\n"
        "def use(settings: fm.Settings) -> fm.Upload:\n"
        "    return fm.Upload({}, settings.run.seed, None)\n"
        "reveal_type(fm.Upload({}, 1, None).num_examples)\n"
        "fm.Upload({}, 'one', None)\n"
    )
    arguments = ["-m", "mypy", "--follow-imports=silent", "--ignore-missing-imports", "user.py"]
    result = python(*arguments, "--cache-dir", str(ROOT / ".mypy_cache"), cwd=tmp_path)
    assert 'Revealed type is "int"' in result.stdout, result.stdout + result.stderr
    assert 'has incompatible type "str"' in result.stdout
    assert "Found 1 error in 1 file" in result.stdout


def test_example_inverts_a_timm_model(tmp_path: Path) -> None:
    result = python(str(ROOT / "examples" / "invert_timm_model.py"), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "7 of 16 patches inverted to the end" in result.stdout
    assert (tmp_path / "inverted.png").stat().st_size > 500


def test_example_runs_the_pipeline_on_state_dicts(tmp_path: Path) -> None:
    result = python(str(ROOT / "examples" / "pipeline_on_state_dicts.py"), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    rates = {line.split()[0]: float(line.split()[1]) for line in result.stdout.splitlines()[-4:]}
    assert rates.keys() == {"local_mean", "fedavg", "ensemble", "global"}
    assert rates["global"] > rates["local_mean"]


@pytest.mark.integration
def test_example_uses_the_strategy_in_an_app_of_one_s_own(tmp_path: Path) -> None:
    from fedmitr_flwr.launch.private_flower import PrivateFlower

    with PrivateFlower() as flower:
        environment = {**flower.environment, "PYTHONPATH": str(ROOT)}
        command = ["flwr", "run", str(ROOT / "examples" / "own-flower-app"), "--stream"]
        process = subprocess.run(
            [*command, "--run-config", f"output='{tmp_path}'", "--federation-config", "num-supernodes=2"],
            cwd=flower.cwd,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    assert (tmp_path / "own" / "model" / "model.safetensors").is_file(), process.stdout + process.stderr
