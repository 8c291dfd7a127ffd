"""Tower, projector and language model as one module: put together, given LoRA layers, saved, loaded again.

What they compute is in `vision_language_model.py`. Shape legend: P tokens per image.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import nn

from qwen import MultimodalQWenLMHeadModel
from visual import build_vision_tower
from visual.base import VisionTower
from visual.feature_cache import FeatureCache

from .checkpoints.base_models import (
    base_fingerprints,
    base_models,
    check_bases,
    drops_first_patch,
    num_projector_layers,
)
from .checkpoints.checkpoint import (
    CheckpointError,
    load_adapter_weights,
    load_lora,
    load_projector,
    read_checkpoint,
    save_checkpoint,
)
from .checkpoints.configs import MultimodalConfig, package_versions
from .device import pick_device, pick_dtype
from .language_model import load_language_model
from .lora import LoraSettings, add_lora
from .lora_linear import merge_lean
from .projector import build_projector

if TYPE_CHECKING:  # Python 3.10 does not have it
    from typing import Self


class AssembledModel(nn.Module):
    """The three parts of a vision-language model, and the checkpoints that they come from and go to.

    Attributes:
        vision_tower: frozen, always in `eval()`.
        projector: fp32, trained.
        language_model: frozen `MultimodalQWenLMHeadModel`, or a `PeftModel` around it whose LoRA layers are fp32.
        base_language_model: hub name or folder that the language model came from.
        fingerprints: of both base models, by the names that `multimodal_config.json` has.
        feature_cache: where the tower's features are stored, of batches that have `image_keys`; None: nowhere.
    """

    def __init__(
        self,
        vision_tower: VisionTower,
        projector: nn.Sequential,
        language_model: MultimodalQWenLMHeadModel | PeftModel,
        base_language_model: str,
        fingerprints: dict[str, str],
    ) -> None:
        super().__init__()
        self.vision_tower = vision_tower
        self.projector = projector
        self.language_model: Any = language_model  # a PeftModel hands its base model's attributes on
        self.base_language_model = base_language_model
        self.fingerprints = fingerprints
        self.feature_cache: FeatureCache | None = None

    @classmethod
    def from_pretrained(
        cls,
        base_language_model: str | None = None,
        base_value_model: str | None = None,
        model_weights: str | os.PathLike[str] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        *,
        trainable: bool = False,
        lora_dropout: float | None = None,
        projector_layers: int = 2,
    ) -> Self:
        """Load both base models and, if given, a checkpoint's LoRA and projector.

        Args:
            base_language_model: hub name or folder of a QWen; by default what the checkpoint says.
            base_value_model: hub name or folder of a vision model; likewise.
            model_weights: a checkpoint folder, or a run folder, which means its newest complete checkpoint. Without
                it the projector is freshly drawn and there are no LoRA layers; see `add_lora`.
            dtype: of the frozen weights; by default bf16 or fp16 on CUDA, fp32 elsewhere.
            device: by default the accelerator where there is one, else the CPU.
            trainable: whether LoRA and projector are to be trained on.
            lora_dropout: in place of the checkpoint's.
            projector_layers: 2, or 1; a checkpoint says its own.

        Raises:
            CheckpointError: if the checkpoint is incomplete, broken, or was trained for other base models, or if a
                base model is named neither here nor there.
        """
        device = torch.device(device) if device is not None else pick_device()
        dtype = dtype or pick_dtype(device)
        checkpoint = read_checkpoint(model_weights) if model_weights is not None else None
        language_name, vision_name = base_models(base_language_model, base_value_model, checkpoint)

        tower = build_vision_tower(vision_name, dtype, drop_first_patch=drops_first_patch(checkpoint, vision_name))
        language_model: Any = load_language_model(language_name, dtype)
        language_model.requires_grad_(False)
        fingerprints = base_fingerprints(tower, language_model)
        if checkpoint is not None:
            check_bases(checkpoint, tower, language_model, fingerprints)
            projector_layers = num_projector_layers(checkpoint)
        projector = build_projector(tower.hidden_size, language_model.config.hidden_size, projector_layers)
        if checkpoint is not None:
            load_projector(projector, checkpoint.folder)
            language_model = load_lora(language_model, checkpoint, trainable=trainable, dropout=lora_dropout)
        model = cls(tower, projector, language_model, language_name, fingerprints).to(device)
        model.projector.requires_grad_(trainable)
        return model.train(trainable)

    def add_lora(self, settings: LoraSettings) -> None:
        """Give the language model freshly initialised LoRA layers and make projector and LoRA trainable.

        Raises:
            LoraTargetError: if the language model has no linear layer of one of the target names.
            ValueError: if it has LoRA layers already.
        """
        if isinstance(self.language_model, PeftModel):
            raise ValueError("the language model has LoRA layers already; they can be trained on or merged")
        self.language_model = add_lora(self.language_model, settings)
        self.language_model.to(self.device)
        self.projector.requires_grad_(True)
        self.train(self.training)  # PEFT's layers, their dropout too, are made in training mode

    def merge_lora(self) -> None:
        """Add the LoRA updates to the base weights, for inference: W becomes W + ΔW."""
        if isinstance(self.language_model, PeftModel):
            merge_lean(self.language_model)
            self.language_model = self.language_model.unload()

    @property
    def qwen(self) -> MultimodalQWenLMHeadModel:
        """The language model itself, with or without LoRA layers inside."""
        model = self.language_model
        base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        return base

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.qwen.transformer.wte.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the frozen weights."""
        return self.qwen.transformer.wte.weight.dtype

    @property
    def num_image_tokens(self) -> int:
        """Tokens that one image takes in the prompt (P)."""
        return self.vision_tower.num_image_tokens

    @property
    def projector_layers(self) -> int:
        """Linear layers of the projector: 1 or 2."""
        return 1 if len(self.projector) == 1 else 2

    def parameter_counts(self) -> dict[str, tuple[int, int]]:
        """Number of parameters, all and trainable, of each part; LoRA layers are a part of their own."""
        counts = {"vision_tower": (0, 0), "projector": (0, 0), "language_model": (0, 0), "lora": (0, 0)}
        for name, parameter in self.named_parameters():
            part = "lora" if "lora_" in name else name.split(".", 1)[0]
            total, trainable = counts[part]
            counts[part] = (total + parameter.numel(), trainable + parameter.numel() * parameter.requires_grad)
        return counts

    def multimodal_config(self) -> MultimodalConfig:
        """What a checkpoint has to say of the base models."""
        return MultimodalConfig(
            base_language_model=_absolute_if_folder(self.base_language_model),
            base_value_model=_absolute_if_folder(self.vision_tower.name_or_path),
            vision_tower=self.vision_tower.kind,
            num_image_tokens=self.num_image_tokens,
            vision_hidden_size=self.vision_tower.hidden_size,
            language_hidden_size=self.qwen.config.hidden_size,
            vocab_size=self.qwen.config.vocab_size,
            projector_layers=self.projector_layers,
            **self.fingerprints,
            drop_first_patch=self.vision_tower.drop_first_patch,
            dtype=str(self.dtype).removeprefix("torch."),
            package_versions=package_versions(),
        )

    def save_checkpoint(self, folder: str | os.PathLike[str]) -> None:
        """Write LoRA, projector and what they were trained on.

        Raises:
            ValueError: if the language model has no LoRA layers.
        """
        if not isinstance(self.language_model, PeftModel):
            raise ValueError("there are no LoRA layers to save; add_lora gives the model some")
        save_checkpoint(folder, self.language_model, self.projector, self.multimodal_config())

    def load_checkpoint(self, folder: str | os.PathLike[str]) -> None:
        """Put a checkpoint's weights into LoRA layers and projector that are there already.

        Raises:
            CheckpointError: if names or shapes differ, or LoRA's scale or the base models' geometry.
        """
        checkpoint = read_checkpoint(folder)
        check_bases(checkpoint, self.vision_tower, self.qwen, self.fingerprints)
        alpha = self.language_model.peft_config["default"].lora_alpha
        if checkpoint.lora_config.lora_alpha != alpha:
            raise CheckpointError(
                f"checkpoint {checkpoint.folder} was trained with lora_alpha {checkpoint.lora_config.lora_alpha}, the "
                f"model has {alpha}; give the same --lora_alpha"
            )
        load_adapter_weights(self.language_model, checkpoint.folder)
        load_projector(self.projector, checkpoint.folder)


def _absolute_if_folder(name: str) -> str:
    return str(Path(name).absolute()) if Path(name).is_dir() else name
