"""The flags of test.py: how answers are generated, which values are valid, what helps where memory runs out."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from dataset.prompt import count_placeholders
from qwen import IMAGE_TOKEN
from qwen.answering import MOST_EXTREME

from ..device import parse_dtype, pick_device, pick_dtype
from ..errors import in_one_line, is_out_of_memory, out_of_memory

logger = logging.getLogger(__name__)

_MODERATE = f"from {1 / MOST_EXTREME:g} to {MOST_EXTREME:g}"


def _is_moderate(value: float) -> bool:
    return 1 / MOST_EXTREME <= value <= MOST_EXTREME


_GENERATION = ("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "do_sample")
_VALID = {
    "seed": (lambda value: 0 <= value < 2**32, "at least 0 and below 2**32"),
    "batch_size": (lambda value: value >= 1, "at least 1"),
    "max_new_tokens": (lambda value: value >= 1, "at least 1"),
    "temperature": (_is_moderate, f"{_MODERATE}; for no randomness use --greedy"),
    "repetition_penalty": (_is_moderate, f"{_MODERATE}; 1 changes nothing"),
    "top_p": (lambda value: 0 < value <= 1, "above 0 and at most 1"),
    "top_k": (lambda value: value >= 0, "at least 0"),
}


def add_generation_flags(parser: argparse.ArgumentParser) -> None:
    """Add the generation settings to a command line."""
    generation = parser.add_argument_group(
        "generation", "Defaults come from the language model's generation_config.json."
    )
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
    """Check the flags, and replace names by what they name.

    Args:
        args: the parsed command line.

    Returns:
        The same, where `device` and `dtype` are PyTorch's, `image_path` holds paths, `folder` is the folder of pictures
        or None, and `options` holds the generation settings that were given.

    Raises:
        ValueError: for a flag that is missing, out of its range, or does not go with another.
    """
    if args.model_weights is None:
        raise ValueError("--model_weights is missing: give a checkpoint folder, as train.py writes it")
    for name, (is_valid, expected) in _VALID.items():
        value = getattr(args, name)
        if value is not None and not is_valid(value):
            raise ValueError(f"--{name} {value}: must be {expected}")
    if (args.batch is None) != (args.output is None):
        raise ValueError("--batch FILE and --output FILE go together: give both, or neither")
    if args.batch is not None and (args.prompt is not None or args.image_path or args.stream):
        raise ValueError("--batch brings its own questions and images; leave out --prompt, --image_path and --stream")
    args.image_path = [Path(path) for path in args.image_path]
    args.folder = next((path for path in args.image_path if path.is_dir()), None)
    if args.folder is not None:
        _check_folder(args)
    args.device = pick_device(args.device)
    args.dtype = pick_dtype(args.device) if args.dtype is None else parse_dtype(args.dtype)
    args.options = {name: getattr(args, name) for name in _GENERATION if getattr(args, name) is not None}
    without_effect = [f"--{name}" for name in ("temperature", "top_p", "top_k") if name in args.options]
    if args.do_sample is False and without_effect:
        logger.warning("--greedy takes the likeliest token each time: %s has no effect", ", ".join(without_effect))
    return args


def _check_folder(args: argparse.Namespace) -> None:
    if len(args.image_path) > 1:
        raise ValueError(f"--image_path: the folder {args.folder} must be given alone, without other paths")
    if args.prompt is None:
        raise ValueError("--image_path is a folder, so --prompt is needed; a chat is about one picture")
    if args.stream:
        raise ValueError("--stream shows one answer as it grows, a folder gives a line per picture; leave --stream out")
    if (found := count_placeholders(args.prompt)) > 1:
        raise ValueError(
            f"--image_path is a folder, whose pictures are asked about one by one: --prompt has {found} placeholders "
            f"{IMAGE_TOKEN}; write one, or none, or name the pictures"
        )


def explain(error: Exception) -> str:
    """Return one line about an error, with advice where memory ran out.

    Raises:
        Exception: the error itself, if it is one of this program's own.
    """
    if is_out_of_memory(error):
        return out_of_memory(
            error,
            "give fewer images and shorter questions, lower --max_new_tokens or --batch_size, load half the bytes with "
            "--dtype bfloat16, or use --device cpu",
        )
    if isinstance(error, (ValueError, OSError)):
        return in_one_line(error)
    raise error
