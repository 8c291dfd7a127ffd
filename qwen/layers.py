"""What one layer of QWen is made of: RMSNorm, attention with rotary positions, and a gated MLP.

Shape legend: B rows, T tokens of this call, K keys (cached tokens and T), H heads, C channels of one head, D
`hidden_size`, I the MLP's inner width, S wanted positions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_qwen import QWenConfig
from .cpu_kernels import scaled_dot_product_attention
from .positions import Rotation, rotate


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
        attend = _eager_attention if self.config._attn_implementation == "eager" else _sdpa_attention
        out, weights = attend(query, key, value, visible, self.scale, dropout)  # (B, H, T, C)
        out = rearrange(out, "b h t c -> b t (h c)")
        if positions is not None:
            out = out.flatten(0, 1)[positions]  # (S, H · C)
        return self.c_proj(out), weights


def _sdpa_attention(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, scale: float, dropout: float
) -> tuple[Tensor, None]:
    # Without a mask, T is K (nothing cached) or 1 (everything may be seen); is_causal is right for the first only.
    options = {"dropout_p": dropout, "is_causal": visible is None and query.shape[-2] > 1, "scale": scale}
    return scaled_dot_product_attention(query, key, value, visible, **options), None  # PyTorch's, but on the CPU faster


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
