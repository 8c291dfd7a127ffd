"""The flags of test.py that say how to answer, and a model that answers as they say.

Shape legend: N images, P tokens per image, D the language model's width, T tokens of the prompt.
"""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dataprocess.messages import format_count
from dataset.prompt import Tokenizer, encode_prompt
from qwen import IMAGE_TOKEN
from qwen.answering import MOST_EXTREME, answer_ids
from qwen.batch_answering import answer_batch
from qwen.chatml import DEFAULT_MAX_WINDOW_SIZE, Turn
from qwen.prompt_cache import PromptCache
from qwen.streaming import stream_ids

from ..checkpoints.base_models import load_tokenizer
from ..device import parse_dtype, pick_device, pick_dtype
from ..vision_language_model import VisionLanguageModel
from .prompt_window import fit_prompt

logger = logging.getLogger(__name__)

_GENERATION = ("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "do_sample")
_MODERATE = f"from {1 / MOST_EXTREME:g} to {MOST_EXTREME:g}"
_VALID = {  # the least, the most, and both in words
    "seed": (0, 2**32 - 1, "at least 0 and below 2**32"),
    "batch_size": (1, math.inf, "at least 1"),
    "max_new_tokens": (1, math.inf, "at least 1"),
    "temperature": (1 / MOST_EXTREME, MOST_EXTREME, f"{_MODERATE}; for no randomness use --greedy"),
    "repetition_penalty": (1 / MOST_EXTREME, MOST_EXTREME, f"{_MODERATE}; 1 changes nothing"),
    "top_p": (math.ulp(0), 1, "above 0 and at most 1"),
    "top_k": (0, math.inf, "at least 0"),
}


def add_generation_flags(parser: argparse.ArgumentParser) -> None:
    """Add the generation settings to a command line."""
    group = "Defaults come from the language model's generation_config.json."
    generation = parser.add_argument_group("generation", group)
    add = generation.add_argument
    add("--max_new_tokens", type=int, help="length limit of an answer, in tokens")
    add("--temperature", type=float, help="above 0; lower is more certain")
    add("--top_p", type=float, help="sample from the likeliest tokens that make up this share, 0 to 1")
    add("--top_k", type=int, help="sample from the k likeliest tokens; 0: all")
    add("--repetition_penalty", type=float, help="above 1 makes repeating less likely")
    sampling = generation.add_mutually_exclusive_group()
    sampling.add_argument("--do_sample", action="store_true", default=None, help="sample")
    sampling.add_argument("--greedy", action="store_false", dest="do_sample", help="take the likeliest token each time")


def check_flags(args: argparse.Namespace) -> argparse.Namespace:
    """Check the flags; refuse one that is missing, out of its range, or does not go with another.

    Returns:
        The same, where `device` and `dtype` are PyTorch's, `image_path` holds paths, `folder` is the folder of pictures
        or None, and `options` holds the generation settings that were given.
    """
    if args.model_weights is None:
        raise ValueError("--model_weights is missing: give a checkpoint folder, as train.py writes it")
    for name, (least, most, expected) in _VALID.items():
        value = getattr(args, name)
        if value is not None and not least <= value <= most:
            raise ValueError(f"--{name} {value}: must be {expected}")
    if (args.batch is None) != (args.output is None):
        raise ValueError("--batch FILE and --output FILE go together: give both, or neither")
    if args.batch is not None and (args.prompt is not None or args.image_path or args.stream):
        raise ValueError("--batch brings its own questions and images; leave out --prompt, --image_path and --stream")
    args.image_path = [Path(path) for path in args.image_path]
    args.folder = next((path for path in args.image_path if path.is_dir()), None)
    args.device = pick_device(args.device)
    args.dtype = pick_dtype(args.device) if args.dtype is None else parse_dtype(args.dtype)
    if args.quantisation is not None:
        from ..scaling.quantised import check_quantised

        check_quantised(args.quantisation, args.device)
    if args.device_map or args.max_memory or args.offload_folder:
        from ..scaling.offload import check_offload

        check_offload(args)
    args.options = {name: getattr(args, name) for name in _GENERATION if getattr(args, name) is not None}
    without_effect = [f"--{name}" for name in ("temperature", "top_p", "top_k") if name in args.options]
    if args.do_sample is False and without_effect:
        logger.warning("--greedy takes the likeliest token each time: %s has no effect", ", ".join(without_effect))
    return args


def with_placeholders(prompt: str, num_images: int) -> str:
    """Put a placeholder for every image before a prompt that has none at all.

    Raises:
        ValueError: if it has some, but not one for each image.
    """
    found = prompt.count(IMAGE_TOKEN)
    if found == 0:
        return IMAGE_TOKEN * num_images + prompt
    if found != num_images:
        raise ValueError(
            f"the prompt has {format_count(found, 'placeholder')} {IMAGE_TOKEN}, but "
            f"{format_count(num_images, 'image is', 'images are')} given; "
            "write one placeholder for each image, or none at all"
        )
    return prompt


def load_assistant(args: argparse.Namespace) -> Assistant:
    """Load model and tokenizer as the flags of test.py say; refuse a checkpoint or a base model that does not fit."""
    bases = args.base_language_model, args.base_value_model
    model = VisionLanguageModel.from_pretrained(
        *bases,
        *(args.model_weights, args.dtype, "cpu" if args.device_map else args.device),
        quantisation=args.quantisation,
    )
    if args.device_map is not None:
        from ..scaling.offload import spread

        spread(model, args.device, args.max_memory, args.offload_folder)
    elif args.quantisation is None:  # W + BA in 4 bits would be rounded once more
        model.merge_lora()  # once: from here on LoRA costs nothing
    return Assistant(model, load_tokenizer(model.base_language_model), args.system, args.options)


class Assistant:
    """A model in `eval()`, its tokenizer, a system prompt, and generation settings, which come before the model's."""

    def __init__(
        self, model: VisionLanguageModel, tokenizer: Tokenizer, system: str | None, options: dict[str, Any]
    ) -> None:
        self.model, self.tokenizer, self.options = model, tokenizer, options
        self.system = tokenizer.default_system if system is None else system
        self.max_window_size = int(getattr(model.qwen.generation_config, "max_window_size", DEFAULT_MAX_WINDOW_SIZE))

    @torch.inference_mode()
    def features(self, images: Sequence[Image.Image]) -> Tensor | None:
        """Run the vision tower and the projector over images; return (N, P, D), or None if there are no images."""
        transform = self.model.vision_tower.image_transform
        return self.encode([transform(image) for image in images])

    @torch.inference_mode()
    def encode(self, pixels: Sequence[Tensor]) -> Tensor | None:
        """Run the vision tower and the projector over what `image_transform` made of N images; see `features`."""
        return self.model.encode_images(torch.stack(list(pixels))) if pixels else None

    def answer(self, prompt: str, features: Tensor | None, name: str = "") -> str:
        """Return the whole answer; warnings begin with the name."""
        ids, inputs = self._inputs(self.prompt_ids(prompt, (), name), features)
        return answer_ids(self.model.qwen, self.tokenizer, ids, **inputs)

    def stream(
        self, prompt: str, features: Tensor | None, history: Sequence[Turn] = (), cache: PromptCache | None = None
    ) -> Iterator[str]:
        """Yield the growing answer; nothing is computed before the first text is asked for."""
        yield from self.stream_row(self.prompt_ids(prompt, history), features, cache)

    def stream_row(
        self,
        prompt: list[int],
        features: Tensor | None,
        cache: PromptCache | None = None,
        options: dict[str, Any] | None = None,
    ) -> Iterator[str]:
        """Yield the growing answer to a prompt (see `prompt_ids`); `options` come before the assistant's own."""
        ids, inputs = self._inputs(prompt, features)
        yield from stream_ids(self.model.qwen, self.tokenizer, ids, prompt_cache=cache, **{**inputs, **(options or {})})

    def answer_rows(self, prompts: Sequence[list[int]], features: Sequence[Tensor | None], seed: int) -> list[str]:
        """Answer prompts (see `prompt_ids`) with their features, each as it would be answered alone under this seed."""
        return answer_batch(self.model.qwen, self.tokenizer, prompts, features, seed=seed, **self.options)

    def prompt_ids(self, prompt: str, history: Sequence[Turn] = (), name: str = "") -> list[int]:
        """Return the prompt's token ids, shortened if it is longer than the window; warnings begin with the name."""
        how = (self.tokenizer, prompt, self.model.num_image_tokens, history, self.system, self.max_window_size)
        ids, num_dropped = encode_prompt(*how)
        return ids if num_dropped == 0 and len(ids) <= self.max_window_size else fit_prompt(*how, name)

    def _inputs(self, prompt: list[int], features: Tensor | None) -> tuple[Tensor, dict[str, Any]]:
        """Return the prompt (1, T), and the generation settings with the image features."""
        ids = torch.tensor([prompt])  # (1, T)
        images = {} if features is None else {"image_features": (features.flatten(0, 1),)}  # (N * P, D)
        return ids, {**self.options, **images}
