"""What one layer of QWen is made of: RMSNorm, attention with rotary positions, and a gated MLP.

Shape legend: B rows, T tokens of this call, K keys (cached tokens and T), H heads, C channels of one head, R rotary
channels, D `hidden_size`, I the MLP's inner width, S wanted positions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_qwen import QWenConfig
from .cpu_kernels import scaled_dot_product_attention as attend_on_cpu


class QWenRMSNorm(nn.Module):
    """Root mean square norm (https://arxiv.org/abs/1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension of `x` (..., size)."""
        wide = x.float()  # bf16 has 8 bits: too few for a mean of squares
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return wide.to(x.dtype) * self.weight  # cast before the weight multiplies, as the checkpoints were trained


# ---- Positions


class Rotation(NamedTuple):
    """The positions of one call, as every layer needs them; in fp32."""

    cos: Tensor  # (B or 1, 1, T, R)
    sin: Tensor  # (B or 1, 1, T, R)
    query_scale: Tensor | None  # (B or 1, 1, T, 1) log-n factors; None where all of them are 1


def rotary_tables(position_ids: Tensor, dim: int, base: float, alpha: Tensor | None) -> tuple[Tensor, Tensor]:
    """Compute cosines and sines (B, 1, T, R) of the rotary embedding (https://arxiv.org/abs/2104.09864), in fp32.

    Args:
        position_ids: (B, T).
        dim: R, even. The second half of the channels repeats the first.
        base: base of the frequencies.
        alpha: (B,) factors by which dynamic NTK stretches the base to `base * alpha ** (R / (R - 2))`; None: 1.
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
    dim = rotation.cos.shape[-1]
    turned, passed = x[..., :dim].float(), x[..., dim:]
    lower, upper = turned.chunk(2, dim=-1)  # (B, H, T, R / 2): channel i turns against channel i + R / 2
    turned = turned * rotation.cos + torch.cat((-upper, lower), dim=-1) * rotation.sin
    return torch.cat((turned.to(x.dtype), passed), dim=-1) if passed.shape[-1] else turned.to(x.dtype)


# ---- Attention


def attention_mask_4d(x: Tensor, attention_mask: Tensor | None, num_keys: int) -> Tensor | None:
    """Say which keys each query may see: those before it that are no padding, and itself.

    Args:
        x: (B, T, D).
        attention_mask: (B, K) with 0 for padding, or None. Static caches of transformers come with (B, 1, T, K): True
            where a key may be seen, or numbers to be added to the scores: 0 where a key may be seen.
        num_keys: K.

    Returns:
        Booleans (B or 1, 1, T, K), or None where plain causal attention does the same: without padding, and with
        padding after the real tokens only (nothing before it can see it).

    Raises:
        ValueError: if the mask has another shape.
    """
    num_rows, num_tokens = x.shape[:2]
    if attention_mask is not None and attention_mask.dim() == 4:
        return attention_mask == 0 if attention_mask.is_floating_point() else attention_mask.bool()
    if attention_mask is not None:
        if tuple(attention_mask.shape) != (num_rows, num_keys):
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}, expected ({num_rows}, {num_keys}): "
                "one entry for each row and each key, those in the cache included"
            )
        real = attention_mask.to(device=x.device, dtype=torch.bool)
        is_causal = (real[:, 1:] <= real[:, :-1]).all() if num_tokens == num_keys else real.all()
        attention_mask = None if is_causal else real
    if attention_mask is None and num_tokens in (1, num_keys):
        return None
    before = torch.ones(num_tokens, num_keys, dtype=torch.bool, device=x.device)
    before = before.tril(num_keys - num_tokens)  # (T, K): query t is key K - T + t
    if attention_mask is None:
        return before[None, None]
    # A padded query would see nothing at all, and softmax give NaN: let it see itself. Nobody sees it.
    itself = before.triu(num_keys - num_tokens)
    return (before & attention_mask[:, None, None, :]) | itself


class QWenAttention(nn.Module):
    """Causal self-attention with one fused projection for queries, keys and values."""

    def __init__(self, config: QWenConfig, layer_index: int) -> None:
        super().__init__()
        self.config = config
        self.layer_index = layer_index
        width = config.kv_channels * config.num_attention_heads
        self.c_attn = nn.Linear(config.hidden_size, 3 * width)
        self.c_proj = nn.Linear(width, config.hidden_size, bias=not config.no_bias)
        self.scale = config.kv_channels**-0.5 if config.scale_attn_weights else 1.0

    def forward(
        self,
        x: Tensor,
        rotation: Rotation,
        visible: Tensor | None,
        past_key_values: Cache | None,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend over what is cached and over `x`.

        Args:
            x: (B, T, D).
            rotation: rotary tables and log-n factors of these positions.
            visible: (B or 1, 1, T, K), True where a key may be seen; None means plain causal attention.
            past_key_values: cache that the new keys and values are added to, or None.
            positions: (S,) the positions b · T + t whose output is wanted; None: all.

        Returns:
            (B, T, D), or (S, D) with `positions`, and the attention weights (B, H, T, K) in eager mode, else None.
        """
        query, key, value = rearrange(
            self.c_attn(x), "b t (three h c) -> three b h t c", three=3, h=self.config.num_attention_heads
        )  # each (B, H, T, C)
        query, key = rotate(query, rotation), rotate(key, rotation)
        if self.training:
            value = value.clone()  # kept for the backward pass; as a view it would keep all three
        if rotation.query_scale is not None:
            query = (query * rotation.query_scale).to(value.dtype)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_index)  # (B, H, K, C)
        dropout = self.config.attn_dropout_prob if self.training else 0.0
        if self.config._attn_implementation == "eager":
            out, weights = _eager_attention(query, key, value, visible, self.scale, dropout)  # (B, H, T, C)
        else:
            attend: Any = (
                F.scaled_dot_product_attention if torch.is_grad_enabled() else attend_on_cpu
            )  # the same, faster
            # Without a mask, T is K (nothing cached) or 1 (everything may be seen), which needs no causal mask.
            is_causal = visible is None and query.shape[-2] > 1
            out = attend(query, key, value, visible, dropout_p=dropout, is_causal=is_causal, scale=self.scale)
            weights = None
        out = rearrange(out, "b h t c -> b t (h c)")
        if positions is not None:
            out = out.flatten(0, 1)[positions]  # (S, H · C)
        return self.c_proj(out), weights


