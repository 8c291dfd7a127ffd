"""The command line of train.py: its flags, and the defaults that depend on the machine.

`VLMTrainingArguments` extends transformers' `TrainingArguments`, so every flag of Trainer exists here too.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, get_type_hints

import torch
from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import string_to_bool

from visual.feature_cache import DTYPES

from .argument_checks import check_arguments, check_optimizer, check_supported
from .console import OneLineErrors
from .device import has_accelerator, pick_device, pick_dtype
from .lora import LoraSettings


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
            "help": "Linear layers that get LoRA: last parts of their names, separated by bars. "
            "Default: c_attn|w1|w2, or those of --previous_lora_weights."
        },
    )
    projector_layers: int | None = field(
        default=None,
        metadata={"help": "2 (Linear, GELU, Linear) or 1 (Linear). Default: 2, or that of --previous_lora_weights."},
    )
    previous_lora_weights: str | None = field(
        default=None,
        metadata={"help": "Checkpoint (also of the original project) whose LoRA and projector training starts from."},
    )

    @property
    def lora_settings(self) -> LoraSettings:
        """Return the settings of fresh LoRA layers."""
        default = LoraSettings()
        targets = self.target_modules
        return LoraSettings(
            rank=self.lora_rank or default.rank,
            alpha=self.lora_alpha or default.alpha,
            dropout=self.lora_dropout,
            target_modules=default.target_modules if targets is None else LoraSettings.parse_targets(targets),
        )


@dataclass
class DataArguments:
    """Which data the run trains and evaluates on."""

    image_map: str = field(metadata={"help": "image_map.json, as dataprocess/process_image.py writes it."})
    captions_file: str = field(metadata={"help": "captions.json, as dataprocess/process_image.py writes it."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on this many samples only."})
    max_length: int = field(
        default=2048, metadata={"help": "Tokens per sample, image tokens included; longer answers are cut."}
    )
    eval_image_map: str | None = field(default=None, metadata={"help": "Like --image_map, for evaluation."})
    eval_captions_file: str | None = field(default=None, metadata={"help": "Like --captions_file, for evaluation."})
    on_bad_sample: str = field(
        default="skip",
        metadata={"help": "What a sample that cannot be used does.", "choices": ["error", "skip"]},
    )
    max_bad_fraction: float = field(
        default=0.01, metadata={"help": "With --on_bad_sample skip: a larger share of bad samples stops the run."}
    )
    allow_links: bool = field(default=False, metadata={"help": "Follow links in the image folder that lead out of it."})
    dry_run: bool = field(
        default=False,
        metadata={"help": "Print parameters, tokens, steps and expected memory, then stop. No weights are needed."},
    )
    feature_cache: str | None = field(
        default=None,
        metadata={"help": "Folder that stores the tower's features, so that it sees every image only once."},
    )
    feature_cache_dtype: str = field(
        default="bfloat16",
        metadata={"help": "Dtype of the stored features; float32 changes no result.", "choices": list(DTYPES)},
    )


@dataclass
class VLMTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the projector's learning rate, and defaults that fit this model."""

    feature_proj_lr: float = field(
        default=1e-4, metadata={"help": "Learning rate of the projector; --learning_rate is that of LoRA."}
    )
    learning_rate: float = field(default=3e-5, metadata={"help": "Learning rate of the LoRA layers."})
    global_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Samples per optimizer step over all processes; sets --gradient_accumulation_steps to fit, so that "
            "a run can resume with another number of GPUs."
        },
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay false: the data set returns exactly what the model takes."}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Delete the run that --output_dir holds, and start a new one."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False,
        metadata={"help": "Not needed: LoRA and projector get a gradient in every step, also without an image."},
    )

    def __post_init__(self) -> None:
        """Refuse what Trainer would accept and this project does not do; derive the accumulation.

        Raises:
            ValueError: for flags that are not supported, with what to do instead.
        """
        check_supported(self)
        super().__post_init__()
        check_optimizer(self)
        if self.global_batch_size is not None:
            self.gradient_accumulation_steps = self._accumulation(self.global_batch_size)

    def _accumulation(self, global_batch_size: int) -> int:
        """Return how many batches of all processes make up one optimizer step of `global_batch_size` samples."""
        per_batch = self.per_device_train_batch_size * self.world_size
        batch = f"{self.per_device_train_batch_size} rows (--per_device_train_batch_size) × {self.world_size} processes"
        steps, rest = divmod(global_batch_size, max(per_batch, 1))
        if rest or steps < 1:
            raise ValueError(
                f"--global_batch_size {global_batch_size}: must be a multiple of {batch} = {per_batch}; change one of "
                "them"
            )
        if self.gradient_accumulation_steps not in (1, steps):  # 1 is the default, and what train.sh gives
            raise ValueError(
                f"--global_batch_size {global_batch_size} over {batch} takes --gradient_accumulation_steps {steps}, "
                f"got {self.gradient_accumulation_steps}; leave one of the two flags out"
            )
        return steps

    @property
    def n_gpu(self) -> int:
        """Return at most 1: torchrun starts a process per GPU, and DataParallel would split images from their rows."""
        return min(super().n_gpu, 1)

    @property
    def frozen_dtype(self) -> torch.dtype:
        """Return the dtype of the frozen weights: that of autocast, or fp32 without autocast."""
        return torch.bfloat16 if self.bf16 else torch.float16 if self.fp16 else torch.float32


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
        (ModelArguments, DataArguments, VLMTrainingArguments),  # type: ignore[arg-type]
        description=description,
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("-h", "--help", action=_ShortHelp, help="Explain the flags that matter most, and stop.")
    parser.add_argument("--help_all", "--help-all", action="help", help="Explain every flag, and stop.")
    *parsed, unknown = parser.parse_args_into_dataclasses(
        args=with_machine_defaults(argv), look_for_args_file=False, return_remaining_strings=True
    )
    if unknown:
        parser.error(f"unknown flags: {' '.join(unknown)}")
    model_args, data_args, training_args = parsed[:3]
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


