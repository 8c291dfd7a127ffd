"""The gate of QWen's MLP, which keeps two tensors for the backward pass, not three."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(value, gate)
        return F.silu(gate).mul_(value)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        value, gate = ctx.saved_tensors
        by_value = F.silu(gate).mul_(gradient)
        return by_value, torch.ops.aten.silu_backward(gradient * value, gate)


def gated(value: Tensor, gate: Tensor) -> Tensor:
    """`value * silu(gate)`, both of one shape and dtype. silu is computed again in the backward pass, not kept."""
    out: Tensor = _Gated.apply(value, gate)
    return out
