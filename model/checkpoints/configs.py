"""Read a checkpoint's two configuration files: LoRA's settings, and what the model was trained on.

PEFT's configuration can name modules to import, models to download and patterns that take forever to match. Four keys
of `adapter_config.json` are read; a key that would change what they mean is refused.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from peft import LoraConfig

from dataprocess.messages import shorten

from .saving import ADAPTER_CONFIG, MULTIMODAL_CONFIG, MultimodalConfig
from .tensor_files import CheckpointError, read_json

_CHANGES_NO_NUMBER = {
    *("peft_type", "task_type", "inference_mode", "init_lora_weights", "base_model_name_or_path", "auto_mapping"),
    *("revision", "peft_version"),
}


# ---- adapter_config.json


def read_lora_config(folder: Path) -> LoraConfig:
    """Read rank, alpha, dropout and target modules from a checkpoint's `adapter_config.json`.

    Raises:
        CheckpointError: if it can't be read, or asks for anything but plain LoRA.
    """
    path = folder / ADAPTER_CONFIG
    values = read_json(path)
    if values.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{path}: not a LoRA configuration: peft_type is {shorten(values.get('peft_type'))}, expected 'LORA'"
        )
    r: Any = values.get("r")
    alpha: Any = values.get("lora_alpha")
    dropout: Any = values.get("lora_dropout", 0.0)
    targets: Any = values.get("target_modules")
    expected = {
        "r": (r, "a whole number from 1 to 65536", type(r) is int and 1 <= r <= 1 << 16),
        "lora_alpha": (alpha, "a number above 0", _is_number(alpha) and 0 < alpha < 1e9),
        "lora_dropout": (dropout, "at least 0 and below 1", _is_number(dropout) and 0 <= dropout < 1),
        "target_modules": (
            targets,
            "a list of names of modules",
            isinstance(targets, list) and bool(targets) and all(map(_is_module_name, targets)),
        ),
    }
    problems = [
        f"{name} must be {wanted}, got {shorten(value)}" for name, (value, wanted, fits) in expected.items() if not fits
    ]
    plain = LoraConfig().to_dict()
    problems += [
        f"{shorten(name)} is {shorten(values[name])}, which plain LoRA does not have"
        for name in sorted(values.keys() - expected.keys() - _CHANGES_NO_NUMBER)
        if values[name] and values[name] != plain.get(name)
    ]
    if problems:
        more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise CheckpointError(f"{path}: not a configuration of plain LoRA: {'; '.join(problems[:4])}{more}")
    return LoraConfig(task_type="CAUSAL_LM", r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _is_module_name(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"\w+(\.\w+)*", value) is not None


# ---- multimodal_config.json


def read_multimodal_config(folder: Path) -> MultimodalConfig:
    """Read a checkpoint's `multimodal_config.json`.

    Raises:
        CheckpointError: if it can't be read, or a value is missing or of another type.
    """
    path = folder / MULTIMODAL_CONFIG
    values = read_json(path)
    types = get_type_hints(MultimodalConfig)
    missing = [name for name in types if name not in values]
    if missing:
        raise CheckpointError(f"{path}: {', '.join(missing)} missing")
    for name, expected in types.items():
        expected = get_origin(expected) or expected
        if type(values[name]) is not expected:
            raise CheckpointError(f"{path}: {name} must be a {expected.__name__}, got {shorten(values[name])}")
    if values["projector_layers"] not in (1, 2):
        raise CheckpointError(f"{path}: projector_layers must be 1 or 2, got {values['projector_layers']}")
    return MultimodalConfig(**{name: values[name] for name in types})
