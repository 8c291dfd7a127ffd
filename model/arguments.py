"""The flags of train.py.

`VLMTrainingArguments` extends transformers' `TrainingArguments`, so every flag of Trainer exists here too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments

from visual.feature_cache import DTYPES

from .lora import LoraSettings

_NOT_SUPPORTED = {
    # Trainer shifts the labels of language models in its own list only; here it would smooth the wrong tokens.
    "label_smoothing_factor": "leave it out",
    "dataloader_drop_last": "no sample of an epoch is left out; leave the flag out",
    "ignore_data_skip": "a run resumes after the last sample it was given, at no cost; leave the flag out",
    "auto_find_batch_size": "give a smaller --per_device_train_batch_size, with --gradient_accumulation_steps",
    "fsdp": "every GPU holds the whole model; leave it out",
    "deepspeed": "every GPU holds the whole model; leave it out",
    "push_to_hub": "leave it out, and upload the finished checkpoint folder yourself",
}


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
        check_parsed(self)
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


def check_supported(args: VLMTrainingArguments) -> None:
    """Refuse flags that Trainer accepts, but that would train something else than they say.

    Raises:
        ValueError: naming all of them, with what to do instead.
    """
    given = [
        f"--{name} {getattr(args, name)} is not supported: {why}"
        for name, why in _NOT_SUPPORTED.items()
        if getattr(args, name)
    ]
    if given:
        raise ValueError("; ".join(given))


def check_parsed(args: VLMTrainingArguments) -> None:
    """Refuse settings that Trainer has parsed by now and that do not fit this model.

    Raises:
        ValueError: for batches that one process splits for all, orders that can't be resumed, and optimizers that
            need the model itself.
    """
    accelerator: Any = args.accelerator_config
    if accelerator.dispatch_batches:
        raise ValueError(
            '--accelerator_config {"dispatch_batches": true} is not supported: images would be split like rows, and '
            "arrive in other rows; leave it out"
        )
    strategy = choice(args.train_sampling_strategy)
    if strategy not in ("random", "sequential", "group_by_length"):
        raise ValueError(
            f"--train_sampling_strategy {strategy} is not supported; take random, sequential or group_by_length"
        )
    kind = choice(args.optim)
    if kind.startswith(("galore", "apollo", "lomo", "adalomo")):
        raise ValueError(
            f"--optim {kind} is not supported: it groups the model's parameters itself, and LoRA and projector need "
            "two learning rates; leave it out for AdamW, or take adafactor or sgd"
        )


def choice(value: Any) -> str:
    """Return what the user typed for a flag that transformers turns into an enumeration."""
    return str(getattr(value, "value", value))
