"""What a chat has read already, kept from one turn to the next: only what is new in a prompt goes through the model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from .growing_cache import GrowingCache
from .positions import ntk_alpha
from .tokenization_qwen import IMAGE_TOKEN_ID


class StillRunningError(KeyboardInterrupt):
    """Ctrl-C while an answer that was given up computes its last token: the model still writes into its cache."""


class PromptCache:
    """Keys and values of one conversation, for `answer_ids` and `stream_ids` (and so for `chat` and `chat_stream`).

    A prompt is compared, token by token and with its image features, with what was read last. Its beginning, as far as
    it is the same, is not read again; all of it is, where dynamic NTK would turn it by other angles. Answers are those
    that are given without it.
    """

    def __init__(self) -> None:
        self._cache: GrowingCache | None = None
        self._ids: list[int] = []  # what is known to be in the cache, which may hold more behind it
        self._features: Tensor | None = None
        self._alpha = 1.0
        self.num_reused = 0
        """How many tokens of the last prompt did not have to be read."""

    def clear(self) -> None:
        """Forget everything, and free its memory."""
        self._cache, self._ids, self._features = None, [], None

    @staticmethod
    def serves(config: GenerationConfig) -> bool:
        """Whether these settings leave a cache that can be gone on with: one row, and of the common kind."""
        return config.use_cache is not False and config.cache_implementation is None and (config.num_beams or 1) == 1

    def begin(self, model: Any, prompt: Sequence[int], model_kwargs: dict[str, Any]) -> None:
        """Put into a call's arguments what is there of its prompt, and leave out the images that are.

        Args:
            model: the model that will be called; always the same.
            prompt: token ids.
            model_kwargs: changed; `image_features`, where present, is a tuple of one tensor (image tokens, D).
        """
        given = model_kwargs.get("image_features")
        features = None if given is None else torch.cat([row.flatten(0, -2) for row in given])
        alpha = None
        if model.config.use_dynamic_ntk:
            alpha = ntk_alpha(None, len(prompt), model.config.seq_length)
        same = self._common(prompt, features) if self._alpha == (1.0 if alpha is None else float(alpha)) else 0
        self._alpha = 1.0 if alpha is None else float(alpha)
        if self._cache is None or same == 0:
            self._cache, same = GrowingCache(model.config), 0
        self._ids, self._features, self.num_reused = list(prompt[:same]), features, same
        self._cache.keep(same)
        model_kwargs["past_key_values"] = self._cache
        if features is not None:
            rest = features[self._ids.count(IMAGE_TOKEN_ID) :]
            model_kwargs["image_features"] = (rest,) if len(rest) else None

    def _common(self, prompt: Sequence[int], features: Tensor | None) -> int:
        """Length of the beginning that need not be read; the last token is always read, for what comes after it."""
        most = min(len(prompt) - 1, len(self._ids))
        same = next((at for at in range(most) if prompt[at] != self._ids[at]), most)
        images = list(prompt[:same]).count(IMAGE_TOKEN_ID)
        if images and not _equal(features, self._features, images):
            return list(prompt).index(IMAGE_TOKEN_ID)
        return same

    def read(self, prompt: Sequence[int], answer: Sequence[int]) -> None:
        """Note that the prompt and all tokens of its answer but the last have gone through the model."""
        self._ids = [*prompt, *answer[:-1]]

    def watch(self, prompt: Sequence[int], tokens: Iterator[int]) -> Iterator[int]:
        """Hand on an answer's tokens as they come, and note them; after an error everything is forgotten.

        An answer that is stopped is known up to the token before the last that was handed on: whatever the model may
        have begun behind it is cut off by the next prompt.
        """
        try:
            with contextlib.closing(tokens):  # type: ignore[type-var]
                answer: list[int] = []
                for token in tokens:
                    answer.append(token)
                    self.read(prompt, answer)
                    yield token
        except (Exception, StillRunningError):
            self.clear()
            raise


def _equal(features: Tensor | None, before: Tensor | None, number: int) -> bool:
    if features is None or before is None or features.shape[1] != before.shape[1]:
        return False
    return len(before) >= number and torch.equal(features[:number], before[:number].to(features))
