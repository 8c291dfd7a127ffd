"""What the processes of a run tell each other: whether one of them has to stop."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    """Whether there are other processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def gather_rows(values: list[float], device: torch.device) -> Tensor:
    """Let every process know the numbers of all.

    Args:
        values: k numbers of this process.
        device: where the process group computes.

    Returns:
        (processes, k) float64, on the CPU.
    """
    if not is_distributed():
        return torch.tensor([values], dtype=torch.float64)
    own = torch.tensor(values, dtype=torch.float64, device=device)
    rows = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, own)
    return torch.stack(rows).cpu()


def gather_objects(value: Any) -> list[Any]:
    """Let every process know an object of each, in the order of ranks."""
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def wait_for_all() -> None:
    """Go on when every process has come here."""
    if is_distributed():
        dist.barrier()
