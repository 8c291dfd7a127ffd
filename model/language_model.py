"""Finding the base language model's tokenizer, with one clear error for what can be wrong with its name."""

from __future__ import annotations

from pathlib import Path

from qwen import QWenTokenizer


def load_tokenizer(name_or_path: str) -> QWenTokenizer:
    """Load QWen's tokenizer.

    Args:
        name_or_path: hub name or folder of the language model.

    Raises:
        ValueError: if there is no such folder or name, or no vocabulary in it.
    """
    try:
        return QWenTokenizer.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:
        if Path(name_or_path).is_dir():
            raise ValueError(f"base language model {name_or_path!r}: {error}") from error
        raise ValueError(
            f"base language model {name_or_path!r} is no local folder, and the hub does not give it: {error}. Give a "
            "folder with config.json, weights and qwen.tiktoken, or a name that can be downloaded or lies in the cache"
        ) from error
