"""Train a model of few vocabulary rows on Qwen's token ids: each id counts as the row `id % rows`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from qwen import IGNORE_INDEX

QWEN_ROWS = 151_936


class FoldedEmbedding(nn.Embedding):
    """An embedding of fewer rows than there are token ids."""

    def forward(self, input: Tensor) -> Tensor:
        """Embed ids of any size."""
        return super().forward(input % self.num_embeddings)


class FoldedLabels:
    """A collator whose labels are rows of the head; data workers can be given it.

    Args:
        collate: makes the batch.
        rows: of the head.
    """

    def __init__(self, collate: Callable[..., dict[str, Any]], rows: int) -> None:
        self.collate = collate
        self.rows = rows

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Make a batch."""
        batch = self.collate(samples)
        labels = batch["labels"]
        return {**batch, "labels": torch.where(labels == IGNORE_INDEX, labels, labels % self.rows)}


def fold_token_ids(trainer: Trainer, language_model: Any) -> None:
    """Let a trainer's model take token ids of any size, where it has fewer rows than Qwen."""
    embedding = language_model.get_input_embeddings()
    rows = embedding.num_embeddings
    if rows < QWEN_ROWS:
        folded = FoldedEmbedding(*embedding.weight.shape, _weight=embedding.weight)
        folded.weight.requires_grad_(False)
        language_model.set_input_embeddings(folded)
        trainer.data_collator = FoldedLabels(trainer.data_collator, rows)
