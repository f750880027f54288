"""Blocks are computed alike by any number of threads and processes, each exactly once and in order."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F

from evaluation.blocks import Stopwatch, blocks, own_blocks, run_blocks
from models.distributed import DistributedContext

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("size", [1, 3, 2])
def test_every_block_belongs_to_exactly_one_rank(size):
    parts = blocks(total=23, size=4)
    assert [i for part in parts for i in range(23)[part]] == list(range(23))
    dealt = [part for rank in range(size) for part in own_blocks(parts, DistributedContext(rank, size))]
    assert sorted(dealt, key=lambda part: part.start) == parts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows, inner, outer", [(100, 1536, 384), (197, 3072, 768), (1, 768, 512)])
def test_a_block_is_computed_alike_by_any_number_of_threads(dtype, rows, inner, outer):
    """Sizes at which a plain product differs in the last bits between one thread and two, on some CPUs."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outer, inner, generator=generator).to(dtype)
    inputs = [torch.randn(rows, inner, generator=generator).to(dtype) for _ in range(3)]
    by_threads = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        by_threads.append(torch.stack(list(run_blocks(lambda x: F.linear(x, weight), inputs, CPU))))
    assert torch.equal(by_threads[0], by_threads[1]) and torch.equal(by_threads[0], by_threads[2])


def test_results_come_in_the_order_of_the_inputs_and_threads_are_as_before():
    torch.set_num_threads(4)
    second_is_done = threading.Event()

    def first_ends_after_second(number: int) -> tuple[int, int, bool]:
        if number == 0:
            assert second_is_done.wait(timeout=600), "blocks do not run side by side"
        elif number == 1:
            second_is_done.set()
        return number, torch.get_num_threads(), torch.is_inference_mode_enabled()

    assert list(run_blocks(first_ends_after_second, range(20), CPU)) == [(number, 1, True) for number in range(20)]
    assert torch.get_num_threads() == 4


def test_an_error_in_a_block_reaches_the_caller():
    torch.set_num_threads(2)
    with pytest.raises(ZeroDivisionError):
        list(run_blocks(lambda number: 1 // number, [1, 0, 1], CPU))
    assert torch.get_num_threads() == 2


def test_inputs_are_taken_as_they_are_needed():
    torch.set_num_threads(2)
    taken = []

    def inputs():
        for number in range(50):
            taken.append(number)
            yield number

    results = run_blocks(lambda number: number, inputs(), CPU)
    next(results)
    assert len(taken) <= 4
    results.close()


def test_time_of_blocks_side_by_side_adds_up_to_the_wall_clock(monkeypatch):
    watch, seconds = Stopwatch(CPU, {"backbone": 1.0}), []
    monkeypatch.setattr("evaluation.blocks.time.perf_counter", iter([100.0, 102.0]).__next__)
    with watch.divided(seconds):
        seconds += [{"backbone": 3.0, "compress": 1.0}, {"backbone": 3.0, "compress": 1.0}]
    assert watch.seconds == {"backbone": 1.0 + 1.5, "compress": 0.5}
