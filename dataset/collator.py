"""Samples to a batch.

Shape legend: B samples, T tokens of the longest one, N images of all of them, P features per image of width D.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from qwen import IGNORE_INDEX


@dataclass(frozen=True)
class VLMCollator:
    """Pads samples on the right and stacks them, and puts their images one after the other."""

    pad_token_id: int
    """The id that `input_ids` is padded with."""

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Make a batch.

        Args:
            samples: as `ImageCaptionDataset` gives them; other keys than those named here are left out of the batch.

        Returns:
            `input_ids`, `attention_mask` and `labels`, all int64 (B, T). `ids`, the samples' IDs, if each has one: a
            list, because Trainer sends every tensor to the accelerator and only messages need it. And, if there is any
            image, `pixel_values` (N, 3, H, W) or `vision_features` (N, P, D).
        """
        input_ids = [sample["input_ids"] for sample in samples]
        labels = [sample["labels"] for sample in samples]
        lengths = torch.tensor([len(ids) for ids in input_ids])  # (B,)
        batch: dict[str, Any] = {
            "input_ids": pad_sequence(input_ids, batch_first=True, padding_value=self.pad_token_id),  # (B, T)
            # By length, not by comparing with pad_token_id: that one ends every answer, too.
            "attention_mask": (torch.arange(int(lengths.max())) < lengths[:, None]).long(),  # (B, T)
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),  # (B, T)
        }
        if all("id" in sample for sample in samples):
            batch["ids"] = [sample["id"] for sample in samples]
        # Samples have any number of images: those of row 0 come first, then those of row 1. The image tokens of the
        # prompts tell which row an image belongs to.
        for name in ("pixel_values", "vision_features"):
            if images := [sample[name] for sample in samples if name in sample]:
                batch[name] = torch.cat(images)  # (N, 3, H, W) or (N, P, D)
        return batch
