"""Load the base language model and its tokenizer; whatever is wrong with its name is one clear error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from qwen import MultimodalQWenLMHeadModel, QWenConfig, QWenTokenizer


def load_language_model(name_or_path: str, dtype: torch.dtype) -> MultimodalQWenLMHeadModel:
    """Load QWen from a hub name or folder, its weights in this dtype.

    Raises:
        ValueError: if there is no such folder or name, or no complete QWen in it.
    """
    _qwen_config(name_or_path)  # another model's name is an error before its weights are downloaded
    try:
        model: Any = MultimodalQWenLMHeadModel.from_pretrained(name_or_path, dtype=dtype)
    except OSError as error:
        raise _not_found(name_or_path, error) from error
    return model


def load_tokenizer(name_or_path: str) -> QWenTokenizer:
    """Load QWen's tokenizer from the hub name or folder of the language model.

    Raises:
        ValueError: if there is no such folder or name, or no vocabulary in it.
    """
    _config(name_or_path)  # a name that leads nowhere is another mistake than a folder without a vocabulary
    try:
        return QWenTokenizer.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:
        raise _not_found(name_or_path, error) from error


def read_language_config(name_or_path: str) -> QWenConfig:
    """Read QWen's configuration from a hub name or folder; no other file is needed.

    Raises:
        ValueError: if there is no such folder or name, or it is not a QWen's.
    """
    values = _qwen_config(name_or_path)
    try:
        config: QWenConfig = QWenConfig.from_dict(values)
    except Exception as error:  # a file's values may be of any type
        reason = " ".join(str(error).split())
        raise ValueError(f"base language model {name_or_path!r}: its config.json can't be used: {reason}") from error
    return config


def _qwen_config(name_or_path: str) -> dict[str, Any]:
    config = _config(name_or_path)
    if not config:
        raise ValueError(
            f"base language model {name_or_path!r}: no config.json in this folder; give a QWen's, or a hub name"
        )
    if config.get("model_type") != QWenConfig.model_type:
        raise ValueError(
            f"base language model {name_or_path!r} has model_type {config.get('model_type')!r}, expected "
            f"{QWenConfig.model_type!r}: give a QWen of the first generation, as Qwen/Qwen-7B-Chat"
        )
    return config


def _config(name_or_path: str) -> dict[str, Any]:
    try:
        return PreTrainedConfig.get_config_dict(name_or_path)[0]
    except (OSError, ValueError) as error:
        raise _not_found(name_or_path, error) from error


def _not_found(name: str, error: Exception) -> ValueError:
    if Path(name).is_dir():
        return ValueError(f"base language model {name!r}: {error}")
    return ValueError(
        f"base language model {name!r} is no local folder, and the hub does not give it: {str(error).rstrip('.')}. "
        "Give a folder (config.json, weights, qwen.tiktoken), or a name that can be downloaded or is in the cache"
    )
