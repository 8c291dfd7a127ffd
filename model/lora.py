"""LoRA on the language model, by PEFT (https://arxiv.org/abs/2106.09685): W becomes W + (alpha / r) · B A."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from dataprocess.messages import format_count

from .lora_linear import make_lean


class LoraTargetError(ValueError):
    """Names of target modules that the language model does not have."""


@dataclass(frozen=True)
class LoraSettings:
    """Rank, scale, dropout and places of fresh LoRA layers."""

    rank: int = 128
    """Rank r of the update: A is (r, inputs), B is (outputs, r)."""
    alpha: int = 32
    """The update is scaled by alpha / r."""
    dropout: float = 0.1
    """Dropout before the update, 0 to 1."""
    target_modules: tuple[str, ...] = ("c_attn", "w1", "w2")
    """Last parts of the names of the linear layers that get an update."""

    @classmethod
    def parse_targets(cls, text: str) -> tuple[str, ...]:
        """Split `c_attn|w1|w2` at the bars."""
        return tuple(name.strip() for name in text.split("|") if name.strip())


def add_lora(language_model: PreTrainedModel, settings: LoraSettings) -> PeftModel:
    """Wrap the language model with freshly initialised LoRA layers; they are fp32, whatever the base is.

    Raises:
        LoraTargetError: if a target name matches no linear layer of the model; the message lists what exists.
    """
    check_targets(language_model, settings.target_modules)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(settings.target_modules),
        task_type="CAUSAL_LM",
        bias="none",
    )
    wrapped = get_peft_model(language_model, config)
    make_lean(wrapped)
    return wrapped


@torch.no_grad()
def merge_lora(language_model: PeftModel) -> Any:
    """Add every LoRA update to its base weight, in place; computed in fp32 and rounded once.

    Returns:
        The base model without LoRA layers.
    """
    base: Any = language_model.get_base_model()
    embedding = base.get_input_embeddings()
    layers: list[Any] = [module for module in base.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        if layer.get_base_layer().weight is embedding.weight:
            # A tied language head: the update is the head's alone, and the embedding keeps the old weights.
            layer.get_base_layer().weight = nn.Parameter(embedding.weight.clone(), requires_grad=False)
            base.config.tie_word_embeddings = False
        name = layer.active_adapters[0]
        W, A, B = layer.get_base_layer().weight, layer.lora_A[name].weight, layer.lora_B[name].weight
        W.copy_(W.float().addmm_(B.float(), A.float(), alpha=layer.scaling[name]))  # (N, K) + (N, r) (r, K)
    return language_model.unload()


def check_targets(language_model: nn.Module, targets: tuple[str, ...]) -> None:
    """Check that every target name is that of linear layers.

    Raises:
        LoraTargetError: as `add_lora` says.
    """
    names = [name for name, module in language_model.named_modules() if isinstance(module, nn.Linear)]
    unmatched = [
        target for target in targets if not any(re.search(rf"(^|\.){re.escape(target)}$", name) for name in names)
    ]
    if unmatched or not targets:
        numbers = Counter(name.rsplit(".", 1)[-1] for name in names)
        ordered = sorted(numbers, key=lambda name: (name == "lm_head", name))
        existing = ", ".join(f"{name} ({format_count(numbers[name], 'layer')})" for name in ordered)
        raise LoraTargetError(
            f"--target_modules {'|'.join(targets)!r}: no linear layer is called {', '.join(unmatched) or '(empty)'}; "
            f"the language model has {existing}. Separate names with '|'."
        )
