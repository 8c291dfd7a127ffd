"""The vision-language model: its parts, their checkpoints, and the Trainer subclass."""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .arguments import VLMTrainingArguments
    from .checkpoints.checkpoint import read_checkpoint
    from .checkpoints.folder import CheckpointError
    from .checkpoints.readers import Checkpoint
    from .checkpoints.saving import save_checkpoint
    from .lora import LoraSettings, LoraTargetError
    from .projector import build_projector
    from .trainer import VLMTrainer
    from .vision_language_model import VisionLanguageModel

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "LoraSettings",
    "LoraTargetError",
    "VLMTrainer",
    "VLMTrainingArguments",
    "VisionLanguageModel",
    "build_projector",
    "read_checkpoint",
    "save_checkpoint",
]

_MODULE_OF = {
    "Checkpoint": ".checkpoints.readers",
    "CheckpointError": ".checkpoints.folder",
    "LoraSettings": ".lora",
    "LoraTargetError": ".lora",
    "VLMTrainer": ".trainer",
    "VLMTrainingArguments": ".arguments",
    "VisionLanguageModel": ".vision_language_model",
    "build_projector": ".projector",
    "read_checkpoint": ".checkpoints.checkpoint",
    "save_checkpoint": ".checkpoints.saving",
}

# PEFT imports it wherever it is installed, and while it is imported, it misses a kernel that nobody asked for.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def __getattr__(name: str) -> Any:
    """Import a name when it is first used: scoring answers, in `model/evaluation`, then loads no torch."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name], __name__), name)
