import pytest
import torch

from fedmitr_flwr.ensemble.engine import precision
from fedmitr_flwr.ensemble.engine.precision import compute_dtype

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("amx", "avx512_bf16", "amd", "fast"),
    [
        (False, False, False, False),
        (True, True, False, True),
        (False, True, False, False),
        (False, True, True, True),
        (False, False, True, False),
    ],
)
def test_auto_is_bf16_only_for_wide_models_on_a_cpu_that_is_fast_at_it(monkeypatch, amx, avx512_bf16, amd, fast):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(precision, "_made_by_amd", lambda: amd)
    assert compute_dtype("auto", 192, CPU) == (torch.bfloat16 if fast else torch.float32)
    assert compute_dtype("auto", 64, CPU) == torch.float32


def test_what_is_asked_for_is_taken():
    assert compute_dtype("bf16", 64, CPU) == torch.bfloat16
    assert compute_dtype("fp32", 768, CPU) == torch.float32
