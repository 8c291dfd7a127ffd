"""The optimizer's parameter groups: two parts, two learning rates."""

from __future__ import annotations

from typing import Any, Protocol

from .vision_language_model import VisionLanguageModel


class Rates(Protocol):
    """What the groups need to know, as `VLMTrainingArguments` has it."""

    learning_rate: float
    """Of LoRA."""
    feature_proj_lr: float
    """Of the projector."""
    weight_decay: float
    """Of matrices."""


def optimizer_groups(model: VisionLanguageModel, args: Rates) -> list[dict[str, Any]]:
    """Group the trainable parameters: LoRA and projector at their learning rates, weight decay on matrices only.

    LoRA's matrices come first, so that the schedule's `learning_rate` is theirs.

    Raises:
        ValueError: if a trainable parameter belongs to neither part, or is not in exactly one group.
    """
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    parts = {
        "lora": {name: p for name, p in trainable.items() if "lora_" in name},
        "projector": {name: p for name, p in trainable.items() if name.startswith("projector.")},
    }
    rates = {"lora": args.learning_rate, "projector": args.feature_proj_lr}
    groups: list[dict[str, Any]] = []
    for part, parameters in parts.items():
        matrices = [p for p in parameters.values() if p.dim() >= 2]
        vectors = [p for p in parameters.values() if p.dim() < 2]
        for kind, members, decay in (("matrices", matrices, args.weight_decay), ("vectors", vectors, 0.0)):
            if members:
                groups.append({"params": members, "lr": rates[part], "weight_decay": decay, "name": f"{part} {kind}"})
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    if sorted(grouped) != sorted(id(parameter) for parameter in trainable.values()):
        outside = [name for name, parameter in trainable.items() if grouped.count(id(parameter)) != 1]
        raise ValueError(f"trainable parameters that are not in exactly one optimizer group: {', '.join(outside)}")
    if not parts["lora"] or not parts["projector"]:
        raise ValueError("LoRA and projector must both be trainable; was add_lora called?")
    return groups
