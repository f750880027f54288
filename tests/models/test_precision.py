import pytest
import torch

from models.errors import UserError
from models.precision import dtype_name, fastest_dtype, resolve_precision


@pytest.mark.parametrize("supported, expected", [(True, torch.bfloat16), (False, torch.float32)])
def test_a_cpu_computes_in_bfloat16_where_it_has_the_instructions(supported, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: supported)
    assert fastest_dtype("cpu") == expected
    assert resolve_precision("auto", torch.device("cpu")) == expected


@pytest.mark.parametrize("supported, expected", [(True, torch.bfloat16), (False, torch.float32)])
def test_a_gpu_computes_in_bfloat16_where_the_card_has_it(supported, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    assert fastest_dtype("cuda:1") == expected


def test_a_device_of_another_kind_computes_in_float32():
    assert fastest_dtype("mps") == torch.float32


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_a_named_precision_is_taken_whatever_the_device_has(name, monkeypatch):
    for supported in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=supported: has)
        assert dtype_name(resolve_precision(name, "cpu")) == name


def test_an_unknown_precision_is_named():
    with pytest.raises(UserError, match="precision is 'float16'; expected one of auto, float32, bfloat16"):
        resolve_precision("float16", "cpu")
