r"""ChatML, the prompt format of QWen's chat models.

    <|im_start|>system\n{system}<|im_end|>
    \n<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n{a}<|im_end|>      for every earlier turn
    \n<|im_start|>user\n{query}<|im_end|>\n<|im_start|>assistant\n

Role, line break and content are tokenised apart, and content never gives a special token: nobody can type one in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

SYSTEM_PROMPT = "你是一位图像理解助手。"
"""The system prompt where none is given: "You are an assistant who understands pictures."."""

DEFAULT_MAX_WINDOW_SIZE = 6144
"""The most tokens of a prompt, where `generation_config.json` has no `max_window_size`."""

Turn = tuple[str, str]
"""A question and its answer."""


class ChatML:
    """The prompt format, as a part of `QWenTokenizer`. Tokenizers of other models have the same methods."""

    eod_id: int
    im_start_id: int
    im_end_id: int
    encode_text: Callable[[str], list[int]]

    default_system: str | None = SYSTEM_PROMPT

    def system_ids(self, system: str | None) -> list[int]:
        """Return the token ids of the system block, which opens every prompt, also with an empty system prompt."""
        header = [self.im_start_id, *self.encode_text("system"), *self.encode_text("\n")]
        return [*header, *self.encode_text(SYSTEM_PROMPT if system is None else system), self.im_end_id]

    def question_ids(self, content_ids: Sequence[int], *, first: bool = True, last: bool = True) -> list[int]:
        r"""Return the token ids of `\n<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n`.

        The format is the same for the first question, the last one, and those between; not so for other models.
        """
        newline = self.encode_text("\n")
        user = [self.im_start_id, *self.encode_text("user"), *newline, *content_ids, self.im_end_id]
        assistant = [self.im_start_id, *self.encode_text("assistant"), *newline]
        return [*newline, *user, *newline, *assistant]

    def answer_end(self, *, last: bool = True) -> int:
        """Return the id after an answer: `<|endoftext|>` after the last one, `<|im_end|>` after earlier ones."""
        return self.eod_id if last else self.im_end_id
