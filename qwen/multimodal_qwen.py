"""Where image features meet text: `QWenModel.forward`, overridden to put them at the image token's positions.

The prompt holds as many `<|extra_0|>` ids as there are image features; everything else (labels, masks, lengths,
left padding, the cache) is then as for text alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

from .modeling_qwen import QWenLMHeadModel, QWenModel
from .tokenization_qwen import IMAGE_TOKEN, IMAGE_TOKEN_ID


def place_image_features(
    input_ids: Tensor,
    inputs_embeds: Tensor,
    image_features: Tensor | None,
    num_by_row: Sequence[int] | None = None,
    *,
    already_checked: bool = False,
) -> Tensor:
    """Put image features where the image token stands, in reading order (row by row, left to right).

    Args:
        input_ids: (B, T).
        inputs_embeds: (B, T, D), the embedded ids.
        image_features: (..., D), all images of the batch one after the other; None means none.
        num_by_row: how many of each row's image tokens stand for features; any behind those are ordinary ids, which
            the model drew. By default all of them do.
        already_checked: whether the numbers are known to agree. Counting makes the host wait for an accelerator.

    Returns:
        (B, T, D). Gradients reach `image_features`; `inputs_embeds` is not changed in place.

    Raises:
        ValueError: if the number of features is not the number of image tokens, or their width is not D.
    """
    is_image = input_ids == IMAGE_TOKEN_ID
    if num_by_row is not None:
        limits = torch.tensor(num_by_row, device=input_ids.device)
        is_image &= is_image.cumsum(dim=1) <= limits[:, None]
    width = inputs_embeds.shape[-1]
    if image_features is not None and image_features.shape[-1] != width:
        raise ValueError(f"image features have {image_features.shape[-1]} channels, the embedding {width}")
    if not already_checked:
        _check_counts(is_image, 0 if image_features is None else image_features.numel() // width)
    if image_features is None:
        return inputs_embeds
    features = image_features.reshape(-1, width).to(inputs_embeds)
    return inputs_embeds.masked_scatter(is_image[..., None], features)


def part_by_rows(input_ids: Tensor, image_features: Tensor) -> tuple[Tensor, ...]:
    """Part the features of a batch into one tensor (image tokens of the row, D) for each row of `input_ids` (B, T).

    Raises:
        ValueError: if the number of features is not the number of image tokens.
    """
    features = image_features.flatten(0, -2)
    is_image = input_ids == IMAGE_TOKEN_ID
    _check_counts(is_image, len(features))
    return features.split(is_image.sum(dim=1).tolist())


def _check_counts(is_image: Tensor, num_features: int) -> None:
    num_tokens = int(is_image.sum())
    if num_tokens != num_features:
        per_row = is_image.sum(dim=1).tolist()
        raise ValueError(
            f"the prompt holds {num_tokens} image tokens {IMAGE_TOKEN} (by row: {per_row}), but {num_features} image "
            "features were given; expand every placeholder to as many tokens as its image has features"
        )


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
        """Embed `input_ids`, put `image_features` at the image tokens, and run the decoder.

        Args:
            input_ids: (B, T), with one image token for each image feature.
            attention_mask: as `QWenModel.forward` takes it, and so are all arguments that are not named here.
            position_ids: likewise.
            past_key_values: cache of an earlier call. Without features, a call that goes on from a cache takes an
                image token as any other id: a model may sample it.
            inputs_embeds: (B, T, D) in place of `input_ids`; image features can't be placed then.
            image_features: (..., D), D the language model's width; None where there is no image.
            already_checked: whether features and image tokens are known to be as many.
            args: handed on.
            kwargs: handed on.

        Raises:
            ValueError: if features and image tokens differ in number, with both numbers.
        """
        if input_ids is not None and inputs_embeds is None:
            inputs_embeds = self.wte(input_ids)
            goes_on = past_key_values is not None and past_key_values.get_seq_length() > 0
            if image_features is not None or not goes_on:
                inputs_embeds = place_image_features(
                    input_ids, inputs_embeds, image_features, already_checked=already_checked
                )
            input_ids = None
        elif image_features is not None:
            raise ValueError("image_features need input_ids, which say where they belong; inputs_embeds do not")
        return super().forward(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, *args, **kwargs)


class MultimodalQWenLMHeadModel(QWenLMHeadModel):
    """`QWenLMHeadModel` over `MultimodalQWenModel`; `forward` and `generate` take `image_features`."""

    decoder_class = MultimodalQWenModel

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """Generate as transformers' `generate` does; it takes `image_features` too.

        Args:
            inputs: (B, T) token ids; or give them as `input_ids`.
            args: as transformers takes them.
            kwargs: likewise; and `image_features`, (..., D) for the whole batch in reading order, or a tuple with
                one tensor (tokens, D) for each row.

        Raises:
            ValueError: if features and image tokens differ in number, with both numbers, or there are no ids.
        """
        input_ids = inputs if inputs is not None else kwargs.get("input_ids")
        if isinstance(kwargs.get("image_features"), Tensor):
            if input_ids is None:
                raise ValueError("image_features need input_ids, which say where they belong; inputs_embeds do not")
            # Rows are repeated for beams and several answers, a tensor's first dimension with them. It counts images,
            # not rows: a tuple is left alone there, and repeated by rows below.
            kwargs["image_features"] = part_by_rows(input_ids, kwargs["image_features"])
        generate: Any = super().generate  # type: ignore[misc]
        return generate(inputs, *args, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        *args: Any,
        image_features: tuple[Tensor, ...] | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Hand the image features to the call that reads the prompt; later calls find them in the cache.

        Args:
            input_ids: (B · copies, T).
            args: as transformers takes them.
            image_features: one tensor (tokens, D) for each of the B rows of the prompt, or None.
            inputs_embeds: (B · copies, T, D), a prompt in place of ids.
            is_first_iteration: whether this call reads the prompt.
            kwargs: as transformers takes them.
        """
        prepare: Any = super().prepare_inputs_for_generation  # type: ignore[misc]
        inputs: dict[str, Any] = prepare(
            input_ids, *args, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        rows: list[Tensor] = []
        if image_features:
            copies = len(input_ids) // len(image_features)
            rows = [row for row in image_features for _ in range(copies)]
        features = torch.cat(rows) if rows else None
        if is_first_iteration:
            inputs["image_features"] = features
        elif not kwargs.get("use_cache", True):
            # Everything is read again, image tokens that the model drew among it.
            ids = inputs.pop("input_ids")
            numbers = [len(row) for row in rows] or [0] * len(ids)
            inputs["inputs_embeds"] = place_image_features(ids, self.transformer.wte(ids), features, numbers)
        return inputs
