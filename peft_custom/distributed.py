"""Statistics that are the same on every process."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of processes that train together; 1 where `torch.distributed` is not initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@torch.no_grad()
def reduce_mean(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Means over the processes, with one collective for all tensors together.

    Every process must pass the same shapes in the same order. Sums are taken in fp32 or wider.

    Returns:
        New tensors of the same shapes and dtypes; the given ones themselves with one process.
    """
    world = world_size()
    if world == 1 or not tensors:
        return list(tensors)
    wide = torch.float32
    for tensor in tensors:
        wide = torch.promote_types(wide, tensor.dtype)
    flat = torch.cat([tensor.detach().reshape(-1).to(wide) for tensor in tensors])
    dist.all_reduce(flat)
    flat /= world
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [
        part.view(tensor.shape).to(tensor.dtype)
        for part, tensor in zip(parts, tensors, strict=True)
    ]


@torch.no_grad()
def take_from_first(tensors: Sequence[Tensor]) -> None:
    """Overwrites the tensors by those of process 0: what a decomposition finds may differ between
    machines in its last bits."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor.detach(), src=0)
