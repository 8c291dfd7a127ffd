"""The language model of an export as engines know it: QWen becomes a Qwen2, any other keeps its own form."""

from __future__ import annotations

from qwen import QWenConfig

from .family_text import FamilyText
from .qwen_text import QwenText
from .sources import Sources

TextHalf = QwenText | FamilyText
"""Both have the attributes `name`, `image_token_id` and `max_length`, and the methods `misfits`, `config`,
`generation_config`, `write_tokenizer`, `chat_template`, `weights` (named as in the architecture's published files) and
`notes`."""


def text_half(sources: Sources) -> TextHalf:
    """Return the language model that an export is made of.

    Raises:
        ValueError: for a language model without a tokenizer that fits.
    """
    language = sources.language
    return QwenText(sources, language) if isinstance(language, QWenConfig) else FamilyText(sources)
