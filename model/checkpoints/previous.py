"""Earlier weights: a run may start from those of a checkpoint, and a model may return to them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from ..arguments import ModelArguments
from ..lora import LoraSettings
from .checkpoint import check_bases, load_projector, read_adapter, read_checkpoint
from .folder import CheckpointError
from .readers import Checkpoint


def check_previous(asked: ModelArguments, checkpoint: Checkpoint) -> None:
    """Compare explicit flags with the checkpoint that `--previous_lora_weights` names; no base model is needed.

    Raises:
        CheckpointError: if they disagree.
    """
    config, targets = checkpoint.lora_config, asked.target_modules
    flags = {
        "lora_rank": (asked.lora_rank, config.r),
        "lora_alpha": (asked.lora_alpha, config.lora_alpha),
        "target_modules": (
            None if targets in (None, "auto") else _with_bars(LoraSettings.parse_targets(targets)),
            _with_bars(name.rsplit(".", 1)[-1] for name in config.target_modules or ()),
        ),
        "projector_layers": (asked.projector_layers, checkpoint.projector_layers),
        "pixel_shuffle": (asked.pixel_shuffle, checkpoint.pixel_shuffle),
    }
    for name, (wanted, trained) in flags.items():
        if wanted is not None and wanted != trained:
            raise CheckpointError(
                f"--{name} {wanted} disagrees with --previous_lora_weights {asked.previous_lora_weights}, which was "
                f"trained with {trained}; leave the flag out or give {trained}"
            )


def _with_bars(names: Iterable[str]) -> str:
    return "|".join(sorted(set(names)))


def restore_weights(model: Any, folder: str | os.PathLike[str]) -> None:
    """Do what `VisionLanguageModel.load_checkpoint` says."""
    checkpoint = read_checkpoint(folder)
    check_bases(checkpoint, model.vision_tower, model.qwen, model.fingerprints)
    alpha = model.language_model.peft_config["default"].lora_alpha
    if checkpoint.lora_config.lora_alpha != alpha:
        raise CheckpointError(
            f"checkpoint {checkpoint.folder} was trained with lora_alpha {checkpoint.lora_config.lora_alpha}, the "
            f"model has {alpha}; give the same --lora_alpha"
        )
    weights = read_adapter(model.language_model, checkpoint.folder)
    load_projector(model.projector, checkpoint.folder)
    model.language_model.load_state_dict(weights, strict=False)  # both fit: nothing changes before that is known