# ---- --help

_SHOWN_FIRST = (
    *("output_dir", "learning_rate", "feature_proj_lr", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("global_batch_size", "num_train_epochs", "max_steps", "warmup_steps", "lr_scheduler_type", "optim", "bf16"),
    *("gradient_checkpointing", "dataloader_num_workers", "train_sampling_strategy", "logging_steps", "save_steps"),
    *("save_total_limit", "eval_strategy", "load_best_model_at_end", "seed", "report_to", "resume_from_checkpoint"),
    *("overwrite_output_dir", "remove_unused_columns", "ddp_find_unused_parameters"),
)
"""Trainer's flags that `--help` explains; `--help_all` explains some 120 more."""


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults except None, whose meaning the flag's own help explains."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class _Parser(OneLineErrors, HfArgumentParser):
    """Takes the flags of several dataclasses."""


class _ShortHelp(argparse.Action):
    """`--help`: this project's flags, and those of Trainer that matter most."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        """Print the help and end the program."""
        fields = {one.name: one for one in dataclasses.fields(VLMTrainingArguments)}
        types = get_type_hints(VLMTrainingArguments)
        shown = dataclasses.make_dataclass(
            "Shown", [(name, types[name], _without_name(fields[name])) for name in _SHOWN_FIRST]
        )
        short = _Parser(
            (DataArguments, ModelArguments, shown),  # type: ignore[arg-type]
            usage="train.py --image_map FILE --captions_file FILE [--FLAG VALUE …]",
            description=parser.description,
            epilog="--help_all explains every other flag of transformers' Trainer.",
            formatter_class=_HelpFormatter,
        )
        short.print_help()
        parser.exit()


def _without_name(of: dataclasses.Field[Any]) -> Any:
    """Copy a dataclass field so that another class can take it."""
    return field(default=of.default, default_factory=of.default_factory, metadata=of.metadata)
