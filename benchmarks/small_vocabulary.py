"""Qwen's token ids for models whose vocabulary is smaller: they are folded onto the rows that there are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qwen import IGNORE_INDEX


class FoldedEmbedding(nn.Embedding):
    """An embedding of fewer rows than there are token ids."""

    def forward(self, input: Tensor) -> Tensor:
        """Embed ids of any size."""
        return super().forward(input % self.num_embeddings)


def fold(module: nn.Embedding) -> FoldedEmbedding:
    """The same embedding, for ids of any size."""
    folded = FoldedEmbedding(*module.weight.shape, _weight=module.weight)
    folded.weight.requires_grad_(module.weight.requires_grad)
    return folded


def fold_labels(batch: dict[str, Any], rows: int) -> dict[str, Any]:
    """Map a batch's labels onto the rows of a head."""
    labels = batch["labels"]
    return {**batch, "labels": torch.where(labels == IGNORE_INDEX, labels, labels % rows)}


class FoldedLabels:
    """A collator whose labels are mapped onto the rows of a head; data workers can be given it.

    Args:
        collate: what makes the batch.
        rows: of the head.
    """

    def __init__(self, collate: Callable[..., dict[str, Any]], rows: int) -> None:
        self.collate = collate
        self.rows = rows

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Make a batch."""
        return fold_labels(self.collate(samples), self.rows)
