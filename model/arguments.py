"""The command line of train.py: its flags, defaults that depend on the machine, and values that can't be.

Beside the flags here, every flag of transformers' `TrainingArguments` is taken.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool
from transformers.integrations import get_available_reporting_integrations

from visual.feature_cache import DTYPES

from .console import OneLineErrors
from .device import has_accelerator, pick_device, pick_dtype
from .training_arguments import VLMTrainingArguments


@dataclass
class ModelArguments:
    """Which models are put together, and which LoRA layers are trained."""

    base_language_model: str = field(
        default="Qwen/Qwen-7B-Chat", metadata={"help": "Hub name or folder of the QWen language model."}
    )
    base_value_model: str = field(
        default="openai/clip-vit-large-patch14",
        metadata={"help": "Hub name or folder of the vision tower: CLIP, SigLIP, DINOv2 or ViT."},
    )
    lora_rank: int | None = field(
        default=None, metadata={"help": "LoRA rank. Default: 128, or that of --previous_lora_weights."}
    )
    lora_alpha: int | None = field(
        default=None,
        metadata={"help": "LoRA updates are scaled by alpha / rank. Default: 32, or that of --previous_lora_weights."},
    )
    lora_dropout: float = field(default=0.10, metadata={"help": "Dropout before the LoRA layers."})
    target_modules: str | None = field(
        default=None,
        metadata={
            "help": "Linear layers that get LoRA: last parts of their names, with bars. "
            "Default: c_attn|w1|w2, or those of --previous_lora_weights."
        },
    )
    projector_layers: int | None = field(
        default=None,
        metadata={"help": "2 (Linear, GELU, Linear) or 1 (Linear). Default: 2, or those of --previous_lora_weights."},
    )
    previous_lora_weights: str | None = field(
        default=None,
        metadata={"help": "Checkpoint (the original project's too) whose LoRA and projector training starts from."},
    )


@dataclass
class DataArguments:
    """What is trained and evaluated on."""

    image_map: str = field(metadata={"help": "image_map.json, as dataprocess/process_image.py writes it."})
    captions_file: str = field(metadata={"help": "captions.json, likewise."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on the first so many samples only."})
    max_length: int = field(
        default=2048, metadata={"help": "Tokens per sample, image tokens included; longer answers are cut."}
    )
    eval_image_map: str | None = field(default=None, metadata={"help": "As --image_map, for evaluation."})
    eval_captions_file: str | None = field(default=None, metadata={"help": "As --captions_file, for evaluation."})
    on_bad_sample: str = field(
        default="skip",
        metadata={"help": "What a sample that can't be used does.", "choices": ["error", "skip"]},
    )
    max_bad_fraction: float = field(
        default=0.01, metadata={"help": "With --on_bad_sample skip: more bad samples than this share stop the run."}
    )
    allow_links: bool = field(default=False, metadata={"help": "Follow links in the image folder that lead out of it."})
    dry_run: bool = field(
        default=False,
        metadata={"help": "Print parameters, tokens, steps and the memory to expect, and stop. No weights are needed."},
    )
    feature_cache: str | None = field(
        default=None,
        metadata={"help": "Folder in which the tower's features are kept, so that it sees no image twice."},
    )
    feature_cache_dtype: str = field(
        default="bfloat16",
        metadata={"help": "What they are stored in; float32 changes no result.", "choices": list(DTYPES)},
    )


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Says defaults, but for None: what happens then stands in the flag's own words."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class _Parser(OneLineErrors, HfArgumentParser):
    """Takes the flags of several dataclasses."""


def with_machine_defaults(argv: Sequence[str]) -> list[str]:
    """Add the flags whose default depends on the machine, where the user said nothing.

    They go in before `TrainingArguments` is built: it sets the process group up, and two processes that learn of the
    CPU later each believe they are alone.
    """
    given = {word.split("=", 1)[0].replace("-", "_").removeprefix("__") for word in argv if word.startswith("--")}
    defaults: dict[str, str] = {}
    if not has_accelerator():
        defaults["use_cpu"] = "true"
    asked = OneLineErrors(add_help=False, allow_abbrev=False)
    asked.add_argument(
        "--use_cpu", "--use-cpu", type=string_to_bool, nargs="?", const=True, default=not has_accelerator()
    )
    device = torch.device("cpu") if asked.parse_known_args(argv)[0].use_cpu else pick_device()
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
    """Whether the command line asks for `--dry_run`."""
    asked = OneLineErrors(add_help=False, allow_abbrev=False)
    asked.add_argument("--dry_run", "--dry-run", type=string_to_bool, nargs="?", const=True, default=False)
    return bool(asked.parse_known_args(argv)[0].dry_run)


def parse_arguments(
    argv: Sequence[str], description: str | None = None
) -> tuple[ModelArguments, DataArguments, VLMTrainingArguments]:
    """Read the command line.

    Args:
        argv: its words.
        description: what `--help` says first.

    Raises:
        ValueError: for flags that do not exist, and for values that are impossible or contradict each other.
    """
    parser = _Parser(
        (ModelArguments, DataArguments, VLMTrainingArguments),  # type: ignore[arg-type]
        description=description,
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    *parsed, unknown = parser.parse_args_into_dataclasses(
        args=with_machine_defaults(argv), look_for_args_file=False, return_remaining_strings=True
    )
    if unknown:
        parser.error(f"not understood: {' '.join(unknown)}")
    model_args, data_args, training_args = parsed
    check_values(model_args, data_args, training_args)
    if (data_args.eval_image_map is None) != (data_args.eval_captions_file is None):
        raise ValueError("--eval_image_map and --eval_captions_file go together; one of them is missing")
    if training_args.eval_strategy != "no" and data_args.eval_image_map is None:
        raise ValueError(
            f"--eval_strategy {training_args.eval_strategy.value} needs --eval_image_map and --eval_captions_file; "
            "give both, or leave it out"
        )
    if training_args.remove_unused_columns:
        raise ValueError("--remove_unused_columns must be false: the data set gives just what the model takes")
    for name in ("image_map", "captions_file", "eval_image_map", "eval_captions_file"):
        path = getattr(data_args, name)
        if path is not None and not Path(path).is_file():  # found now, not after the base models are loaded
            raise ValueError(f"--{name} {path}: there is no such file; dataprocess/process_image.py writes it")
    absent = set(training_args.report_to) - set(get_available_reporting_integrations())
    if absent:
        raise ValueError(f"--report_to {' '.join(sorted(absent))}: not installed here; install it, or say none")
    if Path(str(training_args.output_dir)).is_file():
        raise ValueError(f"--output_dir {training_args.output_dir} is a file; give a folder, which is made if need be")
    cache = Path(data_args.feature_cache or ".")
    if cache.exists() and not cache.is_dir():
        raise ValueError(f"--feature_cache {cache} is a file; give a folder, which is made if need be")
    return model_args, data_args, training_args


def check_values(*arguments: object) -> None:
    """Hold numbers against their ranges, which would else come to light deep inside a library, if at all.

    Raises:
        ValueError: with every value that is out of its range.
    """
    at_least_1: tuple[Callable[[Any], bool], str] = (lambda value: value >= 1, "at least 1")
    not_negative: tuple[Callable[[Any], bool], str] = (lambda value: 0 <= value < math.inf, "0 or more")
    ranges = {
        "lora_rank": at_least_1,
        "lora_alpha": at_least_1,
        "lora_dropout": (lambda value: 0 <= value < 1, "at least 0 and below 1"),
        "projector_layers": (lambda value: value in (1, 2), "1 or 2"),
        "max_train_samples": at_least_1,
        "max_length": at_least_1,
        "max_bad_fraction": (lambda value: 0 <= value <= 1, "0 to 1"),
        "learning_rate": not_negative,
        "feature_proj_lr": not_negative,
        "per_device_train_batch_size": at_least_1,
        "per_device_eval_batch_size": at_least_1,
        "gradient_accumulation_steps": at_least_1,
        "max_steps": (lambda value: value == -1 or value >= 1, "at least 1, or -1: by epochs"),
        "max_grad_norm": not_negative,
        "weight_decay": not_negative,
        "num_train_epochs": (lambda value: 0 < value < math.inf, "above 0"),
    }
    values = {name: value for group in arguments for name, value in vars(group).items()}
    wrong = [
        f"--{name} {values[name]}: must be {wanted}"
        for name, (is_valid, wanted) in ranges.items()
        if values[name] is not None and not is_valid(values[name])
    ]
    if wrong:
        raise ValueError("; ".join(wrong))
