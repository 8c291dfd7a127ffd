"""The training loss: cross entropy of the next token, where labels are.

Shape legend: B rows, T tokens, N supervised positions of all rows, D `hidden_size`, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_qwen import IGNORE_INDEX

CHUNK_LOGITS = 2**24
"""Logits that the training loss has at a time: 64 MiB in fp32, 110 positions of Qwen's vocabulary."""


def supervised_loss(logits: Tensor, targets: Tensor, num_items: Tensor | int | None = None) -> Tensor:
    """Return the cross entropy of the targets, in fp32.

    Args:
        logits: (N, V).
        targets: (N,), the next token of each position, or `IGNORE_INDEX` where no loss is taken.
        num_items: divides the sum: the supervised tokens of the whole optimizer step, over accumulation and ranks; by
            default those given here.

    Returns:
        A scalar in fp32; 0 where nothing is supervised.
    """
    total = F.cross_entropy(logits.float(), targets, ignore_index=IGNORE_INDEX, reduction="sum")
    num_items = (targets != IGNORE_INDEX).sum() if num_items is None else num_items
    return total / torch.as_tensor(num_items, device=total.device).clamp(min=1)


def head_loss(hidden: Tensor, head: nn.Linear, targets: Tensor, num_items: Tensor | int | None = None) -> Tensor:
    """Return `supervised_loss` of `head(hidden)`, without ever having all logits in memory.

    A frozen head takes its rows in chunks, and each chunk's gradient is computed at once, while its logits are
    there: no more than two chunks of logits exist at a time, and nothing is computed twice.

    Args:
        hidden: (N, D), supervised positions only.
        head: the language head (V, D); one that is trained, by LoRA too, is computed whole.
        targets: (N,), token ids.
        num_items: as in `supervised_loss`.
    """
    if type(head) is not nn.Linear or head.weight.requires_grad or head.bias is not None:  # LoRA is another type
        return supervised_loss(head(hidden), targets, num_items)
    total: Tensor = _ChunkedHeadLoss.apply(hidden, head.weight, targets)
    num_items = len(targets) if num_items is None else num_items
    return total / torch.as_tensor(num_items, device=total.device).clamp(min=1)


class _ChunkedHeadLoss(torch.autograd.Function):
    """Summed cross entropy of targets (N,) under `hidden @ weight.T`, whose weight (V, D) is frozen."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        chunk = max(1, CHUNK_LOGITS // len(weight))  # positions
        total = hidden.new_zeros((), dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden, dtype=torch.float32) if ctx.needs_input_grad[0] else None  # (N, D)
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            logits = F.linear(hidden[rows], weight)  # (chunk, V); under autocast in its dtype
            dtype, log_probabilities = logits.dtype, logits.float().log_softmax(dim=-1)
            del logits
            target = targets[rows, None]  # (chunk, 1)
            total -= log_probabilities.gather(1, target).sum()
            if grad_hidden is not None:
                grad_logits = log_probabilities.exp_()  # probabilities, less 1 at the target
                grad_logits[torch.arange(len(target), device=target.device), target[:, 0]] -= 1
                # Most entries are near 1 / V, which fp16 would round to 0 or to few bits.
                scale = 1024.0 if dtype == torch.float16 else 1.0
                grad_logits = (grad_logits * scale if scale != 1 else grad_logits).to(dtype)
                grad_hidden[rows] = (grad_logits @ weight.to(dtype)).float() / scale
        ctx.dtype = hidden.dtype
        if grad_hidden is not None:
            ctx.save_for_backward(grad_hidden)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor, None, None]:
        (grad_hidden,) = ctx.saved_tensors
        return (grad_hidden * grad_total).to(ctx.dtype), None, None
