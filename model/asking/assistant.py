"""A model that answers: one question, the turns of a chat, or a batch of questions.

Shape legend: N images, P tokens per image, D the language model's width, T tokens of the prompt.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dataset.prompt import encode_prompt
from qwen import QWenTokenizer
from qwen.answering import answer_ids, stream_ids
from qwen.batch_answering import answer_batch, check_settings
from qwen.chatml import DEFAULT_MAX_WINDOW_SIZE
from qwen.prompt_cache import PromptCache

from ..checkpoints.base_models import load_tokenizer
from ..vision_language_model import VisionLanguageModel
from .prompt_window import fit_prompt

Turns = list[tuple[str, str]]


def load_assistant(args: argparse.Namespace) -> Assistant:
    """Load model and tokenizer as the flags of test.py say.

    Raises:
        ValueError: for a checkpoint or a base model that does not fit.
        OSError: for files that are missing.
    """
    model = VisionLanguageModel.from_pretrained(
        args.base_language_model, args.base_value_model, args.model_weights, args.dtype, args.device
    )
    model.merge_lora()  # W + BA, once: from here on LoRA costs nothing
    return Assistant(model, load_tokenizer(model.base_language_model), args.system, args.options)


class Assistant:
    """A model, its tokenizer, and how to answer.

    Args:
        model: in `eval()`.
        tokenizer: QWen's tokenizer.
        system: the system prompt.
        options: generation settings; they come before those of the model's own `generation_config.json`.
    """

    def __init__(
        self, model: VisionLanguageModel, tokenizer: QWenTokenizer, system: str, options: dict[str, Any]
    ) -> None:
        self.model, self.tokenizer, self.system, self.options = model, tokenizer, system, options
        self.max_window_size = int(getattr(model.qwen.generation_config, "max_window_size", DEFAULT_MAX_WINDOW_SIZE))
        self.chat_cache = PromptCache()

    @torch.inference_mode()
    def features(self, images: Sequence[Image.Image]) -> Tensor | None:
        """Run the vision tower and the projector over images; return (N, P, D), or None if there are no images."""
        if not images:
            return None
        transform = self.model.vision_tower.image_transform
        return self.model.encode_images(torch.stack([transform(image) for image in images]))

    def answer(self, prompt: str, features: Tensor | None, name: str = "") -> str:
        """Return the whole answer; warnings begin with the name."""
        ids, inputs = self._inputs(prompt, features, [], name)
        return answer_ids(self.model.qwen, self.tokenizer, ids, **inputs)

    def stream(self, prompt: str, features: Tensor | None, history: Turns | None = None) -> Iterator[str]:
        """Yield the growing answer; nothing is computed before the first text is asked for.

        With a history, even an empty one, keys and values are kept for the next turn.
        """
        ids, inputs = self._inputs(prompt, features, history or [])
        cache = None if history is None else self.chat_cache
        yield from stream_ids(self.model.qwen, self.tokenizer, ids, prompt_cache=cache, **inputs)

    def answer_rows(self, prompts: Sequence[list[int]], features: Sequence[Tensor | None], seed: int) -> list[str]:
        """Answer prompts together, each as it would be answered alone under this seed.

        Args:
            prompts: token ids, as `prompt_ids` returns them.
            features: for each prompt its images' (N, P, D), or None.
            seed: the seed of sampling.
        """
        return answer_batch(self.model.qwen, self.tokenizer, prompts, features, seed=seed, **self.options)

    def check_settings(self) -> None:
        """Check that answers can be generated with these settings.

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

    def prompt_ids(self, prompt: str, history: Sequence[tuple[str, str]] = (), name: str = "") -> list[int]:
        """Return the prompt's token ids, shortened if it is longer than the window; warnings begin with the name.

        Raises:
            ValueError: if system prompt and images leave no room for a question.
        """
        how = (self.tokenizer, prompt, self.model.num_image_tokens, history, self.system, self.max_window_size)
        ids, num_dropped = encode_prompt(*how)
        return ids if num_dropped == 0 and len(ids) <= self.max_window_size else fit_prompt(*how, name)

    def _inputs(
        self, prompt: str, features: Tensor | None, history: Turns, name: str = ""
    ) -> tuple[Tensor, dict[str, Any]]:
        """Return the prompt (1, T), and the generation settings with the image features."""
        ids = torch.tensor([self.prompt_ids(prompt, history, name)])  # (1, T)
        images = {} if features is None else {"image_features": (features.flatten(0, 1),)}  # (N * P, D)
        return ids, {**self.options, **images}
