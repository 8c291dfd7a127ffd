"""`multimodal_config.json`: what a checkpoint was trained on and with."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import get_origin, get_type_hints

from .folders import read_json
from .tensor_files import CheckpointError

MULTIMODAL_CONFIG = "multimodal_config.json"
_PACKAGES = ("torch", "transformers", "peft", "accelerate")


@dataclass(frozen=True)
class MultimodalConfig:
    """What `multimodal_config.json` says: enough to build the model again and to see what does not fit."""

    base_language_model: str
    """Hub name or absolute path of the language model."""
    base_value_model: str
    """Hub name or absolute path of the vision tower."""
    vision_tower: str
    """The tower's `model_type`."""
    num_image_tokens: int
    """Tokens that one image takes in the prompt."""
    vision_hidden_size: int
    """Channels of a patch feature."""
    language_hidden_size: int
    """Channels of the language model's embedding."""
    vocab_size: int
    """Rows of the language model's embedding."""
    projector_layers: int
    """1 or 2."""
    vision_tower_fingerprint: str
    """Of its weights and of how it prepares images; empty: not known."""
    language_model_fingerprint: str
    """Of its weights and settings; empty: not known."""
    drop_first_patch: bool
    """Whether SigLIP's first patch is left out, as the original project did."""
    dtype: str
    """Dtype of the frozen weights while training, as in `bfloat16`."""
    package_versions: dict[str, str]
    """Versions of the packages that trained it."""


def read_multimodal_config(folder: Path) -> MultimodalConfig:
    """Read a checkpoint's `multimodal_config.json`.

    Raises:
        CheckpointError: if it can't be read, or anything is missing or of another type.
    """
    path = folder / MULTIMODAL_CONFIG
    values = read_json(path)
    types = get_type_hints(MultimodalConfig)
    absent = [name for name in types if name not in values]
    if absent:
        raise CheckpointError(f"{path}: {', '.join(absent)} missing")
    for name, expected in types.items():
        expected = get_origin(expected) or expected
        if type(values[name]) is not expected:
            raise CheckpointError(f"{path}: {name} must be a {expected.__name__}, got {values[name]!r}")
    if values["projector_layers"] not in (1, 2):
        raise CheckpointError(f"{path}: projector_layers must be 1 or 2, got {values['projector_layers']}")
    return MultimodalConfig(**{name: values[name] for name in types})


def package_versions() -> dict[str, str]:
    """Versions of the packages that matter for a checkpoint."""
    return {name: version(name) for name in _PACKAGES}
