"""The command line of train.py: its flags, defaults that depend on the machine, and values that can't work.

`VLMTrainingArguments` extends transformers' `TrainingArguments`, so every flag of Trainer exists here too. What can't
work is found before a model is loaded, and said in one line.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import HfArg
from transformers.integrations import get_available_reporting_integrations

from visual.feature_cache import DTYPES

from .device import pick_device, pick_dtype
from .errors import OneLineErrors
from .help_page import HelpFormatter, ShortHelp
from .lora import LoraSettings
from .runs.global_batch import accumulation
from .scaling.flags import ScalingFlags, refusal_of

BASE_LANGUAGE_MODEL = "Qwen/Qwen-7B-Chat"
flag: Any = HfArg  # Any: a field is of its value's type for type checkers


@dataclass
class ModelArguments(ScalingFlags):
    """Which models are put together, and what of them is trained."""

    base_language_model: str = flag(
        default=None, help=f"Hub name or folder. Default: {BASE_LANGUAGE_MODEL}, or that of --previous_lora_weights."
    )
    base_value_model: str = flag(
        default="openai/clip-vit-large-patch14",
        help="Hub name or folder of the vision tower: CLIP, SigLIP, DINOv2, DINOv3 or ViT.",
    )
    lora_rank: int | None = flag(default=None, help="LoRA rank. Default: 128, or that of --previous_lora_weights.")
    lora_alpha: int | None = flag(
        default=None, help="LoRA updates are scaled by alpha / rank. Default: 32, or that of --previous_lora_weights."
    )
    lora_dropout: float = flag(default=0.10, help="Dropout before the LoRA layers.")
    target_modules: str | None = flag(
        default=None,
        help="Linear layers that get LoRA: last parts of their names, separated by bars. Default: auto (QWen: "
        "c_attn|w1|w2; others: all of attention and MLP), or those of --previous_lora_weights.",
    )
    projector_layers: int | None = flag(
        default=None, help="2 (Linear, GELU, Linear) or 1 (Linear). Default: 2, or that of --previous_lora_weights."
    )
    pixel_shuffle: int | None = flag(
        default=None,
        help="Join N x N neighbouring patches into one token, N² times as wide. Default: 1 (each patch is a token), or "
        "that of --previous_lora_weights.",
    )
    previous_lora_weights: str | None = flag(
        default=None,
        help="Checkpoint (also of the original project) whose weights training starts from: its LoRA and projector, or "
        "what --train_only trained.",
    )
    train_only: str | None = flag(
        default=None,
        help="projector: no LoRA; all: projector and the whole language model. Default: LoRA and projector.",
        metadata={"choices": ["projector", "all"]},
    )
    from_llava: str | None = flag(
        default=None, help="LLaVA folder (Hugging Face's layout) with this tower, whose projector training starts from."
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
            target_modules=None if targets in (None, "auto") else LoraSettings.parse_targets(targets),
        )


@dataclass
class DataArguments:
    """Which data the run trains and evaluates on."""

    image_map: str = flag(help="image_map.json, as dataprocess/process_image.py writes it.")
    captions_file: str = flag(help="captions.json, as dataprocess/process_image.py writes it.")
    max_train_samples: int | None = flag(default=None, help="Train on this many samples only.")
    max_length: int = flag(default=2048, help="Tokens per sample, image tokens included; longer answers are cut.")
    eval_image_map: str | None = flag(default=None, help="Like --image_map, for evaluation.")
    eval_captions_file: str | None = flag(default=None, help="Like --captions_file, for evaluation.")
    eval_generate: int | None = flag(default=None, help="Answer so many samples at each evaluation; log metrics.")
    eval_max_new_tokens: int = flag(default=64, help="Length limit of these answers, in tokens.")
    on_bad_sample: str = flag(
        default="skip", help="What a sample that cannot be used does.", metadata={"choices": ["error", "skip"]}
    )
    max_bad_fraction: float = flag(default=0.01, help="With --on_bad_sample skip: a larger share stops the run.")
    allow_links: bool = flag(default=False, help="Follow links in the image folder that lead out of it.")
    dry_run: bool = flag(default=False, help="Print parameters, tokens, steps and expected memory, then stop.")
    feature_cache: str | None = flag(
        default=None, help="Folder that stores the tower's features, so that it sees every image only once."
    )
    feature_cache_dtype: str = flag(
        default="bfloat16", help="Dtype of the features; float32 changes no result.", metadata={"choices": [*DTYPES]}
    )


@dataclass
class VLMTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the projector's learning rate, and defaults that fit this model.

    Attributes:
        frozen_dtype: dtype of the frozen weights: that of autocast, or fp32 without autocast.
    """

    feature_proj_lr: float = flag(default=1e-4, help="Learning rate of the projector; --learning_rate is that of LoRA.")
    learning_rate: float = flag(default=3e-5, help="Learning rate of LoRA; of the whole model under --train_only all.")
    global_batch_size: int | None = flag(
        default=None,
        help="Samples per step over all processes; sets --gradient_accumulation_steps to fit, on any number of GPUs.",
    )
    shard_model: bool = flag(default=False, help="Split the language model over the GPUs: each holds a share (FSDP2).")
    remove_unused_columns: bool = flag(default=False, help="Must stay false: the data set returns what is needed.")
    overwrite_output_dir: bool = flag(default=False, help="Delete the run in --output_dir, and start a new one.")
    ddp_find_unused_parameters: bool | None = flag(default=False, help="Not needed: all parts always get a gradient.")

    def __post_init__(self) -> None:
        """Refuse what Trainer accepts but would train something else than it says; derive accumulation and dtype.

        Raises:
            ValueError: for flags that are not supported, with what to do instead.
        """
        for name, advice in _NOT_SUPPORTED.items():
            if value := getattr(self, name):
                raise ValueError(f"--{name} {value} is not supported: {advice}")
        super().__post_init__()
        accelerator: Any = self.accelerator_config
        optimizer: Any = self.optim
        if accelerator.dispatch_batches:
            raise ValueError(
                '--accelerator_config {"dispatch_batches": true} is not supported: images would be split like rows, '
                "and arrive in other rows; leave it out"
            )
        if optimizer.value.startswith(("galore", "apollo", "lomo", "adalomo")):
            raise ValueError(
                f"--optim {optimizer.value} is not supported: it groups the model's parameters itself, and LoRA and "
                "projector need two learning rates; leave it out for AdamW, or take adafactor or sgd"
            )
        if self.train_sampling_strategy not in ("random", "sequential", "group_by_length"):
            raise ValueError(
                f"--train_sampling_strategy {self.train_sampling_strategy}: take random, sequential or group_by_length"
            )
        if self.lr_scheduler_kwargs or self.lr_scheduler_type not in ("linear", "cosine", "constant"):
            from .runs.schedule import check_schedule

            check_schedule(self)
        if (self.global_batch_size or 0) > 0:
            self.gradient_accumulation_steps = accumulation(self)
        if self.shard_model:
            from .scaling.sharding import check_shardable

            check_shardable(self)
        self.frozen_dtype = torch.bfloat16 if self.bf16 else torch.float16 if self.fp16 else torch.float32

    @property
    def n_gpu(self) -> int:
        """Return at most 1: torchrun starts a process per GPU, and DataParallel would split images from their rows."""
        return min(super().n_gpu, 1)


