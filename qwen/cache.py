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

    def __init__(self) -> None:
        super().__init__()
        self._room: list[Tensor | None] = [None, None]  # for keys, for values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add keys and values (B, H, T, C) of new tokens, and return all of them, (B, H, K + T, C)."""
        if key_states.requires_grad or value_states.requires_grad:  # writing in place would break the backward pass
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._append(0, self.keys, key_states)
        self.values = self._append(1, self.values, value_states)
        return self.keys, self.values

    def truncate(self, num_tokens: int) -> None:
        """Forget all tokens after the first `num_tokens`."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[..., :num_tokens, :], self.values[..., :num_tokens, :]

    def _append(self, which: int, held: Tensor | None, new: Tensor) -> Tensor:
        num_held = held.shape[-2] if held is not None and held.numel() else 0
        total = num_held + new.shape[-2]
        room = self._room[which]
        if room is None or not _can_write(held if num_held else None, new, total, room):
            shape = (*new.shape[:-2], total + max(total // 4, _LEAST_ROOM), new.shape[-1])
            room = torch.empty(shape, dtype=new.dtype, device=new.device)
            if held is not None and num_held:
                room[..., :num_held, :] = held
            self._room[which] = room
        room[..., num_held:total, :] = new
        return room[..., :total, :]


def _can_write(held: Tensor | None, new: Tensor, total: int, room: Tensor) -> bool:
    """Return whether `room` begins with what is held (beams and dropped rows replace it) and takes the new tokens."""
    begins = held is None or (held.data_ptr() == room.data_ptr() and held.shape[0] == room.shape[0])
    same_kind = room.dtype == new.dtype and room.device == new.device and room.shape[:-2] == new.shape[:-2]
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
            layer.truncate(num_tokens)

    def select_rows(self, rows: Tensor) -> None:
        """Forget all rows but these (indices), and their dynamic-NTK factors with them."""
        self.batch_select_indices(rows)
        alpha = getattr(self, "ntk_alpha", None)
        if alpha is not None and len(alpha) > 1:
            self.ntk_alpha = alpha[rows.to(alpha.device)]
