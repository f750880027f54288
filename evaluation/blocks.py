"""Work in fixed blocks: dealt out to the ranks, each computed the same way whoever computes it, shared afterwards.

A CPU's matrix products split their sums by the number of threads, and torchrun gives each process fewer of them: on
one and on two threads ViT-B/16 differs in the last bits, in float32 as in bfloat16. So on a CPU every block runs on
one thread, and a process runs as many blocks at a time as it has threads. On a GPU they run one behind the other.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from models.distributed import DistributedContext

Input = TypeVar("Input")
Output = TypeVar("Output")

MOST_WORKERS = 16
"""Blocks at a time on a CPU: each holds its own activations, some hundreds of megabytes."""


def blocks(total: int, size: int) -> list[slice]:
    """0 .. total - 1 in slices of `size`, the last one shorter."""
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def own_blocks(parts: list[slice], distributed: DistributedContext) -> list[slice]:
    """This rank's share: blocks are dealt out in turn."""
    return parts[distributed.rank :: distributed.size]


def share_blocks(values: Tensor, parts: list[slice], distributed: DistributedContext) -> None:
    """Give every rank the blocks of `values` that the others computed."""
    if distributed.size > 1:
        for number, part in enumerate(parts):
            dist.broadcast(values[part], src=number % distributed.size)


def run_blocks(compute: Callable[[Input], Output], inputs: Iterable[Input], device: torch.device) -> Iterator[Output]:
    """compute(input) of every input, in order, without gradients; inputs are taken as they are needed.

    `compute` must not write to anything shared: on a CPU several calls run at the same time."""
    compute = torch.inference_mode()(compute)
    if device.type != "cpu":
        yield from map(compute, inputs)
        return
    threads = torch.get_num_threads()
    workers = min(threads, MOST_WORKERS)
    pending: deque = deque()
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for item in inputs:
                pending.append(pool.submit(compute, item))
                if len(pending) > workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
    finally:
        torch.set_num_threads(threads)  # the workers' call reached threads that start later, too


def progress_bar(results: Iterable[Output], total: int, name: str, shown: bool) -> tqdm:
    """The blocks' results, counted on a bar with rate and time left."""
    return tqdm(results, total=total, desc=name, unit="block", disable=not shown, dynamic_ncols=True, leave=False)


@dataclass
class Stopwatch:
    """Wall-clock seconds by part; waits for the device, so that a part's work is counted in that part."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._wait()
        start = time.perf_counter()
        yield
        self._wait()
        self._add(name, time.perf_counter() - start)

    @contextmanager
    def divided(self, of_blocks: list[dict[str, float]]) -> Iterator[None]:
        """Time of blocks that may have run side by side: divided among their parts in proportion to the blocks' own
        seconds, which the caller collects in `of_blocks`."""
        start = time.perf_counter()
        yield
        wall = time.perf_counter() - start
        total = sum(sum(seconds.values()) for seconds in of_blocks)
        for seconds in of_blocks:
            for name, value in seconds.items():
                self._add(name, wall * value / total)

    def _add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
