"""What Trainer and users ask of a model that holds a language model, and the language model answers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class WrapsLanguageModel(nn.Module):
    """Passes on to the language model, in `qwen`, what is asked of the whole model."""

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the language model."""
        return self.get_input_embeddings().weight.dtype

    def get_input_embeddings(self: Any) -> Any:
        """Return the language model's token embedding, to which `--neftune_noise_alpha` adds noise."""
        return self.qwen.get_input_embeddings()

    def activation_checkpointing_enable(self: Any, **options: Any) -> None:
        """Recompute the language model's activations in the backward pass; Trainer asks for it by this name."""
        self.qwen.activation_checkpointing_enable(**options)

    def gradient_checkpointing_enable(self: Any, **options: Any) -> None:
        """Do the same under the name that transformers before 5.23 uses."""
        self.qwen.gradient_checkpointing_enable(**options)
