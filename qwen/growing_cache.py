"""A cache of keys and values with room to grow: a new token is written behind the others, which stay where they are.

Transformers' own copies everything that is cached, in every layer, for every token of an answer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

_LEAST_ROOM = 64
"""Tokens that there is room for at least when a cache is made or moved; else a quarter more than it holds."""


class GrowingLayer(DynamicLayer):
    """One layer's keys and values (B, H, K, C), which are views of the first K places of larger tensors."""

    def __init__(self) -> None:
        super().__init__()
        self._room: list[Tensor | None] = [None, None]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add keys and values (B, H, T, C) of new tokens; returns all of them, (B, H, K, C)."""
        if key_states.requires_grad or value_states.requires_grad:  # what is overwritten could not be differentiated
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._append(0, self.keys, key_states)
        self.values = self._append(1, self.values, value_states)
        return self.keys, self.values

    def keep(self, num_tokens: int) -> None:
        """Forget all tokens behind the first `num_tokens`."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[..., :num_tokens, :], self.values[..., :num_tokens, :]

    def _append(self, which: int, held: Tensor | None, new: Tensor) -> Tensor:
        num_held = held.shape[-2] if held is not None and held.numel() else 0
        total = num_held + new.shape[-2]
        room = self._room[which]
        if room is None or not _holds(room, held, num_held) or not _has_place(room, new, total):
            shape = (*new.shape[:-2], total + max(total // 4, _LEAST_ROOM), new.shape[-1])
            room = torch.empty(shape, dtype=new.dtype, device=new.device)
            if held is not None and num_held:
                room[..., :num_held, :] = held
            self._room[which] = room
        room[..., num_held:total, :] = new
        return room[..., :total, :]


def _holds(room: Tensor, held: Tensor | None, num_held: int) -> bool:
    """Whether what is held is the beginning of this room; beams and dropped rows put other tensors in its place."""
    return not num_held or (held is not None and held.data_ptr() == room.data_ptr() and held.shape[0] == room.shape[0])


def _has_place(room: Tensor, new: Tensor, total: int) -> bool:
    alike = room.dtype == new.dtype and room.device == new.device and room.shape[:-2] == new.shape[:-2]
    writable = torch.is_inference_mode_enabled() or not room.is_inference()
    return alike and writable and total <= room.shape[-2]


class GrowingCache(DynamicCache):
    """A cache of such layers.

    Args:
        config: the model's.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config=config)
        self.layers: Any = [GrowingLayer() for _ in range(config.num_hidden_layers)]

    def keep(self, num_tokens: int) -> None:
        """Forget all tokens behind the first `num_tokens`, in every layer."""
        for layer in self.layers:
            layer.keep(num_tokens)

    def keep_rows(self, rows: Tensor) -> None:
        """Forget all rows but these (indices), and their dynamic-NTK factors with them."""
        self.batch_select_indices(rows)
        alpha = getattr(self, "ntk_alpha", None)
        if alpha is not None:
            self.ntk_alpha = alpha[rows.to(alpha.device)] if len(alpha) > 1 else alpha
