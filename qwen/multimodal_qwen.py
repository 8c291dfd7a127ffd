"""Where image features meet text: `QWenModel.forward`, overridden to put them at the image token's positions.

The prompt holds as many `<|extra_0|>` ids as there are image features; everything else (labels, masks, lengths,
left padding, the cache) is then as for text alone.

Shape legend: B rows, T tokens, D the language model's width, F features of all images of the batch.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

from .modeling_qwen import QWenLMHeadModel, QWenModel
from .multimodal_generation import NEEDS_IDS, GeneratesWithImages, check_counts
from .tokenization_qwen import IMAGE_TOKEN_ID


class MultimodalQWenModel(QWenModel):
    """The decoder that also reads image features."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        *args: Any,
        image_features: Tensor | None = None,
        already_checked: bool = False,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Embed `input_ids`, put `image_features` at the image tokens in reading order, and run the decoder.

        Without features, a call that continues from a cache takes an image token as any other id: a model may draw it.

        Args:
            input_ids: (B, T), with one image token for each image feature.
            image_features: (..., D), all images of the batch one after another; None where there is no image.
            already_checked: whether their numbers are known to agree. Counting makes the host wait for an accelerator.
            kwargs: as `QWenModel.forward` takes them, and so are all arguments that are not named here.

        Raises:
            ValueError: if features and image tokens differ in number, with both numbers, or in their width.
        """
        if image_features is not None and (input_ids is None or inputs_embeds is not None):
            raise ValueError(NEEDS_IDS)
        if input_ids is not None and inputs_embeds is None:
            inputs_embeds = self.wte(input_ids)  # (B, T, D)
            is_image = input_ids == IMAGE_TOKEN_ID  # (B, T)
            starts = past_key_values is None or past_key_values.get_seq_length() == 0
            if not already_checked and (starts or image_features is not None):
                check_counts(is_image, 0 if image_features is None else image_features[..., 0].numel())
            if image_features is not None:
                width = inputs_embeds.shape[-1]
                if image_features.shape[-1] != width:
                    raise ValueError(f"image features have {image_features.shape[-1]} channels, the embedding {width}")
                features = image_features.reshape(-1, width).to(inputs_embeds)  # (F, D)
                inputs_embeds = inputs_embeds.masked_scatter(is_image[..., None], features)  # (B, T, D)
            input_ids = None
        return super().forward(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, *args, **kwargs)


class MultimodalQWenLMHeadModel(GeneratesWithImages, QWenLMHeadModel):
    """`QWenLMHeadModel` over `MultimodalQWenModel`; `forward` and `generate` take `image_features`."""

    decoder_class = MultimodalQWenModel

    def hidden_at(self, positions: Tensor, input_ids: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Tensor:
        """Return the last hidden state (S, D) at the positions b · T + t (S,) of `input_ids` (B, T)."""
        hidden: Tensor = self.transformer(input_ids, attention_mask, positions=positions, **kwargs).last_hidden_state
        return hidden
