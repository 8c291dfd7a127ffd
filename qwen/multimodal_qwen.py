"""Where image features meet text: `QWenModel.forward`, overridden to put them at the image token's positions.

The prompt holds as many `<|extra_0|>` ids as there are image features; everything else (labels, masks, lengths,
left padding, the cache) is then as for text alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

from .modeling_qwen import QWenLMHeadModel, QWenModel
from .tokenization_qwen import IMAGE_TOKEN, IMAGE_TOKEN_ID


def place_image_features(input_ids: Tensor, inputs_embeds: Tensor, image_features: Tensor | None) -> Tensor:
    """Put image features where the image token stands, in reading order (row by row, left to right).

    Args:
        input_ids: (B, T).
        inputs_embeds: (B, T, D), the embedded ids.
        image_features: (..., D), all images of the batch one after the other; None means none.

    Returns:
        (B, T, D). Gradients reach `image_features`; `inputs_embeds` is not changed in place.

    Raises:
        ValueError: if the number of features is not the number of image tokens, or their width is not D.
    """
    is_image = input_ids == IMAGE_TOKEN_ID
    num_tokens = int(is_image.sum())
    width = inputs_embeds.shape[-1]
    if image_features is not None and image_features.shape[-1] != width:
        raise ValueError(f"image features have {image_features.shape[-1]} channels, the embedding {width}")
    num_features = 0 if image_features is None else image_features.numel() // width
    if num_tokens != num_features:
        per_row = is_image.sum(dim=1).tolist()
        raise ValueError(
            f"the prompt holds {num_tokens} image tokens {IMAGE_TOKEN} (by row: {per_row}), but {num_features} image "
            "features were given; expand every placeholder to as many tokens as its image has features"
        )
    if image_features is None:
        return inputs_embeds
    features = image_features.reshape(-1, width).to(inputs_embeds)
    return inputs_embeds.masked_scatter(is_image[..., None], features)


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
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Embed `input_ids`, put `image_features` at the image tokens, and run the decoder.

        Args:
            input_ids: (B, T), with one image token for each image feature.
            attention_mask: as `QWenModel.forward` takes it, and so are all arguments that are not named here.
            position_ids: likewise.
            past_key_values: cache of an earlier call. Without features, a call that goes on from a cache takes an
                image token as any other id: a model may sample it.
            inputs_embeds: (B, T, D) in place of `input_ids`; image features can't be placed then.
            image_features: (..., D), D the language model's width; None where there is no image.
            args: handed on.
            kwargs: handed on.

        Raises:
            ValueError: if features and image tokens differ in number, with both numbers.
        """
        if input_ids is not None and inputs_embeds is None:
            inputs_embeds = self.wte(input_ids)
            goes_on = past_key_values is not None and past_key_values.get_seq_length() > 0
            if image_features is not None or not goes_on:
                inputs_embeds = place_image_features(input_ids, inputs_embeds, image_features)
        elif image_features is not None:
            raise ValueError("image_features need input_ids, which say where they belong; inputs_embeds do not")
        return super().forward(None, attention_mask, position_ids, past_key_values, inputs_embeds, *args, **kwargs)


class MultimodalQWenLMHeadModel(QWenLMHeadModel):
    """`QWenLMHeadModel` over `MultimodalQWenModel`; `forward` and `generate` take `image_features`."""

    decoder_class = MultimodalQWenModel

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        *args: Any,
        image_features: Tensor | tuple[Tensor, ...] | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Hand the image features to the call that reads the prompt; later calls find them in the cache.

        Features may come as a tuple with one tensor (tokens, D) for each row of the prompt: `generate` leaves a tuple
        alone where it repeats the rows, for beams or several answers, so they are repeated here, whole rows.
        """
        prepare: Any = super().prepare_inputs_for_generation  # type: ignore[misc]
        inputs: dict[str, Any] = prepare(input_ids, *args, is_first_iteration=is_first_iteration, **kwargs)
        if is_first_iteration or not kwargs.get("use_cache", True):
            if isinstance(image_features, tuple):
                copies = len(input_ids) // len(image_features)
                image_features = torch.cat([row for row in image_features for _ in range(copies)])
            inputs["image_features"] = image_features
        return inputs
