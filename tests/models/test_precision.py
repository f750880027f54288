import pytest
import torch

from models import precision
from models.precision import fastest_dtype


@pytest.fixture(autouse=True)
def fresh_probe():
    precision._probe_cpu.cache_clear()
    yield
    precision._probe_cpu.cache_clear()


@pytest.mark.parametrize(
    "bfloat16_seconds, expected", [(0.5, torch.bfloat16), (0.9, torch.float32), (4.0, torch.float32)]
)
def test_bfloat16_is_chosen_only_where_it_is_clearly_faster(bfloat16_seconds, expected, monkeypatch):
    seconds = {torch.float32: 1.0, torch.bfloat16: bfloat16_seconds}
    monkeypatch.setattr(precision, "_seconds", lambda x, up, down: seconds[x.dtype])
    assert fastest_dtype("cpu") == expected


@pytest.mark.parametrize("bfloat16_seconds, tried", [(1.5, {128, 1024}), (4.0, {128})])
def test_where_few_rows_are_slow_already_many_are_not_tried(bfloat16_seconds, tried, monkeypatch):
    rows = []
    seconds = {torch.float32: 1.0, torch.bfloat16: bfloat16_seconds}
    monkeypatch.setattr(precision, "_seconds", lambda x, up, down: rows.append(len(x)) or seconds[x.dtype])
    assert fastest_dtype("cpu") == torch.float32
    assert {*rows} == tried


def test_the_probe_runs_once():
    assert fastest_dtype("cpu") == fastest_dtype(torch.device("cpu"))
    assert precision._probe_cpu.cache_info().misses == 1


def test_the_probe_leaves_the_random_state_alone():
    state = torch.get_rng_state()
    fastest_dtype("cpu")
    assert torch.equal(torch.get_rng_state(), state)
