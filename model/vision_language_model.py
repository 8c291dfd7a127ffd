"""The vision-language model: a frozen vision tower, a projector, and QWen that reads image features.

How it is put together, loaded and saved is in `assembly.py`.

Shape legend: B rows, T tokens, N images of the whole batch, P tokens per image, D the language model's width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from qwen import IGNORE_INDEX, IMAGE_TOKEN_ID
from qwen.loss import head_loss
from qwen.positions import is_right_padded

from .assembly import AssembledModel
from .tower_features import tower_features


class VisionLanguageModel(AssembledModel):
    """Vision tower → projector → language model; `AssembledModel` says what its attributes are."""

    accepts_loss_kwargs = True  # tells Trainer to hand over the supervised tokens of the whole optimizer step

    def get_input_embeddings(self) -> nn.Module:
        """Return the language model's token embedding, which `--neftune_noise_alpha` adds noise to."""
        return self.qwen.get_input_embeddings()

    def encode_images(self, pixel_values: Tensor | None, **stored: Any) -> Tensor:
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
        image_keys: NDArray[np.uint8] | None = None,
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
            return_logits: False runs the language head, and the last block behind its attention, at supervised
                positions only and gives no logits. The loss is the same; training uses it, for the head's 151,936
                rows cost more than many a layer.
            vision_features: (K, P, width of the tower), of K further images, whose features were stored; they take
                the place of pixels. None if there are none.
            has_features: (N + K,) bool, which of all images these are; needed where there are some of each kind.
            image_keys: (N, 32), on the host, what the features of `pixel_values` are stored under in `feature_cache`.
            kwargs: as `QWenModel.forward` takes them (`position_ids`, `past_key_values`, …), less `positions`. With
                labels nothing is cached unless asked for.

        Raises:
            ValueError: if image tokens and features differ in number, in all or by rows.
        """
        stored = {"vision_features": vision_features, "has_features": has_features, "image_keys": image_keys}
        images: dict[str, Any] = {"pixel_values": pixel_values, **stored}
        num_images = sum(len(some) for some in (pixel_values, vision_features) if some is not None)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **kwargs}
        if labels is not None and kwargs.get("past_key_values") is None:
            inputs.setdefault("use_cache", False)  # evaluation would keep every layer's keys and values for nobody
        if labels is not None and not return_logits:
            out = CausalLMOutputWithPast(loss=self._loss(labels, num_images, images, num_items_in_batch, **inputs))
        else:
            if num_images:
                self._check_image_tokens(input_ids, num_images)
                inputs["image_features"] = self.encode_images(**images)
            out = self.qwen(**inputs, labels=labels, num_items_in_batch=num_items_in_batch)
        if not num_images and out.loss is not None and self.training:
            # DDP waits for a gradient of every trainable parameter, on ranks whose batch has no image too.
            out.loss = out.loss + 0.0 * sum(parameter.sum() for parameter in self.projector.parameters())
        return out

    def _loss(
        self,
        labels: Tensor,
        num_images: int,
        images: dict[str, Any],
        num_items: Tensor | int | None,
        *,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> Tensor:
        """The loss alone. What the host has to know of the batch it asks before an accelerator has work to wait for."""
        self._check_image_tokens(input_ids, num_images)
        is_long = not self.training and input_ids.shape[1] > self.qwen.config.seq_length  # dynamic NTK asks the mask
        if attention_mask is not None and attention_mask.dim() == 2 and not is_long and is_right_padded(attention_mask):
            attention_mask = None  # causal attention is enough, and positions are the same
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).flatten()  # of every position
        positions = (targets != IGNORE_INDEX).nonzero()[:, 0]
        features = self.encode_images(**images) if num_images else None
        out = self.qwen.transformer(
            input_ids, attention_mask, image_features=features, already_checked=True, positions=positions, **kwargs
        )
        return head_loss(out.last_hidden_state, self.qwen.lm_head, targets[positions], num_items)

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
