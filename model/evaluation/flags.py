"""The flags of evaluate.py: which of them go together."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from dataprocess.messages import shorten

_OF_COMPARE = ("--compare", "--output", "--seed")
_OF_A_MODEL = (
    "--base_language_model",
    "--base_value_model",
    "--batch_size",
    "--blind",
    "--device",
    "--device_map",
    "--dtype",
    "--load_in_4bit",
    "--load_in_8bit",
    "--max_memory",
    "--max_new_tokens",
    "--offload_folder",
    "--system",
)
_OF_QUESTIONS = ("--annotations", "--image_folder", "--prompt")


def check_flags(args: argparse.Namespace, argv: Sequence[str]) -> argparse.Namespace:
    """Refuse flags that are missing, out of their range, or do not go together; return the same.

    Args:
        args: the flags of evaluate.py.
        argv: the command line that they were read from. A flag that would have no effect is refused even if its value
            is the default.

    Raises:
        ValueError: if there is such a flag.
    """
    given = sorted({word.split("=")[0] for word in argv if word.startswith("--") and word != "--"})
    if not 0 <= args.seed < 2**32:
        raise ValueError(f"--seed {args.seed}: must be at least 0 and below 2**32")
    if args.output is not None:
        _check_output(args.output)
    if args.compare is not None:
        _refuse([flag for flag in given if flag not in _OF_COMPARE], "--compare", "takes --output and --seed alone")
        return args
    if (args.questions is None) == (args.image_map is None) or (args.image_map is None) != (args.captions_file is None):
        raise ValueError("give either --questions FILE, or --image_map FILE with --captions_file FILE")
    if args.image_map is not None:
        _refuse([flag for flag in given if flag in _OF_QUESTIONS], "--image_map", "brings its own")
    if (args.model_weights is None) == (args.answers is None):
        raise ValueError("give either --model_weights FOLDER, to ask a model, or --answers FILE, to score answers")
    if args.answers is not None:
        _refuse([flag for flag in given if flag in _OF_A_MODEL], "--answers", "asks no model")
    if args.image_folder is not None and not args.image_folder.is_dir():
        raise ValueError(f"--image_folder {args.image_folder}: there is no such folder")
    if args.output is None:
        raise ValueError("--output is missing: give a folder for the results")
    written = args.output / "answers.jsonl"
    for flag, paths in (("--questions", args.questions), ("--answers", args.answers)):
        if any(path.exists() and written.exists() and path.samefile(written) for path in paths or []):
            raise ValueError(f"{flag} {written} would be overwritten; give another --output")
    return args


def _refuse(flags: Sequence[str], by: str, reason: str) -> None:
    """Refuse flags that would have no effect."""
    if flags:
        raise ValueError(f"{by} {reason}; leave out {', '.join(flags)}")


def _check_output(path: Path) -> None:
    try:
        is_something_else = path.exists() and not path.is_dir()
    except OSError as error:
        raise ValueError(f"--output {shorten(str(path))}: {error.strerror}; give a folder for the results") from error
    if is_something_else:
        raise ValueError(f"--output {path}: is a file; give a folder for the results")


def make_folder(path: Path) -> None:
    """Create the output folder.

    Raises:
        ValueError: if that is not possible.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # ValueError: characters that no file name can hold
        why = getattr(error, "strerror", None) or error
        raise ValueError(f"--output {shorten(str(path))}: the folder can't be created: {why}") from error
