"""The model that a run trains, as the flags of train.py ask for it."""

from __future__ import annotations

from collections.abc import Iterable

from .arguments import ModelArguments
from .checkpoints.base_models import num_projector_layers
from .checkpoints.checkpoint import Checkpoint, CheckpointError, read_checkpoint
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
    if previous is not None:
        check_previous(model_args, read_checkpoint(previous))
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
        return model
    default = LoraSettings()
    targets = model_args.target_modules
    model.add_lora(
        LoraSettings(
            rank=model_args.lora_rank or default.rank,
            alpha=model_args.lora_alpha or default.alpha,
            dropout=model_args.lora_dropout,
            target_modules=default.target_modules if targets is None else LoraSettings.parse_targets(targets),
        )
    )
    return model


def check_previous(asked: ModelArguments, checkpoint: Checkpoint) -> None:
    """Hold explicit flags against the checkpoint that training starts from; no base model is needed for that.

    Args:
        asked: the flags.
        checkpoint: what `--previous_lora_weights` names.

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
    for name, (wanted, there) in flags.items():
        if wanted is not None and wanted != there:
            raise CheckpointError(
                f"--{name} {wanted} disagrees with --previous_lora_weights {asked.previous_lora_weights}, which was "
                f"trained with {there}; leave the flag out or give {there}"
            )


def _with_bars(names: Iterable[str]) -> str:
    return "|".join(sorted(set(names)))
