"""LoRA on the language model, by PEFT (https://arxiv.org/abs/2106.09685)."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from .lora_linear import make_lean


class LoraTargetError(ValueError):
    """Names of target modules that the language model does not have."""


@dataclass(frozen=True)
class LoraSettings:
    """What `--lora_rank`, `--lora_alpha`, `--lora_dropout` and `--target_modules` say."""

    rank: int = 128
    """Rank r of the update."""
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


def linear_names(model: nn.Module) -> Counter[str]:
    """Count the linear layers of a model by the last part of their name, `lm_head` left out."""
    names = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return Counter(name.rsplit(".", 1)[-1] for name in names if not name.endswith("lm_head"))


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


def check_targets(language_model: nn.Module, targets: tuple[str, ...]) -> None:
    """Hold every target name against the linear layers that exist.

    Raises:
        LoraTargetError: as `add_lora` says.
    """
    existing = [name for name, module in language_model.named_modules() if isinstance(module, nn.Linear)]
    unmatched = [
        target for target in targets if not any(re.search(rf"(^|\.){re.escape(target)}$", name) for name in existing)
    ]
    if unmatched or not targets:
        counts = ", ".join(f"{name} ({count} layers)" for name, count in sorted(linear_names(language_model).items()))
        raise LoraTargetError(
            f"--target_modules {'|'.join(targets)!r}: no linear layer is called {', '.join(unmatched) or '(empty)'}; "
            f"the language model has {counts}. Separate names with '|'."
        )