# ---- Parsing


class _Parser(OneLineErrors, HfArgumentParser):
    """Takes the flags of several dataclasses."""


def parse_arguments(
    argv: Sequence[str], description: str | None = None
) -> tuple[ModelArguments, DataArguments, VLMTrainingArguments]:
    """Read the command line; `description` is the first paragraph of `--help`.

    Raises:
        ValueError: for flags that do not exist, and for values that are impossible or contradict each other.
    """
    parser = _Parser(
        (DataArguments, ModelArguments, VLMTrainingArguments),  # type: ignore[arg-type]
        usage="train.py --image_map FILE --captions_file FILE [--FLAG VALUE …]",
        description=description,
        epilog="--help_all explains every other flag of transformers' Trainer.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("-h", "--help", action=ShortHelp, nargs=0, help="Explain the flags that matter most, and stop.")
    parser.add_argument("--help_all", "--help-all", action="help", help="Explain every flag, and stop.")
    flags, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(refusal_of(unknown))

    # Defaults that depend on the machine have to be there before `TrainingArguments` is built, because it sets up the
    # process group: two processes that learn later that they run on the CPU would each believe to be alone.
    if not torch.accelerator.is_available():
        parser.set_defaults(use_cpu=True)
    elif not flags.use_cpu:
        parser.set_defaults(dataloader_num_workers=4)
        autocast = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(pick_dtype(pick_device()))
        if autocast is not None and not any(re.fullmatch(r"--(bf16|fp16)(=.*)?", word) for word in argv):
            parser.set_defaults(**{autocast: True})
    if find_spec("tensorboard") is not None:
        parser.set_defaults(report_to="tensorboard")
    if flags.eval_image_map is not None:
        parser.set_defaults(eval_strategy="epoch")
    if flags.previous_lora_weights is None:
        parser.set_defaults(base_language_model=BASE_LANGUAGE_MODEL)
    parsed = parser.parse_args_into_dataclasses(args=argv, look_for_args_file=False)
    data_args, model_args, training_args = parsed[:3]
    check_arguments(model_args, data_args, training_args)
    return model_args, data_args, training_args


# ---- Values that cannot work

_NOT_SUPPORTED = {
    # Trainer shifts the labels of language models in its own list only; here it would smooth the wrong tokens.
    "label_smoothing_factor": "leave it out",
    "remove_unused_columns": "the data set returns exactly what the model takes; leave the flag out",
    "dataloader_drop_last": "no sample of an epoch is left out; leave the flag out",
    "ignore_data_skip": "a run resumes after the last sample it was given, at no cost; leave the flag out",
    "auto_find_batch_size": "give a smaller --per_device_train_batch_size, with --gradient_accumulation_steps",
    "fsdp": "it would split embedding and head apart, and nothing at all on the CPU; give --shard_model true",
    "deepspeed": "it trains something else where samples have no image; give --shard_model true",
    "push_to_hub": "leave it out, and upload the finished checkpoint folder yourself",
}
_COUNTS = (
    *("lora_rank", "lora_alpha", "pixel_shuffle", "max_train_samples", "max_length", "per_device_train_batch_size"),
    *("per_device_eval_batch_size", "gradient_accumulation_steps", "global_batch_size"),
    *("eval_generate", "eval_max_new_tokens"),
)
_OF_LORA = ("lora_rank", "lora_alpha", "lora_dropout", "target_modules")
_OF_EVALUATION = ("eval_image_map", "eval_captions_file", "eval_generate", "eval_max_new_tokens")
_RATES = ("learning_rate", "feature_proj_lr", "max_grad_norm", "weight_decay")


def check_arguments(model_args: ModelArguments, data_args: DataArguments, args: VLMTrainingArguments) -> None:
    """Check ranges, files, and flags that belong together.

    Raises:
        ValueError: for what is wrong, with what is expected.
    """
    values = {**vars(model_args), **vars(data_args), **vars(args)}
    ranges = {
        **{name: (lambda value: value >= 1, "at least 1") for name in _COUNTS},
        **{name: (lambda value: 0 <= value < math.inf, "a finite number, 0 or more") for name in _RATES},
        "num_train_epochs": (lambda value: 0 < value < math.inf, "a finite number above 0"),
        "lora_dropout": (lambda value: 0 <= value < 1, "at least 0 and below 1"),
        "max_bad_fraction": (lambda value: 0 <= value <= 1, "0 to 1"),
        "lr_scheduler_kwargs": (lambda value: isinstance(value, dict), """a JSON object, such as '{"mode": "max"}'"""),
        "projector_layers": (lambda value: value in (1, 2), "1 or 2"),
        "max_steps": (lambda value: value == -1 or value >= 1, "at least 1, or -1 to count by epochs"),
    }
    wrong = [
        f"--{name} {values[name]}: must be {expected}; change it, or leave it out for the default"
        for name, (is_valid, expected) in ranges.items()
        if values[name] is not None and not is_valid(values[name])
    ]
    if wrong:
        raise ValueError("; ".join(wrong))
    of_lora = [name for name in _OF_LORA if getattr(model_args, name) != getattr(ModelArguments, name)]
    if model_args.train_only is not None and of_lora:
        named = " and ".join(f"--{name}" for name in of_lora)
        raise ValueError(
            f"--train_only {model_args.train_only} trains no LoRA: leave out {named} (train.sh has some: call train.py)"
        )
    model_args.check_scaling(args)
    evaluates = any(getattr(data_args, name) != getattr(DataArguments, name) for name in _OF_EVALUATION)
    if evaluates or args.eval_strategy != "no" or args.metric_for_best_model is not None:
        from .evaluation.training_flags import check_evaluation

        check_evaluation(data_args, args)
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
