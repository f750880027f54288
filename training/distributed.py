"""What training sends between ranks: gathered tensors that carry gradients, averaged gradients, global sums.

A loss is the mean over a rank's own rows, on tensors gathered with gradients; gradients are then averaged over the
ranks. That equals one process on the whole batch exactly, with no factor of the number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.distributed import DistributedContext, send
from models.language.captions import CaptionIds


class _AllGather(torch.autograd.Function):
    """Concatenate a tensor of every rank along dim 0; backward sums what all ranks send to this rank's slice."""

    @staticmethod
    def forward(ctx: object, local: Tensor) -> Tensor:
        parts = [torch.empty_like(local) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, local.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def gather(local: Tensor, distributed: DistributedContext) -> Tensor:
    """[b, ...] of each rank, equal shapes -> [b * ranks, ...], in order of rank. Carries gradients."""
    if distributed.size == 1:
        return local
    gathered: Tensor = _AllGather.apply(local)
    return gathered


def gather_on_host(local: Tensor, distributed: DistributedContext) -> Tensor:
    """The same for a tensor that is needed on the CPU, without gradients."""
    return local if distributed.size == 1 else gather(send(local, distributed.device), distributed).cpu()


def gather_captions(captions: CaptionIds, distributed: DistributedContext) -> CaptionIds:
    """The captions of all ranks, on the CPU, in order of rank."""
    if distributed.size == 1:
        return captions
    parts = distributed.gather_objects((captions.ids, captions.lengths))
    return CaptionIds.cat([CaptionIds(ids, lengths) for ids, lengths in parts])


def global_sum(value: Tensor, distributed: DistributedContext) -> Tensor:
    """Sum of a tensor over the ranks, without gradients."""
    total = value.detach().clone()
    if distributed.size > 1:
        dist.all_reduce(total)
    return total


def global_count(count: int, distributed: DistributedContext) -> int | Tensor:
    """Sum of a number over the ranks, at least 1: a divisor. On the device where there are several."""
    if distributed.size == 1:
        return max(1, count)
    return global_sum(send(torch.tensor(count), distributed.device), distributed).clamp(min=1)


def average_gradients(parameters: Iterable[nn.Parameter], distributed: DistributedContext) -> None:
    """Mean of the gradients over the ranks, in one transfer; a parameter without gradient counts as zero."""
    if distributed.size == 1:
        return
    parameters = list(parameters)
    flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in parameters])
    dist.all_reduce(flat)
    flat /= distributed.size
    for parameter, mean in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = mean.view_as(parameter)


def broadcast_parameters(parameters: Iterable[nn.Parameter], distributed: DistributedContext) -> None:
    """Rank 0's values on every rank."""
    if distributed.size > 1:
        for parameter in parameters:
            dist.broadcast(parameter.data, src=0)
