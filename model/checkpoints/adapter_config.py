"""`adapter_config.json`: the settings of LoRA layers, as PEFT writes them, read without letting them ask for more.

PEFT's configuration can name modules to import, models to download and patterns that take for ever to match. Only what
plain LoRA needs is taken from the file; what would change its meaning is refused, and the rest is not used.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import LoraConfig

from .folders import read_json
from .tensor_files import CheckpointError

ADAPTER_CONFIG = "adapter_config.json"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"\w+(\.\w+)*", value) is not None


_TAKEN: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (lambda value: type(value) is int and value >= 1, "a whole number of at least 1"),
    "lora_alpha": (lambda value: _is_number(value) and value > 0, "a number above 0"),
    "lora_dropout": (lambda value: _is_number(value) and 0 <= value < 1, "at least 0 and below 1"),
    "target_modules": (
        lambda value: isinstance(value, list) and bool(value) and all(map(_is_name, value)),
        "a list of names of modules",
    ),
    "use_rslora": (lambda value: isinstance(value, bool), "true or false"),
}
_WITHOUT_EFFECT = {
    # What the folder says of itself and of where it comes from, and how layers were initialised before training.
    *("peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "peft_version"),
    *("inference_mode", "init_lora_weights"),
}


def read_lora_config(folder: Path) -> LoraConfig:
    """Read a checkpoint's `adapter_config.json`.

    Raises:
        CheckpointError: if it can't be read, or asks for anything but plain LoRA.
    """
    path = folder / ADAPTER_CONFIG
    values = read_json(path)
    if values.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{path}: not a LoRA configuration: peft_type is {values.get('peft_type')!r}, expected 'LORA'"
        )
    problems = []
    taken = {name: values[name] for name in _TAKEN if name in values}
    absent = {"r", "lora_alpha", "target_modules"} - taken.keys()
    problems += [f"{name} is missing" for name in sorted(absent)]
    for name, value in taken.items():
        is_valid, wanted = _TAKEN[name]
        if not is_valid(value):
            problems.append(f"{name} must be {wanted}, got {_short(value)}")
    plain = LoraConfig().to_dict()
    for name in sorted(plain.keys() & values.keys() - _TAKEN.keys() - _WITHOUT_EFFECT):
        if values[name] and values[name] != plain[name]:
            problems.append(f"{name} is {_short(values[name])}, which plain LoRA does not have")
    if problems:
        raise CheckpointError(f"{path}: not a configuration of plain LoRA: {'; '.join(problems)}")
    return LoraConfig(task_type="CAUSAL_LM", **taken)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
