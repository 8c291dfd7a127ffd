"""A cache of keys and values with room to grow.

Shape legend: B rows, H heads, K tokens that are cached, T new tokens, C channels of one head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

_LEAST_ROOM = 64
"""Tokens that a new or enlarged cache has room for at least; a quarter of what it holds, where that is more."""


class GrowingLayer(DynamicLayer):
    """One layer's keys and values (B, H, K, C), which are views of the first K places of larger tensors."""

    _room: Tensor | None = None  # (2, B, H, places, C): keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add keys and values (B, H, T, C) of new tokens, and return all of them, (B, H, K + T, C)."""
        if key_states.requires_grad or value_states.requires_grad:  # writing in place would break the backward pass
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        num_held = self.get_seq_length()
        total = num_held + key_states.shape[-2]
        room = self._room
        if room is None or not self._can_write(room, key_states, total):
            num_places = total + max(total // 4, _LEAST_ROOM)
            room = key_states.new_empty((2, *key_states.shape[:-2], num_places, key_states.shape[-1]))
            for place, held in zip(room, (self.keys, self.values), strict=True):
                if num_held:
                    place[..., :num_held, :] = held
            self._room = room
        room[0, ..., num_held:total, :] = key_states
        room[1, ..., num_held:total, :] = value_states
        self.keys, self.values = room[..., :total, :]
        return self.keys, self.values

    def _can_write(self, room: Tensor, new: Tensor, total: int) -> bool:
        """Return whether `room` begins with what is held (beams and dropped rows replace it) and takes new tokens."""
        begins = self.get_seq_length() == 0 or self.keys.data_ptr() == room.data_ptr()  # type: ignore[union-attr]
        same_kind = room.dtype == new.dtype and room.device == new.device and room.shape[1:-2] == new.shape[:-2]
        writable = torch.is_inference_mode_enabled() or not room.is_inference()
        return begins and same_kind and writable and total <= room.shape[-2]


class GrowingCache(DynamicCache):
    """A cache that writes each new token after the others, which stay where they are.

    Transformers' own copies everything that is cached, in every layer, for every token of an answer.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config=config)
        self.layers: Any = [GrowingLayer() for _ in range(config.num_hidden_layers)]

    def truncate(self, num_tokens: int) -> None:
        """Forget all tokens after the first `num_tokens`, in every layer."""
        for layer in self.layers:
            if layer.is_initialized:
                layer.keys, layer.values = layer.keys[..., :num_tokens, :], layer.values[..., :num_tokens, :]

    def select_rows(self, rows: Tensor) -> None:
        """Forget all rows but these (indices), and their dynamic-NTK factors with them."""
        self.batch_select_indices(rows)
        alpha = getattr(self, "ntk_alpha", None)
        if alpha is not None and len(alpha) > 1:
            self.ntk_alpha = alpha[rows.to(alpha.device)]
