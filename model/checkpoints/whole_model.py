"""The language model in a checkpoint of `--train_only all`: a base model of its own, with the trained weights in fp32.

Its configuration, tokenizer and generation settings are copies of the base's files.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from .base_models import published_file

_COPIED = (
    *("generation_config.json", "tokenizer*", "*.tiktoken", "*.model", "vocab.*", "merges.txt", "tekken.json"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.*", "LICENSE*", "NOTICE*"),
)


def write_language_model(language_model: Any, base: str, folder: Path) -> None:
    """Write a language model in the layout of its base; a tied language head is left out, as there.

    Args:
        language_model: without LoRA layers.
        base: hub name or folder of the base, whose small files are copied.
        folder: a new folder.

    Raises:
        OSError: if files of the base are missing, or can't be written.
    """
    config_file = published_file(base, "config.json")
    if config_file is None:
        raise OSError(f"base language model {base}: its config.json, which must be copied, is missing")
    kept = language_model.generation_config, language_model.config.architectures
    language_model.generation_config = GenerationConfig()  # published settings are refused where they don't go together
    try:
        language_model.save_pretrained(folder)
    finally:
        language_model.generation_config, language_model.config.architectures = kept
    (folder / "generation_config.json").unlink()
    copy_small_files(config_file, folder)
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(language_model.dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_small_files(config_file: Path, folder: Path) -> None:
    """Copy tokenizer, chat template, generation settings and licence, which are next to a base model's config.json.

    Raises:
        OSError: if one can't be copied.
    """
    for path in {path for pattern in _COPIED for path in config_file.parent.glob(pattern)}:
        if path.is_file():
            shutil.copyfile(path, folder / path.name)
