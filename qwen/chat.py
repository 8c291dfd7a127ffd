"""Multi-turn chat in ChatML for a language model with `generate`."""


class ChatMixin:
    """`chat` and `chat_stream`."""
