"""Trainer's settings as this project has them: one learning rate more, other defaults, and what is not supported."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments


@dataclass
class VLMTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the projector's learning rate, and defaults that fit this model."""

    feature_proj_lr: float = field(
        default=1e-4, metadata={"help": "Learning rate of the projector; --learning_rate is that of LoRA."}
    )
    learning_rate: float = field(default=3e-5, metadata={"help": "Learning rate of the LoRA layers."})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay false: the data set gives what the model takes."}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Delete the run that --output_dir holds, and start anew."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False,
        metadata={"help": "Not needed: LoRA and projector get a gradient in every step, without an image too."},
    )

    def __post_init__(self) -> None:
        """Refuse what would train something else than it says.

        Raises:
            ValueError: for flags that are not supported, and what to do instead.
        """
        reasons = {
            # Trainer shifts the labels of language models in its own list only; here it would smooth the wrong tokens.
            "label_smoothing_factor": "leave it out",
            "dataloader_drop_last": "no sample of an epoch is left out; leave the flag out",
            "ignore_data_skip": "a run goes on behind the last sample it was given, at no cost; leave the flag out",
            "auto_find_batch_size": "give a smaller --per_device_train_batch_size, with --gradient_accumulation_steps",
            "fsdp": "every GPU holds the whole model; leave it out",
            "deepspeed": "every GPU holds the whole model; leave it out",
        }
        given = [
            f"--{name} {getattr(self, name)} is not supported: {why}"
            for name, why in reasons.items()
            if getattr(self, name)
        ]
        if given:
            raise ValueError("; ".join(given))
        super().__post_init__()

    @property
    def n_gpu(self) -> int:
        """At most 1: torchrun starts a process for each GPU, and DataParallel would part images from their rows."""
        return min(super().n_gpu, 1)

    @property
    def frozen_dtype(self) -> torch.dtype:
        """Dtype of the frozen weights: that of autocast, fp32 where there is none."""
        return torch.bfloat16 if self.bf16 else torch.float16 if self.fp16 else torch.float32
