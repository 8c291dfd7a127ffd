"""Small collectives across the processes of a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    """Return whether there are other processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def gather_rows(values: list[float], device: torch.device) -> Tensor:
    """Gather k numbers of each process on every process.

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
    """Gather an object of each process on every process, in the order of ranks."""
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def first_problem(work: Callable[[], object]) -> str:
    """Let every process do its part of writing something, and return what went wrong first.

    Returns:
        The same text on every process, once all are done; empty if all went well.
    """
    problem = ""
    try:
        work()
    except (OSError, RuntimeError) as error:  # RuntimeError: PyTorch's, for a file that it can't write
        problem = " ".join(str(error).split()) or type(error).__name__
    return next(filter(None, gather_objects(problem)), "")
