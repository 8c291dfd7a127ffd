"""Samples to a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from qwen import IGNORE_INDEX


@dataclass(frozen=True)
class VLMCollator:
    """Pads on the right, masks and stacks.

    A batch holds `input_ids`, `attention_mask` and `labels`, all int64 (B, T), `ids`, a list of B numbers by which a
    message can name samples, and `pixel_values` float32 (images in the batch, 3, H, W): the images of row 0 in reading
    order, then those of row 1, and so on. A batch without any image has no `pixel_values`. Shape legend: B samples, T
    tokens of the longest one.

    Images whose features were stored come as `vision_features` (images, P, D) in place of pixels, and then
    `has_features` bool (all images) says which they are. `image_keys` uint8 (images that come as pixels, 32) is what
    the features of the others are to be stored under: an array, as `ids` is a list, for only the host needs them, and
    Trainer sends every tensor to the accelerator.
    """

    pad_token_id: int
    """What `input_ids` is padded with."""
    pad_to_multiple_of: int | None = None
    """T is rounded up to a multiple of this many tokens."""

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Make a batch.

        Args:
            samples: what `ImageCaptionDataset` gives: `input_ids` (T,), `labels` (T,), and `pixel_values` (n, 3, H, W)
                or `vision_features` (n, P, D) where there are images, `id` and `image_keys` where they are known.
                Other keys are left out of the batch.

        Returns:
            The batch.

        Raises:
            ValueError: there are no samples, or images differ in size.
        """
        if not samples:
            raise ValueError("cannot make a batch of no samples")
        longest = max(len(sample["input_ids"]) for sample in samples)
        if self.pad_to_multiple_of:
            longest = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        shape = (len(samples), longest)
        input_ids = torch.full(shape, self.pad_token_id, dtype=torch.long)
        attention_mask = torch.zeros(shape, dtype=torch.long)
        labels = torch.full(shape, IGNORE_INDEX, dtype=torch.long)
        for row, sample in enumerate(samples):
            length = len(sample["input_ids"])
            input_ids[row, :length] = sample["input_ids"]
            attention_mask[row, :length] = 1
            labels[row, :length] = sample["labels"]
        batch: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        if all("id" in sample for sample in samples):
            batch["ids"] = [sample["id"] for sample in samples]
        images = [sample["pixel_values"] for sample in samples if "pixel_values" in sample]
        if images:
            sizes = {tuple(image.shape[1:]) for image in images}
            if len(sizes) > 1:
                raise ValueError(f"all images of a batch must have one size, got {sorted(sizes)}; use one transform")
            batch["pixel_values"] = torch.cat(images)
            keys = [sample["image_keys"] for sample in samples if "image_keys" in sample]
            if len(keys) == len(images):
                batch["image_keys"] = np.concatenate(keys)
        features = [sample["vision_features"] for sample in samples if "vision_features" in sample]
        if features:
            batch["vision_features"] = torch.cat(features)
            of_each = [
                torch.full((len(sample[kind]),), kind == "vision_features")
                for sample in samples
                for kind in ("pixel_values", "vision_features")
                if kind in sample
            ]
            batch["has_features"] = torch.cat(of_each)
        return batch
