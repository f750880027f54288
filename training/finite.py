"""Losses and gradients that are not finite: they must change nothing, and end the run with one line.

Whether they are is decided where they are computed. The flag goes to the optimizer, which skips its update on the
device, and the host reads it a step later, when it costs no waiting: on a GPU, reading a value at once would leave it
idle until the next step is launched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.distributed import DistributedContext
from models.errors import UserError

from .distributed import global_sum


@dataclass(frozen=True)
class _Reading:
    """What one step gave, on its way to the host."""

    step: int
    losses: Sequence[str]
    values: Tensor
    """[losses + 1] on the CPU: ranks on which each loss was not finite, and the gradient norm."""
    arrived: torch.cuda.Event | None


class FiniteGuard:
    """Watches the steps of a run; from the first that is not finite on, no update is made."""

    def __init__(self, distributed: DistributedContext):
        self.distributed = distributed
        self.failed = torch.zeros((), device=distributed.device)
        """Scalar float32, 1 once anything was not finite: `found_inf` of a fused optimizer."""
        self._unread: _Reading | None = None

    def watch(self, step: int, losses: Mapping[str, Tensor], norm: Tensor) -> None:
        """A step's losses and gradient norm, before its update. Raises UserError if the step before was not finite."""
        values = torch.stack([loss.detach().float() for loss in losses.values()])
        broken = global_sum((~values.isfinite()).float(), self.distributed)
        self.failed = torch.maximum(self.failed, torch.maximum(broken.amax(), (~norm.isfinite()).float()))
        self.check()
        self._unread = _send_home(step, list(losses), torch.cat([broken, norm.detach().float().reshape(1)]))

    def check(self) -> None:
        """Raises UserError if the last step that was watched was not finite; waits for it."""
        if self._unread is None:
            return
        reading, self._unread = self._unread, None
        if reading.arrived is not None:
            reading.arrived.synchronize()
        *broken, norm = reading.values.numpy()
        names = [name for name, ranks in zip(reading.losses, broken, strict=True) if ranks]
        if names:
            raise UserError(
                f"step {reading.step}: the loss {' and '.join(names)} is not finite; nothing was updated, and the last "
                "checkpoint is whole. Lower training.lr, or set training.precision=float32"
            )
        if not abs(norm) < float("inf"):
            raise UserError(f"step {reading.step}: the gradient norm is {norm}; lower training.lr or use float32")


def _send_home(step: int, losses: Sequence[str], values: Tensor) -> _Reading:
    if values.device.type != "cuda":
        return _Reading(step, losses, values, None)
    home = torch.empty(values.shape, pin_memory=True)
    home.copy_(values, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return _Reading(step, losses, home, arrived)
