"""The vision-language model: its parts, their checkpoints, and the Trainer subclass."""

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