def _eager_attention(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, scale: float, dropout: float
) -> tuple[Tensor, Tensor]:
    """Attend step by step, which gives the weights too."""
    scores = (query @ key.transpose(-1, -2)).float() * scale  # (B, H, T, K); softmax needs more than bf16
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    elif query.shape[-2] > 1:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)  # (T, T)
        scores = scores.masked_fill(later, float("-inf"))
    weights = F.dropout(scores.softmax(-1).to(value.dtype), dropout)
    return weights @ value, weights


class QWenMLP(nn.Module):
    """Gated MLP (https://arxiv.org/abs/2002.05202); the gate is `w2`."""

    def __init__(self, config: QWenConfig) -> None:
        super().__init__()
        inner = config.intermediate_size // 2
        self.w1 = nn.Linear(config.hidden_size, inner, bias=not config.no_bias)
        self.w2 = nn.Linear(config.hidden_size, inner, bias=not config.no_bias)
        self.c_proj = nn.Linear(inner, config.hidden_size, bias=not config.no_bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., D)."""
        gated: Tensor = _Gated.apply(self.w1(x), self.w2(x))  # (..., I)
        return self.c_proj(gated)


class _Gated(torch.autograd.Function):
    """`value * silu(gate)`. For the backward pass it keeps two tensors, not three: silu is computed again."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(value, gate)
        return F.silu(gate).mul_(value)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor]:
        value, gate = ctx.saved_tensors
        grad_value = F.silu(gate).mul_(grad_out)
        grad_gate = torch.ops.aten.silu_backward(grad_out * value, gate)
        return grad_value, grad_gate


class QWenBlock(GradientCheckpointingLayer):
    """One pre-norm layer: attention, then MLP, each added to the residual stream."""

    def __init__(self, config: QWenConfig, layer_index: int) -> None:
        super().__init__()
        self.ln_1 = QWenRMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.attn = QWenAttention(config, layer_index)
        self.ln_2 = QWenRMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mlp = QWenMLP(config)

    def forward(
        self,
        x: Tensor,
        rotation: Rotation,
        visible: Tensor | None,
        past_key_values: Cache | None = None,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Map (B, T, D) to (B, T, D), or to (S, D) with `positions`; see `QWenAttention.forward` for the rest."""
        attended, weights = self.attn(self.ln_1(x), rotation, visible, past_key_values, positions)
        if positions is not None:
            x = x.flatten(0, 1)[positions]  # (S, D): from here on, no position needs another
        x = x + attended
        return x + self.mlp(self.ln_2(x)), weights
