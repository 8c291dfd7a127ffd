"""Keys and values that are kept: a cache with room to grow, and what a chat keeps from one turn to the next.

Shape legend: B rows, H heads, K tokens that are cached, T new tokens, C channels of one head, D `hidden_size`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from .positions import ntk_alpha
from .tokenization_qwen import IMAGE_TOKEN_ID

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
        if room is None or not _is_its_beginning(held, num_held, room) or not _fits(new, total, room):
            shape = (*new.shape[:-2], total + max(total // 4, _LEAST_ROOM), new.shape[-1])
            room = torch.empty(shape, dtype=new.dtype, device=new.device)
            if held is not None and num_held:
                room[..., :num_held, :] = held
            self._room[which] = room
        room[..., num_held:total, :] = new
        return room[..., :total, :]


def _is_its_beginning(held: Tensor | None, num_held: int, room: Tensor) -> bool:
    """Return whether what is held is the beginning of `room`; beams and dropped rows replace it by other tensors."""
    return not num_held or (held is not None and held.data_ptr() == room.data_ptr() and held.shape[0] == room.shape[0])


def _fits(new: Tensor, total: int, room: Tensor) -> bool:
    same_kind = room.dtype == new.dtype and room.device == new.device and room.shape[:-2] == new.shape[:-2]
    writable = torch.is_inference_mode_enabled() or not room.is_inference()
    return same_kind and writable and total <= room.shape[-2]


class GrowingCache(DynamicCache):
    """A cache that writes each new token after the others, which stay where they are.

    Transformers' own copies everything that is cached, in every layer, for every token of an answer.

    Args:
        config: the model's.
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


class PromptCache:
    """Keys and values of one conversation, for `answer_ids` and `stream_ids` (and so for `chat` and `chat_stream`).

    A prompt is compared, token by token and with its image features, with what was read before: only what comes after
    the beginning that both share goes through the model. Answers are those that are given without it.
    """

    def __init__(self) -> None:
        self.num_reused = 0
        """How many tokens of the last prompt did not have to be read."""
        self.clear()

    def clear(self) -> None:
        """Forget everything, and free its memory."""
        self._cache: GrowingCache | None = None
        self._ids: list[int] = []  # the last prompt and its answer
        self._num_read = 0  # so many of them have gone through the whole model; the cache may hold parts of more
        self._features: Tensor | None = None
        self._alpha: float | None = None

    def reuse(self, model: Any, prompt: Sequence[int], features: Tensor | None) -> tuple[GrowingCache, Tensor | None]:
        """Cut the cache to the beginning that it shares with a prompt.

        Args:
            model: the model that will be called; always the same.
            prompt: token ids (T).
            features: (image tokens of the prompt, D), or None.

        Returns:
            The cache, and the features of the image tokens that it does not hold.
        """
        alpha = ntk_alpha(None, len(prompt), model.config.seq_length) if model.config.use_dynamic_ntk else None
        factor = None if alpha is None else float(alpha)
        # Another factor of dynamic NTK turns all keys by other angles.
        same = self._num_shared(prompt, features) if factor == self._alpha else 0
        if self._cache is None or same == 0:
            self._cache = GrowingCache(model.config)  # which has no factor of dynamic NTK yet
        self._cache.truncate(same)
        self._ids, self._num_read, self._features, self._alpha = list(prompt), same, features, factor
        self.num_reused = same
        return self._cache, None if features is None else features[self._ids[:same].count(IMAGE_TOKEN_ID) :]

    def add(self, token: int) -> None:
        """Note the next token of the answer, before which the model has read everything else."""
        self._num_read = len(self._ids)
        self._ids.append(token)

    def _num_shared(self, prompt: Sequence[int], features: Tensor | None) -> int:
        """Return the length of the shared beginning; a prompt's last token is always read, to get the next one."""
        most = min(len(prompt) - 1, self._num_read)
        same = next((at for at in range(most) if prompt[at] != self._ids[at]), most)
        num_images = list(prompt[:same]).count(IMAGE_TOKEN_ID)
        if num_images and not _begin_alike(features, self._features, num_images):
            return list(prompt).index(IMAGE_TOKEN_ID)
        return same


def _begin_alike(features: Tensor | None, before: Tensor | None, number: int) -> bool:
    if features is None or before is None or features.shape[1] != before.shape[1]:
        return False
    return len(before) >= number and torch.equal(features[:number], before[:number].to(features))
