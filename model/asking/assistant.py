"""A model that answers: one question, the turns of a chat, or a batch of questions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from qwen import QWenTokenizer
from qwen.answering import answer_batch, answer_ids, check_settings, complete_config, stream_ids
from qwen.cache import PromptCache
from qwen.chatml import DEFAULT_MAX_WINDOW_SIZE

from ..vision_language_model import VisionLanguageModel

Turns = list[tuple[str, str]]
FitPrompt = Callable[[QWenTokenizer, str, int, Turns, str, int, str], list[int]]
"""Tokenizer, question, features per image, earlier turns, system prompt, window in tokens, the question's name (for
what is logged, or empty) → the prompt's ids."""


class Assistant:
    """A model, its tokenizer, and how it is to answer.

    Args:
        model: LoRA is merged into its base weights.
        tokenizer: QWen's tokenizer.
        system: the system prompt.
        options: generation settings that come before the model's own `generation_config.json`.
        fit_prompt: builds prompts, as `model.asking.prompt_window.fit_prompt` does.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        tokenizer: QWenTokenizer,
        system: str,
        options: dict[str, Any],
        fit_prompt: FitPrompt,
    ) -> None:
        model.merge_lora()
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.system = system
        self.options = options
        self.fit_prompt = fit_prompt
        self.max_window_size = int(
            getattr(complete_config(model.qwen, None), "max_window_size", DEFAULT_MAX_WINDOW_SIZE)
        )
        self.chat_cache = PromptCache()

    @torch.inference_mode()
    def features(self, images: Sequence[Image.Image]) -> Tensor | None:
        """Run the vision tower over images; (images, tokens, width), or None if there are none."""
        if not images:
            return None
        transform = self.model.vision_tower.image_transform
        return self.model.encode_images(torch.stack([transform(image) for image in images]))

    def stream(self, prompt: str, features: Tensor | None, history: Turns | None = None) -> Iterator[str]:
        """Answer; gives the growing text. Nothing is done before the first is asked for.

        With a history, be it empty, what is read is kept for the next turn.
        """
        ids, kwargs = self._inputs(prompt, features, history)
        cache = None if history is None else self.chat_cache
        yield from stream_ids(self.model.qwen, self.tokenizer, ids, prompt_cache=cache, **kwargs)

    def answer(self, prompt: str, features: Tensor | None, name: str = "") -> str:
        """Answer; gives the whole text. What is logged begins with the name."""
        ids, kwargs = self._inputs(prompt, features, None, name)
        return answer_ids(self.model.qwen, self.tokenizer, ids, **kwargs)

    def answer_rows(self, prompts: Sequence[list[int]], features: Sequence[Tensor | None], seed: int) -> list[str]:
        """Answer prompts (token ids) together, each as it would be answered alone under this seed.

        Args:
            prompts: as `prompt_ids` gives them.
            features: for each its images' (images, tokens, width), or None.
            seed: of sampling.
        """
        return answer_batch(self.model.qwen, self.tokenizer, prompts, features, seed=seed, **self.options)

    def check_settings(self) -> None:
        """See to it that answers can be generated with these settings.

        Raises:
            ValueError: if not, whatever the question.
        """
        try:
            check_settings(self.model.qwen, self.tokenizer, **self.options)
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"the generation settings can't be used: {error}; correct the generation_config.json of "
                f"{self.model.base_language_model}, or give flags in its place"
            ) from error

    def prompt_ids(self, prompt: str, history: Turns | None = None, name: str = "") -> list[int]:
        """The prompt's ids, made to fit into the window; what is logged of that begins with the name.

        Raises:
            ValueError: if system prompt and images leave no room for a question.
        """
        tokens = self.model.num_image_tokens
        return self.fit_prompt(self.tokenizer, prompt, tokens, history or [], self.system, self.max_window_size, name)

    def _inputs(
        self, prompt: str, features: Tensor | None, history: Turns | None, name: str = ""
    ) -> tuple[Tensor, dict[str, Any]]:
        kwargs = dict(self.options)
        if features is not None:
            kwargs["image_features"] = (features.flatten(0, 1),)
        return torch.tensor([self.prompt_ids(prompt, history, name)]), kwargs
