"""Positions: rotary embedding, its stretching past the trained length, log-n attention, and the attention mask.

Shape legend: B rows, T tokens of this call, K keys (cached tokens and T), H heads, C channels of one head, R
rotary channels.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Rotation(NamedTuple):
    """The positions of one call, as every layer needs them."""

    cos: Tensor
    """(B or 1, 1, T, R) in fp32."""
    sin: Tensor
    """(B or 1, 1, T, R) in fp32."""
    query_scale: Tensor | None
    """(B or 1, 1, T, 1) log-n factors in fp32; None where all of them are 1."""


def position_ids_of(attention_mask: Tensor | None, num_past: int, num_tokens: int, device: torch.device) -> Tensor:
    """Count positions from 0 in every row, leaving padding out.

    Args:
        attention_mask: (B, K) with 0 for padding, or None.
        num_past: tokens that are cached already.
        num_tokens: T.
        device: of the result, if there is no mask.

    Returns:
        (B, T), or (1, T) without a mask. Padding before a row gets position 0.
    """
    if attention_mask is None or attention_mask.dim() != 2:
        return torch.arange(num_past, num_past + num_tokens, device=device)[None]
    positions = attention_mask.long().cumsum(-1) - 1  # (B, K)
    return positions.clamp(min=0)[:, -num_tokens:]


def ntk_alpha(attention_mask: Tensor | None, num_keys: int, seq_length: int) -> Tensor | None:
    """Return the dynamic NTK factor of each row, from its true length n: max(2^ceil(log2(n / seq_length) + 1) - 1, 1).

    Returns:
        (B,) in fp32, or None where it is 1 for certain (no row can be past `seq_length`).
    """
    if num_keys <= seq_length:
        return None
    if attention_mask is None or attention_mask.dim() != 2:
        lengths = torch.tensor([num_keys], dtype=torch.float64)
    else:
        lengths = attention_mask.sum(-1).clamp(min=1).double()
    exponent = torch.ceil(torch.log2(lengths / seq_length) + 1)
    return (2.0**exponent - 1).clamp(min=1).float()


def rotary_tables(position_ids: Tensor, dim: int, base: float, alpha: Tensor | None) -> tuple[Tensor, Tensor]:
    """Compute the cosines and sines of the rotary embedding (https://arxiv.org/abs/2104.09864), in fp32.

    Args:
        position_ids: (B, T).
        dim: R, the channels that are turned; even.
        base: base of the frequencies.
        alpha: (B,) factors by which dynamic NTK stretches the base to `base * alpha ** (R / (R - 2))`; None: 1.

    Returns:
        Two tensors (B, 1, T, R); the second half of the channels repeats the first.
    """
    device = position_ids.device
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim  # (R / 2)
    bases = torch.full((1, 1), float(base), device=device)
    if alpha is not None and dim > 2:
        bases = bases * alpha.to(device)[:, None] ** (dim / (dim - 2))
    frequencies = 1.0 / bases**exponents  # (B or 1, R / 2)
    angles = position_ids[:, :, None].float() * frequencies[:, None, :]  # (B, T, R / 2); bf16 is wrong past 256
    angles = torch.cat((angles, angles), dim=-1)[:, None]  # (B, 1, T, R)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn the first R channels of `x` (B, H, T, C), the first half of them against the second; others pass."""
    cos, sin = rotation.cos, rotation.sin
    dim = cos.shape[-1]
    turned, passed = x[..., :dim].float(), x[..., dim:]
    lower, upper = turned.chunk(2, dim=-1)  # (B, H, T, R / 2): channel i turns against channel i + R / 2
    turned = turned * cos + torch.cat((-upper, lower), dim=-1) * sin
    return torch.cat((turned.to(x.dtype), passed), dim=-1) if passed.shape[-1] else turned.to(x.dtype)


def log_n_scale(position_ids: Tensor, seq_length: int) -> Tensor:
    """Return the log-n factors max(1, log(p + 1) / log(seq_length)) of queries at 0-based positions p.

    Args:
        position_ids: (B, T).
        seq_length: trained context, in tokens.

    Returns:
        (B, 1, T, 1) in fp32.
    """
    factors = (position_ids.double() + 1).log() / math.log(seq_length)
    return factors.clamp(min=1).float()[:, None, :, None]


def attention_mask_4d(
    attention_mask: Tensor | None, num_rows: int, num_tokens: int, num_keys: int, device: torch.device
) -> Tensor | None:
    """Say which keys each query may see: those before it that are no padding, and itself.

    No mask is made where plain causal attention does the same: without padding, and with padding after the real
    tokens only (nothing before it can see it).

    Args:
        attention_mask: (B, K) with 0 for padding, or None; or (B, 1, T, K), True where a key may be seen, or in
            floating point to be added to the scores: 0 where a key may be seen, very low elsewhere.
        num_rows: B.
        num_tokens: T.
        num_keys: K.
        device: of the result.

    Returns:
        Booleans (B or 1, 1, T, K), or None for plain causal attention.

    Raises:
        ValueError: if the mask has another shape.
    """
    if attention_mask is not None:
        if attention_mask.dim() == 4 and attention_mask.is_floating_point():
            attention_mask = attention_mask == 0
        attention_mask = attention_mask.to(device=device, dtype=torch.bool)
        if attention_mask.dim() == 4:
            return attention_mask
        if tuple(attention_mask.shape) != (num_rows, num_keys):
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}, expected ({num_rows}, {num_keys}): "
                "one entry for each row and each key, those in the cache included"
            )
        if _causal_is_enough(attention_mask, num_tokens, num_keys):
            attention_mask = None
    if attention_mask is None and num_tokens in (1, num_keys):
        return None
    # (1, 1, T, K): query t is key K - T + t
    visible = torch.ones(num_tokens, num_keys, dtype=torch.bool, device=device).tril(num_keys - num_tokens)[None, None]
    if attention_mask is None:
        return visible
    # A padded query would see nothing at all, and softmax give NaN: let it see itself. Nobody sees it.
    itself = torch.ones(num_tokens, num_keys, dtype=torch.bool, device=device)
    itself = itself.tril(num_keys - num_tokens).triu(num_keys - num_tokens)
    return (visible & attention_mask[:, None, None, :]) | itself


def is_right_padded(mask: Tensor) -> bool:
    """Return whether every row of a mask (B, T) has its padding after its real tokens, or none."""
    return bool((mask[:, 1:] <= mask[:, :-1]).all())


def _causal_is_enough(mask: Tensor, num_tokens: int, num_keys: int) -> bool:
    if num_tokens == num_keys and num_keys > 1:
        return is_right_padded(mask)
    return bool(mask.all())
