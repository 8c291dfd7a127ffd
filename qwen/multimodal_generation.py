"""`generate` for prompts with images: their features go to the call that reads the prompt.

Shape legend: B rows, T tokens, D the language model's width, F features of all images of the batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .tokenization_qwen import IMAGE_TOKEN, IMAGE_TOKEN_ID

NEEDS_IDS = "image_features need input_ids, which say where they belong; inputs_embeds do not"


def check_counts(is_image: Tensor, num_features: int) -> list[int]:
    """Return the number of image tokens in each row of `is_image` (B, T); their sum must be the number of features."""
    per_row: list[int] = is_image.sum(dim=1).tolist()
    if sum(per_row) != num_features:
        raise ValueError(
            f"the prompt holds {sum(per_row)} image tokens {IMAGE_TOKEN} (by row: {per_row}), but {num_features} image "
            "features were given; expand every placeholder to as many tokens as its image has features"
        )
    return per_row


class GeneratesWithImages:
    """Has transformers' `generate` take `image_features`; a language model's class inherits from this first."""

    image_token_id = IMAGE_TOKEN_ID

    def generate(
        self,
        inputs: Tensor | None = None,
        *args: Any,
        image_features: Tensor | tuple[Tensor, ...] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate as transformers' `generate` does, from a prompt with images.

        Args:
            inputs: (B, T) token ids; or give them as `input_ids`.
            image_features: (..., D) for the whole batch in reading order, or a tuple with one tensor
                (image tokens of the row, D) for each row.
            kwargs: as transformers takes them.

        Raises:
            ValueError: if features and image tokens differ in number, with both numbers, or if there are no ids.
        """
        if image_features is not None:
            input_ids = inputs if inputs is not None else kwargs.get("input_ids")
            if input_ids is None:
                raise ValueError(NEEDS_IDS)
            if isinstance(image_features, Tensor):
                # For beams and several answers, `generate` repeats the rows of every tensor. The rows here are images
                # or features, so they go into a tuple, which it leaves alone.
                features = image_features.flatten(0, -2)  # (F, D)
                image_features = features.split(check_counts(input_ids == self.image_token_id, len(features)))
            kwargs["image_features"] = image_features
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
        """Give the image features to the call that reads the prompt; later calls find them in the cache.

        Args:
            input_ids: (B · copies, T); `copies` for beams and for several answers.
            image_features: one tensor (image tokens of the row, D) for each of the B rows of the prompt, or None.
            inputs_embeds: named because `generate` looks for it here.
            is_first_iteration: whether this call reads the prompt.
            kwargs: as transformers takes them.
        """
        prepare: Any = super().prepare_inputs_for_generation  # type: ignore[misc]
        kwargs |= {"inputs_embeds": inputs_embeds, "is_first_iteration": is_first_iteration}
        inputs: dict[str, Any] = prepare(input_ids, *args, **kwargs)
        if image_features and (is_first_iteration or not kwargs.get("use_cache", True)):
            copies = len(input_ids) // len(image_features)
            inputs["image_features"] = torch.cat([row for row in image_features for _ in range(copies)])  # (F, D)
        return inputs
