"""The command line of train.py: parsing, defaults that depend on the machine, `--help`, and values that can't work.

What can't work is found before a model is loaded, and said in one line.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool
from transformers.integrations import get_available_reporting_integrations

from .arguments import DataArguments, ModelArguments, VLMTrainingArguments, choice
from .checkpoints.base_models import num_projector_layers
from .checkpoints.checkpoint import Checkpoint, CheckpointError
from .console import OneLineErrors
from .device import has_accelerator, pick_device, pick_dtype
from .lora import LoraSettings


def parse_arguments(
    argv: Sequence[str], description: str | None = None
) -> tuple[ModelArguments, DataArguments, VLMTrainingArguments]:
    """Read the command line.

    Args:
        argv: its words.
        description: the first paragraphs of `--help`.

    Raises:
        ValueError: for flags that do not exist, and for values that are impossible or contradict each other.
    """
    parser = _Parser(
        (DataArguments, ModelArguments, VLMTrainingArguments),  # type: ignore[arg-type]
        usage="train.py --image_map FILE --captions_file FILE [--FLAG VALUE …]",
        description=description,
        epilog="--help_all explains every other flag of transformers' Trainer.",
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument(
        "-h", "--help", action=_ShortHelp, nargs=0, help="Explain the flags that matter most, and stop."
    )
    parser.add_argument("--help_all", "--help-all", action="help", help="Explain every flag, and stop.")
    *parsed, unknown = parser.parse_args_into_dataclasses(
        args=with_machine_defaults(argv), look_for_args_file=False, return_remaining_strings=True
    )
    if unknown:
        parser.error(f"unknown flags: {' '.join(unknown)}")
    data_args, model_args, training_args = parsed[:3]
    check_arguments(model_args, data_args, training_args)
    return model_args, data_args, training_args


def with_machine_defaults(argv: Sequence[str]) -> list[str]:
    """Add the flags whose default depends on the machine, unless the user gave them.

    They are added before `TrainingArguments` is built, because it sets up the process group: two processes that learn
    later that they run on the CPU would each believe to be alone.
    """
    given = {word.split("=", 1)[0].replace("-", "_").removeprefix("__") for word in argv if word.startswith("--")}
    defaults: dict[str, str] = {}
    if not has_accelerator():
        defaults["use_cpu"] = "true"
    device = torch.device("cpu") if _asks_for("use_cpu", argv, default=not has_accelerator()) else pick_device()
    if device.type != "cpu":
        defaults["dataloader_num_workers"] = "4"
    if not given & {"bf16", "fp16"}:
        autocast = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(pick_dtype(device))
        if autocast is not None:
            defaults[autocast] = "true"
    if find_spec("tensorboard") is not None:
        defaults["report_to"] = "tensorboard"
    if "eval_image_map" in given:
        defaults["eval_strategy"] = "epoch"
    added = [word for name, value in defaults.items() if name not in given for word in (f"--{name}", value)]
    return [*added, *argv]


def is_dry_run(argv: Sequence[str]) -> bool:
    """Return whether the command line asks for `--dry_run`."""
    return _asks_for("dry_run", argv, default=False)


def _asks_for(flag: str, argv: Sequence[str], *, default: bool) -> bool:
    """Read one yes-or-no flag before the others are parsed."""
    parser = OneLineErrors(add_help=False, allow_abbrev=False)
    parser.add_argument(
        f"--{flag}",
        f"--{flag.replace('_', '-')}",
        dest=flag,
        type=string_to_bool,
        nargs="?",
        const=True,
        default=default,
    )
    return bool(getattr(parser.parse_known_args(argv)[0], flag))


# ---- Values that cannot work

_Range = tuple[Callable[[Any], bool], str]
_AT_LEAST_1: _Range = (lambda value: value >= 1, "at least 1")
_NOT_NEGATIVE: _Range = (lambda value: 0 <= value < math.inf, "0 or more")
_RANGES: dict[str, _Range] = {
    "lora_rank": _AT_LEAST_1,
    "lora_alpha": _AT_LEAST_1,
    "lora_dropout": (lambda value: 0 <= value < 1, "at least 0 and below 1"),
    "projector_layers": (lambda value: value in (1, 2), "1 or 2"),
    "max_train_samples": _AT_LEAST_1,
    "max_length": _AT_LEAST_1,
    "max_bad_fraction": (lambda value: 0 <= value <= 1, "0 to 1"),
    "learning_rate": _NOT_NEGATIVE,
    "feature_proj_lr": _NOT_NEGATIVE,
    "per_device_train_batch_size": _AT_LEAST_1,
    "per_device_eval_batch_size": _AT_LEAST_1,
    "gradient_accumulation_steps": _AT_LEAST_1,
    "global_batch_size": _AT_LEAST_1,
    "max_steps": (lambda value: value == -1 or value >= 1, "at least 1, or -1 to count by epochs"),
    "max_grad_norm": _NOT_NEGATIVE,
    "weight_decay": _NOT_NEGATIVE,
    "num_train_epochs": (lambda value: 0 < value < math.inf, "above 0"),
}


def check_arguments(model_args: ModelArguments, data_args: DataArguments, args: VLMTrainingArguments) -> None:
    """Check ranges, files, and flags that belong together.

    Raises:
        ValueError: for what is wrong, with what is expected.
    """
    values = {name: value for group in (model_args, data_args, args) for name, value in vars(group).items()}
    wrong = [
        f"--{name} {values[name]}: must be {expected}"
        for name, (is_valid, expected) in _RANGES.items()
        if values[name] is not None and not is_valid(values[name])
    ]
    if wrong:
        raise ValueError("; ".join(wrong))
    if (data_args.eval_image_map is None) != (data_args.eval_captions_file is None):
        raise ValueError("--eval_image_map and --eval_captions_file belong together; one of them is missing")
    if args.eval_strategy != "no" and data_args.eval_image_map is None:
        raise ValueError(
            f"--eval_strategy {choice(args.eval_strategy)} needs --eval_image_map and --eval_captions_file; "
            "give both, or leave it out"
        )
    if args.remove_unused_columns:
        raise ValueError("--remove_unused_columns must be false: the data set returns exactly what the model takes")
    for name in ("image_map", "captions_file", "eval_image_map", "eval_captions_file"):
        path = getattr(data_args, name)
        if path is not None and not Path(path).is_file():
            raise ValueError(f"--{name} {path}: there is no such file; dataprocess/process_image.py writes it")
    missing = set(args.report_to or ()) - set(get_available_reporting_integrations())
    if missing:
        raise ValueError(f"--report_to {' '.join(sorted(missing))}: not installed; install it, or give none")
    for name, folder in (("output_dir", args.output_dir), ("feature_cache", data_args.feature_cache)):
        if folder is not None and Path(folder).exists() and not Path(folder).is_dir():
            raise ValueError(f"--{name} {folder} is a file; give a folder, which is made if need be")


def check_previous(asked: ModelArguments, checkpoint: Checkpoint) -> None:
    """Compare explicit flags with the checkpoint that training starts from; no base model is needed for that.

    Args:
        asked: the flags.
        checkpoint: the one that `--previous_lora_weights` names.

    Raises:
        CheckpointError: if they disagree.
    """
    config, targets = checkpoint.lora_config, asked.target_modules
    flags = {
        "lora_rank": (asked.lora_rank, config.r),
        "lora_alpha": (asked.lora_alpha, config.lora_alpha),
        "target_modules": (
            None if targets is None else _with_bars(LoraSettings.parse_targets(targets)),
            _with_bars(name.rsplit(".", 1)[-1] for name in config.target_modules or ()),
        ),
        "projector_layers": (asked.projector_layers, num_projector_layers(checkpoint)),
    }
    for name, (wanted, trained) in flags.items():
        if wanted is not None and wanted != trained:
            raise CheckpointError(
                f"--{name} {wanted} disagrees with --previous_lora_weights {asked.previous_lora_weights}, which was "
                f"trained with {trained}; leave the flag out or give {trained}"
            )


def _with_bars(names: Iterable[str]) -> str:
    return "|".join(sorted(set(names)))


# ---- --help

_OF_TRAINER = {
    *("output_dir", "learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs"),
    *("max_steps", "warmup_steps", "lr_scheduler_type", "optim", "bf16", "gradient_checkpointing", "seed", "report_to"),
    *("dataloader_num_workers", "train_sampling_strategy", "logging_steps", "save_steps", "save_total_limit"),
    *("eval_strategy", "load_best_model_at_end", "resume_from_checkpoint"),
}
_SHOWN = {
    *_OF_TRAINER,
    *(flag.name for group in (ModelArguments, DataArguments) for flag in dataclasses.fields(group)),
    *VLMTrainingArguments.__annotations__,
    *("help", "help_all"),
}
"""The flags that `--help` explains; `--help_all` explains some 120 more."""


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults except None, whose meaning the flag's own help explains."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class _Parser(OneLineErrors, HfArgumentParser):
    """Takes the flags of several dataclasses."""


class _ShortHelp(argparse.Action):
    """`--help`: this project's flags, and those of Trainer that matter most."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        """Print the help and end the program."""
        for action in parser._actions:
            if action.dest not in _SHOWN:
                action.help = argparse.SUPPRESS
        parser.print_help()
        parser.exit()
