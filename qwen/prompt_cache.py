"""What a chat keeps from one turn to the next: the keys and values of its conversation.

Shape legend: T tokens of a prompt, D `hidden_size`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .cache import GrowingCache
from .long_context import ntk_alpha


class PromptCache:
    """Keys and values of one conversation, for `answer_ids` and `stream_ids` (and so for `chat` and `chat_stream`).

    A prompt is compared, token by token and with its image features, with what was read before: only what comes after
    the beginning that both share goes through the model. Answers are those that are given without it.
    """

    def __init__(self) -> None:
        self.num_reused = 0
        """How many tokens of the last prompt did not have to be read."""
        self._cache: GrowingCache | None = None
        self._ids: list[int] = []  # the last prompt and its answer
        self._num_read = 0  # so many of them have gone through the whole model; the cache may hold parts of more
        self._features: Tensor | None = None
        self._alpha: float | None = None

    def reuse(self, model: Any, prompt: Sequence[int], features: Tensor | None) -> tuple[GrowingCache, Tensor | None]:
        """Cut the cache to the beginning that it shares with a prompt of the same model.

        Args:
            model: the model that will be called.
            prompt: token ids (T).
            features: (image tokens of the prompt, D), or None.

        Returns:
            The cache, and the features of the image tokens that it does not hold.
        """
        has_ntk = getattr(model.config, "use_dynamic_ntk", False)
        alpha = ntk_alpha(None, len(prompt), model.config.seq_length) if has_ntk else None
        self._image_token_id = model.image_token_id
        factor = None if alpha is None else float(alpha)
        # Another factor of dynamic NTK turns all keys by other angles.
        same = self._num_shared(prompt, features) if factor == self._alpha else 0
        if self._cache is None or same == 0:
            self._cache = GrowingCache(model.config)  # which has no factor of dynamic NTK yet
        self._cache.truncate(same)
        self._ids, self._num_read, self._features, self._alpha = list(prompt), same, features, factor
        self.num_reused = same
        return self._cache, None if features is None else features[self._ids[:same].count(self._image_token_id) :]

    def add(self, token: int) -> None:
        """Note the next token of the answer, before which the model has read everything else."""
        self._num_read = len(self._ids)
        self._ids.append(token)

    def _num_shared(self, prompt: Sequence[int], features: Tensor | None) -> int:
        """Return the length of the shared beginning; a prompt's last token is always read, to get the next one."""
        most = min(len(prompt) - 1, self._num_read)
        same = next((at for at in range(most) if prompt[at] != self._ids[at]), most)
        num_images = list(prompt[:same]).count(self._image_token_id)
        if not num_images:
            return same
        both = features is not None and self._features is not None
        if both and torch.equal(features[:num_images], self._features[:num_images].to(features)):  # type: ignore[index]
            return same
        return list(prompt).index(self._image_token_id)
