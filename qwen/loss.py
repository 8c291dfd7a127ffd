"""The training loss: cross entropy of the next token, where labels are."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .configuration_qwen import IGNORE_INDEX


def next_token_loss(logits: Tensor, labels: Tensor, num_items: Tensor | int | None = None) -> Tensor:
    """Cross entropy in fp32 of each supervised token, given the tokens before it.

    Args:
        logits: (B, T, V); those at t predict token t + 1.
        labels: (B, T), `IGNORE_INDEX` where no loss is taken. The first position can't be predicted.
        num_items: what the sum is divided by (the supervised tokens of the whole optimizer step, over
            accumulation and ranks); by default the supervised tokens given here.

    Returns:
        A scalar in fp32; 0 where nothing is supervised.
    """
    return supervised_loss(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), num_items)


def supervised_loss(logits: Tensor, targets: Tensor, num_items: Tensor | int | None = None) -> Tensor:
    """Cross entropy in fp32 of `targets` (N,) under `logits` (N, V), summed and divided as `next_token_loss` says."""
    total = F.cross_entropy(logits.float(), targets, ignore_index=IGNORE_INDEX, reduction="sum")
    if num_items is None:
        num_items = (targets != IGNORE_INDEX).sum().clamp(min=1)
    if isinstance(num_items, Tensor):
        return total / num_items.to(total.device).clamp(min=1)
    return total / max(num_items, 1)
