"""The model that a run trains, as the flags of train.py ask for it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from .arguments import ModelArguments
from .checkpoint import CheckpointError, read_checkpoint
from .lora import LoraSettings
from .training_arguments import VLMTrainingArguments
from .vision_language_model import VisionLanguageModel


def build_model(model_args: ModelArguments, args: VLMTrainingArguments) -> VisionLanguageModel:
    """Load both base models and put LoRA layers in, fresh ones or those of a checkpoint.

    Raises:
        CheckpointError: if the previous weights do not fit the base models or an explicit flag.
        LoraTargetError: if target modules do not exist.
    """
    previous = model_args.previous_lora_weights
    targets = model_args.target_modules
    asked = None if targets is None else LoraSettings.parse_targets(targets)
    if previous is not None:
        config = read_checkpoint(previous).lora_config
        check_previous(previous, lora_rank=(model_args.lora_rank, config.r))
        check_previous(previous, lora_alpha=(model_args.lora_alpha, config.lora_alpha))
    model = VisionLanguageModel.from_pretrained(
        model_args.base_language_model,
        model_args.base_value_model,
        previous,
        dtype=args.frozen_dtype,
        device=args.device,
        trainable=True,
        lora_dropout=model_args.lora_dropout,
        projector_layers=model_args.projector_layers or 2,
    )
    if previous is not None:
        names = (name for name, _ in model.named_parameters() if ".lora_A." in name)
        there = {name.split(".lora_A.")[0].rsplit(".", 1)[-1] for name in names}
        check_previous(previous, target_modules=(_with_bars(asked), _with_bars(there)))
        check_previous(previous, projector_layers=(model_args.projector_layers, model.projector_layers))
        return model
    default = LoraSettings()
    model.add_lora(
        LoraSettings(
            rank=model_args.lora_rank or default.rank,
            alpha=model_args.lora_alpha or default.alpha,
            dropout=model_args.lora_dropout,
            target_modules=default.target_modules if asked is None else asked,
        )
    )
    return model


def check_previous(folder: str, **flags: tuple[Any, Any]) -> None:
    """Hold explicit flags against the checkpoint that training starts from.

    Args:
        folder: the checkpoint.
        flags: for a flag's name, what was asked for (None: nothing) and what the checkpoint has.

    Raises:
        CheckpointError: if they disagree.
    """
    for name, (asked, there) in flags.items():
        if asked is not None and asked != there:
            raise CheckpointError(
                f"--{name} {asked} disagrees with --previous_lora_weights {folder}, which was trained with {there}; "
                f"leave the flag out or give {there}"
            )


def _with_bars(names: Collection[str] | None) -> str | None:
    return None if names is None else "|".join(sorted(set(names)))
