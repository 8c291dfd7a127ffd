"""The vision-language model: a frozen vision tower, a projector, and QWen that reads image features.

Shape legend: B rows, T tokens, N images of the whole batch, P tokens per image, D the language model's width.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from qwen import IGNORE_INDEX, IMAGE_TOKEN_ID, MultimodalQWenLMHeadModel
from qwen.loss import supervised_loss
from visual import build_vision_tower
from visual.base import VisionTower
from visual.feature_cache import FeatureCache

from .bases import base_models, check_bases, drops_first_patch, num_projector_layers
from .checkpoint import (
    CheckpointError,
    MultimodalConfig,
    load_adapter_weights,
    load_lora,
    load_projector,
    package_versions,
    read_checkpoint,
    save_checkpoint,
)
from .device import pick_device, pick_dtype
from .fingerprint import base_fingerprints
from .language_model import load_language_model
from .lora import LoraSettings, add_lora
from .projector import build_projector
from .tower_features import tower_features
from .weights import check_finite


class VisionLanguageModel(nn.Module):
    """Vision tower → projector → language model.

    Attributes:
        vision_tower: frozen, always in `eval()`.
        projector: fp32, trained.
        language_model: frozen `MultimodalQWenLMHeadModel`, or a `PeftModel` around it whose LoRA layers are fp32.
        base_language_model: hub name or folder that the language model came from.
        fingerprints: of both base models, by the names that `multimodal_config.json` has.
        feature_cache: where the tower's features are stored, of batches that have `image_keys`; None: nowhere.
    """

    accepts_loss_kwargs = True  # tells Trainer to hand over the supervised tokens of the whole optimizer step

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
    ) -> VisionLanguageModel:
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
        check_finite(tower, vision_name)
        check_finite(language_model, language_name)
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
            self.language_model = self.language_model.merge_and_unload()

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

    def get_input_embeddings(self) -> nn.Module:
        """Return the language model's token embedding, which `--neftune_noise_alpha` adds noise to."""
        return self.qwen.get_input_embeddings()

    def encode_images(self, pixel_values: Tensor | None, **stored: Tensor | None) -> Tensor:
        """Turn images (N, 3, H, W) into features (N, P, D) in the language model's space.

        Args:
            pixel_values: the images, less those whose features were stored.
            stored: see `tower_features`.
        """
        features: Any = tower_features(self.vision_tower, self.feature_cache, pixel_values, **stored)
        return self.projector(features.to(self.projector[0].weight.dtype))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        pixel_values: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        return_logits: bool = True,
        vision_features: Tensor | None = None,
        has_features: Tensor | None = None,
        image_keys: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Predict the next token everywhere, and take the loss where labels are.

        Args:
            input_ids: (B, T), P image tokens for each image.
            attention_mask: (B, T), 0 for padding.
            labels: (B, T), `IGNORE_INDEX` where no loss is taken.
            pixel_values: (N, 3, H, W), the images of the batch in reading order; rows may have none, one or
                several. None if there is no image at all.
            num_items_in_batch: what the summed loss is divided by; by default this batch's supervised tokens.
            vision_features: (K, P, width of the tower), of K further images, whose features were stored; they take
                the place of pixels. None if there are none.
            has_features: (N + K,) bool, which of all images these are; needed where there are some of each kind.
            image_keys: (N, 32) uint8, what the features of `pixel_values` are stored under in `feature_cache`.
            return_logits: False runs the language head at supervised positions only and gives no logits. The loss
                is the same; training uses it, for the head's 151,936 rows cost more than many a layer.
            kwargs: as `QWenModel.forward` takes them (`position_ids`, `past_key_values`, …).

        Raises:
            ValueError: if image tokens and features differ in number, in all or by rows.
        """
        features = None
        num_images = sum(len(images) for images in (pixel_values, vision_features) if images is not None)
        if num_images:
            self._check_image_tokens(input_ids, num_images)
            features = self.encode_images(
                pixel_values, vision_features=vision_features, has_features=has_features, image_keys=image_keys
            )
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "image_features": features, **kwargs}
        if labels is None or return_logits:
            out = self.qwen(**inputs, labels=labels, num_items_in_batch=num_items_in_batch)
        else:
            hidden = self.qwen.transformer(**inputs).last_hidden_state
            targets = labels[:, 1:]
            supervised = targets != IGNORE_INDEX
            logits = self.qwen.lm_head(hidden[:, :-1][supervised])
            loss = supervised_loss(logits, targets[supervised], num_items_in_batch)
            out = CausalLMOutputWithPast(loss=loss)
        if features is None and out.loss is not None and self.training:
            # DDP waits for a gradient of every trainable parameter, on ranks whose batch has no image too.
            out.loss = out.loss + 0.0 * sum(parameter.sum() for parameter in self.projector.parameters())
        return out

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate answers; batches are padded on the left.

        Args:
            input_ids: (B, T), P image tokens for each image.
            attention_mask: (B, T), 0 for padding.
            pixel_values: (N, 3, H, W), in reading order, or None.
            kwargs: as transformers' `generate` takes them; the base model's `generation_config.json` rules where
                they say nothing.

        Returns:
            (B, T + new tokens), prompts included, as transformers' `generate` gives.

        Raises:
            ValueError: if image tokens and features differ in number, in all or by rows.
        """
        if pixel_values is not None:
            self._check_image_tokens(input_ids, len(pixel_values))
            kwargs["image_features"] = self.encode_images(pixel_values)
        return self.language_model.generate(input_ids=input_ids, attention_mask=attention_mask, **kwargs)

    def _check_image_tokens(self, input_ids: Tensor, num_images: int) -> None:
        """See to it that every image's tokens stand in one row; were only the sum right, images would move."""
        counts = (input_ids == IMAGE_TOKEN_ID).sum(dim=1).tolist()
        wanted = num_images * self.num_image_tokens
        if sum(counts) != wanted or any(count % self.num_image_tokens for count in counts):
            raise ValueError(
                f"the prompts hold {sum(counts)} image tokens (by row: {counts}), but {num_images} images give "
                f"{wanted}; every row must hold a multiple of {self.num_image_tokens}, so many for each of its images"
            )

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """Recompute the language model's activations in the backward pass instead of keeping them.

        Args:
            activation_checkpointing_kwargs: as `torch.utils.checkpoint` takes them.
            options: what else transformers' method of this name takes.
        """
        kwargs = activation_checkpointing_kwargs or {"use_reentrant": False}
        if hasattr(self.qwen, "activation_checkpointing_enable"):
            self.qwen.activation_checkpointing_enable(kwargs, **options)
        else:  # its name in older versions, without options
            self.qwen.gradient_checkpointing_enable(kwargs)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """The name by which older versions of Trainer call `activation_checkpointing_enable`."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs)

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
