"""QWen, first generation: configuration, decoder, language head, tokenizer, ChatML, and the multimodal decoder."""

from .chat import chat, chat_stream
from .configuration_qwen import IGNORE_INDEX, QWenConfig
from .conversation import make_context
from .modeling_qwen import QWenLMHeadModel, QWenModel
from .multimodal_qwen import MultimodalQWenLMHeadModel, MultimodalQWenModel
from .tokenization_qwen import IMAGE_TOKEN, IMAGE_TOKEN_ID, QWenTokenizer

# `model.chat(…)` and `model.chat_stream(…)`, as published. They are made methods here, as chat.py builds on the models,
# which need nothing of it.
QWenLMHeadModel.chat = chat  # type: ignore[attr-defined]
QWenLMHeadModel.chat_stream = chat_stream  # type: ignore[attr-defined]

__all__ = [
    "IGNORE_INDEX",
    "IMAGE_TOKEN",
    "IMAGE_TOKEN_ID",
    "MultimodalQWenLMHeadModel",
    "MultimodalQWenModel",
    "QWenConfig",
    "QWenLMHeadModel",
    "QWenModel",
    "QWenTokenizer",
    "make_context",
]
