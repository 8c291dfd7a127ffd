"""The flags of test.py that say how answers are generated."""

from __future__ import annotations

import argparse
from typing import Any


def add_generation_flags(parser: argparse.ArgumentParser) -> None:
    """Add them to a command line."""
    generation = parser.add_argument_group(
        "generation", "What is not given is as the model's generation_config.json says."
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


def generation_options(args: argparse.Namespace) -> dict[str, Any]:
    """The generation settings that were given.

    Raises:
        ValueError: if one is out of its range.
    """
    for name, valid, wanted in (
        ("seed", lambda value: 0 <= value < 2**32, "at least 0 and below 2**32"),
        ("batch_size", lambda value: value >= 1, "at least 1"),
        ("max_new_tokens", lambda value: value >= 1, "at least 1"),
        ("temperature", lambda value: value > 0, "above 0; for no randomness use --greedy"),
        ("top_p", lambda value: 0 < value <= 1, "above 0 and at most 1"),
        ("top_k", lambda value: value >= 0, "at least 0"),
        ("repetition_penalty", lambda value: value > 0, "above 0"),
    ):
        value = getattr(args, name)
        if value is not None and not valid(value):
            raise ValueError(f"--{name} {value}: must be {wanted}")
    names = ("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "do_sample")
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}
