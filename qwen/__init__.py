"""QWen, first generation: configuration, decoder, language head, tokenizer, ChatML, and the multimodal decoder."""

from .chatml import make_context
from .configuration_qwen import IGNORE_INDEX, QWenConfig
from .modeling_qwen import QWenLMHeadModel, QWenModel
from .multimodal_qwen import MultimodalQWenLMHeadModel, MultimodalQWenModel
from .tokenization_qwen import IMAGE_TOKEN, IMAGE_TOKEN_ID, QWenTokenizer

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
