"""Dynamic NTK and log-n attention, for prompts past the trained length. Training uses neither."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def ntk_alpha(attention_mask: Tensor | None, num_keys: int, seq_length: int) -> Tensor | None:
    """Return the dynamic NTK factor of each row, from its true length n: max(2^ceil(log2(n / seq_length) + 1) - 1, 1).

    Returns:
        (B,) in fp32, or None where no row can be past `seq_length`: 1 for all of them.
    """
    if num_keys <= seq_length:
        return None
    if attention_mask is None or attention_mask.dim() != 2:
        lengths = torch.tensor([num_keys], dtype=torch.float64)
    else:
        lengths = attention_mask.sum(-1).clamp(min=1).double()
    exponent = torch.ceil(torch.log2(lengths / seq_length) + 1)
    return (2.0**exponent - 1).clamp(min=1).float()


def log_n_scale(position_ids: Tensor, seq_length: int) -> Tensor:
    """Return the log-n factors max(1, log(p + 1) / log(seq_length)), (B, 1, T, 1) in fp32, of 0-based p (B, T)."""
    factors = (position_ids.double() + 1).log() / math.log(seq_length)
    return factors.clamp(min=1).float()[:, None, :, None]
