"""The processes of a run: one, or several under torchrun (gloo on CPU, NCCL on GPU)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import UserError, one_line

T = TypeVar("T")


@dataclass(frozen=True)
class DistributedContext:
    """This process among those of the run. `DistributedContext()` is a run of one process."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The body on the main rank, then on the others, who find what it wrote or fetched for all of them."""
        if not self.is_main:
            self.barrier()
        yield
        if self.is_main:
            self.barrier()

    def agree(self, value: T) -> T:
        """The main rank's value, on every rank: for choices that machines of different kinds would make differently."""
        return self.gather_objects(value)[0]

    def gather_objects(self, value: T) -> list[T]:
        """One picklable value from every rank, in order of rank, on every rank."""
        if self.size == 1:
            return [value]
        values: list[T] = [value] * self.size
        dist.all_gather_object(values, value)
        return values


def pick_device(name: str | torch.device = "auto") -> torch.device:
    """`auto` is cuda where there is one, else cpu. Raises UserError for a device that is not there."""
    if name != "auto":
        if not isinstance(name, str | torch.device):
            raise UserError(f"device is {name!r}; expected auto, cpu, cuda or cuda:1")
        try:
            torch.empty(0, device=name)
            return torch.device(name)
        except (RuntimeError, AssertionError) as error:  # AssertionError: a torch that was built without CUDA
            raise UserError(f"device is {name!r}, which torch cannot use here ({one_line(error)})") from None
    return (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    )


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`. From a CPU to a GPU through pinned memory, so that neither waits for the other."""
    if tensor.device.type != "cpu" or device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def share_threads(device: torch.device, processes: int = 1) -> None:
    """Torch's threads on the CPU for one of a machine's `processes`.

    Beside a GPU only small tensors are left, and there a team of threads waits for its last member: with 16 of them and
    6 busy loader workers, any() of 65,536 booleans took 26 ms on an H100's host, and a training step 160 ms, of which
    the GPU worked 39."""
    torch.set_num_threads(1 if device.type == "cuda" else max(1, (os.cpu_count() or 1) // processes))


@contextmanager
def process_group(device: str = "auto") -> Iterator[DistributedContext]:
    """Join the process group that torchrun announces in the environment; without torchrun, a run of one process.

    Threads are shared out among the processes of a machine; torchrun's own default is one thread each."""
    chosen = pick_device(device)
    if "RANK" not in os.environ:
        if chosen.type == "cuda":
            share_threads(chosen)
        yield DistributedContext(device=chosen)
        return
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    share_threads(chosen, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield DistributedContext(rank=dist.get_rank(), size=dist.get_world_size(), device=chosen)
    finally:
        dist.destroy_process_group()
