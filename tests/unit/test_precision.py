import pytest
import torch

from fedmitr_flwr.precision import compute_dtype

CPU = torch.device("cpu")


@pytest.mark.parametrize("amx", [False, True])
def test_auto_is_bf16_only_for_wide_models_on_a_cpu_with_matrix_units(monkeypatch, amx):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert compute_dtype("auto", 192, CPU) == (torch.bfloat16 if amx else torch.float32)
    assert compute_dtype("auto", 64, CPU) == torch.float32


def test_what_is_asked_for_is_taken():
    assert compute_dtype("bf16", 64, CPU) == torch.bfloat16
    assert compute_dtype("fp32", 768, CPU) == torch.float32
