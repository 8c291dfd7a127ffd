"""The vision-language model: a frozen vision tower, a projector, and a QWen that reads image features.

    pixel_values (N, 3, H, W) → vision_tower → (N, P, W) → projector → (N, P, D) → language_model → logits (B, T, V)

With `--pixel_shuffle f`, f × f neighbouring patches become one token: the tower gives (N, f² · P, W), and the projector
takes (N, P, f² · W).

Shape legend: B rows, T tokens, N images of the whole batch, P tokens per image, W the tower's width, D the language
model's width, V its vocabulary, S supervised positions.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from qwen import IGNORE_INDEX, MultimodalQWenLMHeadModel
from qwen.loss import head_loss
from visual import build_vision_tower
from visual.base import VisionTower

from .checkpoints.base_models import base_fingerprints, load_language_model
from .checkpoints.checkpoint import base_models, check_bases, load_lora, load_projector, read_checkpoint, tower_settings
from .checkpoints.previous import restore_weights
from .checkpoints.saving import multimodal_config, save_checkpoint
from .device import pick_device, pick_dtype
from .language_models.causal_lm import check_image_length
from .language_models.wrapping import WrapsLanguageModel
from .lora import LoraSettings, add_lora, merge_lora
from .pixel_shuffle import shuffle_pixels
from .projector import build_projector


class VisionLanguageModel(WrapsLanguageModel):
    """Vision tower → projector → language model.

    Attributes:
        vision_tower: frozen, always in `eval()`.
        projector: fp32, trained.
        language_model: `MultimodalQWenLMHeadModel` or a `PeftModel` around it; frozen but for what is trained, in fp32.
        base_language_model: hub name or folder that the language model came from.
        fingerprints: of both base models, under the names that `multimodal_config.json` gives them.
        pixel_shuffle: f: f × f patches of the tower become one token; 1: each patch is a token.
        train_only: what is trained: lora (and the projector), projector, or all (projector and language model).
        num_image_tokens: tokens that one image takes in the prompt (P).
        projector_layers: linear layers of the projector, 1 or 2.
    """

    accepts_loss_kwargs = True  # has Trainer pass the number of supervised tokens of the whole optimizer step

    def __init__(
        self,
        vision_tower: VisionTower,
        projector: nn.Sequential,
        language_model: MultimodalQWenLMHeadModel | PeftModel,
        base_language_model: str,
        fingerprints: dict[str, str],
        pixel_shuffle: int = 1,
        train_only: str = "lora",
    ) -> None:
        super().__init__()
        self.vision_tower = vision_tower
        self.projector = projector
        self.language_model: Any = language_model
        self.base_language_model = base_language_model
        self.fingerprints = fingerprints
        self.pixel_shuffle, self.train_only = pixel_shuffle, train_only
        self.num_image_tokens = vision_tower.num_image_tokens // pixel_shuffle**2
        self.projector_layers = 1 if len(projector) == 1 else 2

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
        pixel_shuffle: int = 1,
        train_only: str | None = None,
        hollow: bool = False,
        quantisation: str | None = None,
    ) -> VisionLanguageModel:
        """Load both base models and, if given, what a checkpoint trained.

        Args:
            base_language_model: hub name or folder of a QWen; by default the one that the checkpoint names or holds.
            base_value_model: hub name or folder of a vision model; by default the one that the checkpoint names.
            model_weights: a checkpoint folder, or a run folder, which means its newest complete checkpoint. Without
                it the projector is freshly initialised and there are no LoRA layers; see `add_lora`.
            dtype: of the frozen weights; by default bf16 or fp16 on CUDA, fp32 elsewhere.
            device: by default the accelerator where there is one, else the CPU.
            trainable: whether the model will be trained.
            lora_dropout: replaces the checkpoint's.
            projector_layers: 1 or 2; a checkpoint's own number rules.
            pixel_shuffle: side of the block of patches that becomes one token; a checkpoint's own number rules.
            train_only: the attribute; by default the checkpoint's.
            hollow: leave the language model's weights to `ShardedTrainer`, which reads them in shares.
            quantisation: 4bit or 8bit: what the language model's layers take while frozen; see `model/scaling`.

        Raises:
            CheckpointError: if the checkpoint is incomplete, broken, or was trained for other base models.
            ValueError: if neither it nor an argument names a base model, or `pixel_shuffle` does not divide the tower's
                grid of patches.
        """
        device = torch.device(device) if device is not None else pick_device()
        dtype = dtype or pick_dtype(device)

        # A checkpoint says which base models it was trained for, and how.
        checkpoint, settings = None, {}
        if model_weights is not None:
            checkpoint = read_checkpoint(model_weights)
            base_language_model, base_value_model = base_models(base_language_model, base_value_model, checkpoint)
            settings = tower_settings(checkpoint, base_value_model)
            projector_layers, pixel_shuffle = checkpoint.projector_layers, checkpoint.pixel_shuffle
        elif base_language_model is None or base_value_model is None:
            raise ValueError("give base_language_model and base_value_model, or model_weights, which name both")
        train_only = train_only or (checkpoint.train_only if checkpoint is not None else "lora")
        trains_all = trainable and train_only == "all"

        # The frozen half, in the dtype that autocast computes in.
        tower = build_vision_tower(base_value_model, dtype, **settings)
        language_dtype = torch.float32 if trains_all else dtype
        language_model: Any = load_language_model(base_language_model, language_dtype, hollow, quantisation, device)
        language_model.requires_grad_(trains_all)
        fingerprints = base_fingerprints(tower, language_model)

        # The trained half, in fp32: steps of a small learning rate would be lost in bf16's 8 bits.
        if checkpoint is not None:
            check_bases(checkpoint, tower, language_model, fingerprints)
        if pixel_shuffle != 1 or getattr(language_model.config, "sliding_window", None):  # QWen has none
            check_image_length(base_language_model, language_model.config, tower.num_image_tokens, pixel_shuffle)
        width = tower.hidden_size * pixel_shuffle**2
        projector = build_projector(width, language_model.config.hidden_size, projector_layers)
        if checkpoint is not None:
            load_projector(projector, checkpoint.folder)
            language_model = load_lora(language_model, checkpoint, trainable=trainable, dropout=lora_dropout)

        model = cls(tower, projector, language_model, base_language_model, fingerprints, pixel_shuffle, train_only)
        model.projector.requires_grad_(trainable)
        return model.to(device).train(trainable)

    # ---- What it computes

    def encode_images(self, pixel_values: Tensor | None, vision_features: Tensor | None = None) -> Tensor:
        """Turn images into features in the language model's space.

        Args:
            pixel_values: (N, 3, H, W), or None where there are features.
            vision_features: (N, f² · P, W), which the tower computed earlier, see `--feature_cache`.

        Returns:
            (N, P, D).
        """
        if vision_features is None:
            vision_features = self.vision_tower(pixel_values)  # (N, f² · P, W), without a graph: the tower is frozen
        size = self.vision_tower.num_image_tokens, self.vision_tower.hidden_size
        if vision_features.shape[1:] != size:
            raise ValueError(f"vision_features must be (N, {size[0]}, {size[1]}), got {tuple(vision_features.shape)}")
        if self.pixel_shuffle > 1:
            vision_features = shuffle_pixels(vision_features, self.pixel_shuffle)  # (N, P, f² · W)
        dtype = next(self.projector.parameters()).dtype
        return self.projector(vision_features.to(dtype))  # (N, P, D)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        pixel_values: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        return_logits: bool = True,
        vision_features: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Predict the next token at every position, and compute the loss where there are labels.

        Args:
            input_ids: (B, T), with P image tokens for each image.
            attention_mask: (B, T), 0 for padding.
            labels: (B, T), `IGNORE_INDEX` where no loss is taken.
            pixel_values: (N, 3, H, W), all images of the batch in reading order (row by row, left to right); a row
                may have none, one or several. None if the whole batch has no image.
            num_items_in_batch: divides the summed loss; by default the number of supervised tokens of this batch.
            return_logits: False computes the loss alone, at a fraction of the time and memory; training does.
            vision_features: (N, f² · P, W), features of the tower instead of `pixel_values`.
            kwargs: as `QWenModel.forward` takes them (`position_ids`, `past_key_values`, …).

        Raises:
            ValueError: if image tokens and images differ in number, in the whole batch or within a row.
        """
        if pixel_values is not None and vision_features is not None:
            shapes = f"pixel_values {tuple(pixel_values.shape)} and vision_features {tuple(vision_features.shape)}"
            raise ValueError(f"got {shapes}: give one of them, for all images of the batch")
        kwargs.pop("ids", None)  # the collator names samples by them, for messages
        images = pixel_values if vision_features is None else vision_features
        num_images = 0 if images is None else len(images)
        if num_images or labels is not None:
            self._check_image_tokens(input_ids, num_images)
        if labels is not None and kwargs.get("past_key_values") is None:
            kwargs.setdefault("use_cache", False)  # nobody reads the cache of an evaluation

        if labels is None or return_logits:
            features = self.encode_images(pixel_values, vision_features) if num_images else None  # (N, P, D)
            kwargs |= {"image_features": features, "labels": labels, "num_items_in_batch": num_items_in_batch}
            out: CausalLMOutputWithPast = self.qwen(input_ids, attention_mask, **kwargs)  # logits (B, T, V)
        else:
            targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).flatten()  # (B · T,), token t + 1 at position t
            positions = (targets != IGNORE_INDEX).nonzero()[:, 0]  # (S,)
            features = self.encode_images(pixel_values, vision_features) if num_images else None  # (N, P, D)
            # Only answers are supervised, so the language head with its 151,936 rows, and what follows the last
            # block's attention, run at S positions instead of B · T. The loss is the same.
            kwargs |= {"image_features": features, "already_checked": True}
            hidden = self.qwen.hidden_at(positions, input_ids, attention_mask, **kwargs)  # (S, D)
            loss = head_loss(hidden, self.qwen.get_output_embeddings(), targets[positions], num_items_in_batch)
            out = CausalLMOutputWithPast(loss=loss)
        if not num_images and out.loss is not None and self.training:
            # DDP waits for a gradient of every trained parameter on every rank, also where a batch has no image.
            out.loss = out.loss + 0.0 * sum(parameter.sum() for parameter in self.projector.parameters())
        return out

    @torch.no_grad()
    def generate(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, pixel_values: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """Generate answers; batches are padded on the left.

        Args:
            input_ids: (B, T), with P image tokens for each image.
            attention_mask: (B, T), 0 for padding.
            pixel_values: (N, 3, H, W), in reading order, or None.
            kwargs: as transformers' `generate` takes them; the base's `generation_config.json` supplies the rest.

        Returns:
            (B, T + new tokens), prompts included.

        Raises:
            ValueError: if image tokens and images differ in number, in the whole batch or within a row.
        """
        if pixel_values is not None:
            self._check_image_tokens(input_ids, len(pixel_values))
            kwargs["image_features"] = self.encode_images(pixel_values)  # (N, P, D)
        return self.language_model.generate(input_ids=input_ids, attention_mask=attention_mask, **kwargs)

    def _check_image_tokens(self, input_ids: Tensor, num_images: int) -> None:
        """Check that all tokens of an image are in one row; if only the sum were right, images would change rows."""
        counts = (input_ids == self.qwen.image_token_id).sum(dim=1).tolist()  # B numbers
        expected = num_images * self.num_image_tokens
        if sum(counts) != expected or any(count % self.num_image_tokens for count in counts):
            raise ValueError(
                f"the prompts hold {sum(counts)} image tokens (by row: {counts}), but {num_images} images give "
                f"{expected}; every row must hold a multiple of {self.num_image_tokens}, so many for each of its images"
            )

    # ---- LoRA

    def add_lora(self, settings: LoraSettings) -> None:
        """Give the language model fresh LoRA layers, trained with the projector; raises as `lora.add_lora`."""
        self.language_model = add_lora(self.language_model, settings)
        self.train_only = "lora"
        self.projector.requires_grad_(True)
        self.train(self.training)  # PEFT creates its layers, their dropout too, in training mode

    def merge_lora(self) -> None:
        """Add the LoRA updates, if any, to the base weights, for inference: W becomes W + ΔW."""
        if self.has_lora:
            self.language_model = merge_lora(self.language_model)

    # ---- Checkpoints

    def save_checkpoint(self, folder: str | os.PathLike[str]) -> None:
        """Write what is trained (LoRA, say, and the projector) and a note of the base models; raises as `saving.py`."""
        save_checkpoint(folder, self.language_model, self.projector, multimodal_config(self))

    def load_checkpoint(self, folder: str | os.PathLike[str]) -> None:
        """Replace the weights that are trained by a checkpoint's; raises as `previous.restore_weights`."""
        restore_weights(self, folder)

    # ---- The language model inside

    @property
    def qwen(self) -> MultimodalQWenLMHeadModel:
        """The language model itself, with or without LoRA layers inside."""
        return self.language_model.get_base_model() if self.has_lora else self.language_model

    @property
    def has_lora(self) -> bool:
        """Whether there are LoRA layers in the language model."""
        return isinstance(self.language_model, PeftModel)
