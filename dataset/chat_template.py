r"""Build prompts of language models other than QWen from the chat template that comes with their tokenizer.

The template is rendered once, with a mark in place of each content (a system prompt, question or answer), and split at
the marks:

    {opening}{system}{first question}{question}{answer opening}{answer}{end}{next question}{question}…

The template's own pieces are tokenised with control tokens, contents without, so nobody can type one. A template that
rewrites contents, or writes an answer differently from how it asks for one, does not fit and is refused.
"""

from __future__ import annotations

import copy
import datetime
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

_MARKS = ("c0ntent0sys", "c0ntent1que", "c0ntent2ans", "c0ntent3que", "c0ntent4ans")
_FIXED_DATE = datetime.date(2024, 7, 26)
"""Replaces today's date in templates that write it: a run that is resumed tomorrow must train on the same tokens."""
TEMPLATE_SETTINGS: dict[str, Any] = {
    "enable_thinking": False,  # the switch of thinking models; other templates ignore it
    "date_string": _FIXED_DATE.strftime("%d %b %Y"),
}
"""What templates are rendered with."""
_TRIAL = ("You answer in one word.", "What is in the picture?", "An apple.", "And its colour?", "Red.")


class ChatTemplateError(ValueError):
    """A chat template that cannot be used here."""


@dataclass(frozen=True)
class _Pieces:
    """Token ids of what the template writes around contents."""

    opening: list[int]
    """Before the system prompt; without one, all that comes before the first question."""
    first_question: list[int]
    """From the system prompt to the first question; empty without a system prompt."""
    early_answer: list[int]
    """From a question to its answer, where another question follows."""
    next_question: list[int]
    """From the end token of an answer, which is left out, to the next question."""
    last_answer: list[int]
    """From the last question to its answer."""
    end_id: int
    """The token that ends an answer."""


class ChatTokenizer:
    """A tokenizer of transformers together with its chat template; `prompt.py` uses it as it uses QWen's.

    Args:
        tokenizer: with a chat template.
        image_token_id: an id beyond the vocabulary, which stands for an image feature.

    Raises:
        ChatTemplateError: if there is no template, or one that does not fit; the message says why.
    """

    default_system = None
    """Without a system prompt, the template writes its own, or none."""
    template: str
    """The chat template, its date fixed."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, image_token_id: int) -> None:
        self.tokenizer = tokenizer
        self._inner = tokenizer  # reads all that is not the beginning of a text
        self._joins_spaces = False  # whether it puts the space itself that templates write before a text
        self.image_token_id = image_token_id
        self.name = str(tokenizer.name_or_path)
        if not tokenizer.chat_template:
            raise ChatTemplateError(f"{self.name} has no chat template, so it was not trained to answer")
        self.template = re.sub(
            r"strftime_now\((['\"])(.*?)\1\)",
            lambda call: repr(_FIXED_DATE.strftime(call[2])),
            _default_template(tokenizer),
        )
        self._added = _added_tokens(tokenizer)
        unknown = [re.escape(text) for text, is_special in self._added.values() if not is_special]
        self._typed = re.compile(f"(?<=(?={'|'.join(unknown)}).)" if unknown else "(?!)", re.DOTALL)
        self._plain = self._read_template()
        self._with_system: _Pieces | ChatTemplateError
        try:
            self._with_system = self._pieces(with_system=True)
            self._check(self._with_system, with_system=True)
        except ChatTemplateError as error:  # an error only if somebody gives a system prompt
            self._with_system = error
        pad = tokenizer.pad_token_id
        self.pad_token_id: int = self._plain.end_id if pad is None else int(pad)
        eos = tokenizer.eos_token_id
        self.stop_ids = tuple(dict.fromkeys([self._plain.end_id, *([] if eos is None else [int(eos)])]))
        """The ids at which an answer ends."""
        self.eod_id = self._plain.end_id

    # ---- Contents

    def encode_text(self, text: str) -> list[int]:
        """Return the ids of a content, in which a control token is plain text."""
        ids: list[int] = []
        for part in self._typed.split(text):
            ids += self._inner.encode(part, add_special_tokens=False, split_special_tokens=True)
        return ids

    def decode(self, ids: Sequence[int], **kwargs: Any) -> str:
        """Return the text of ids, without image tokens."""
        text: Any = self.tokenizer.decode([index for index in ids if index < self.image_token_id], **kwargs)
        return str(text)

    def growing_text(self, ids: Iterable[int]) -> Iterator[str]:
        """Yield the text so far whenever it has grown, without a last character that is incomplete."""
        seen: list[int] = []
        text = ""
        for index in ids:
            seen.append(index)
            new = self.decode(seen)
            if len(new) > len(text) and not new.endswith("\ufffd"):
                text = new
                yield text
        if (whole := self.decode(seen)) != text or not text:
            yield whole

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[bytes]:
        """Return each token's text in UTF-8; for one that begins in the middle of a character, a continuation byte."""
        texts = [self.decode([index]) for index in ids]
        return [b"\x80" if text.startswith("\ufffd") else text.encode() for text in texts]

    # ---- The template's pieces around contents

    def system_ids(self, system: str | None) -> list[int]:
        """Return the ids from the beginning to the first question; with None, those that the template writes by itself.

        Raises:
            ChatTemplateError: if the template takes no system prompt.
        """
        if system is None:
            return self._plain.opening
        pieces = self._with_system
        if isinstance(pieces, ChatTemplateError):
            raise ChatTemplateError(f"a system prompt can't be used: {pieces}; leave it out")
        return [*pieces.opening, *self.encode_text(system), *pieces.first_question]

    def question_ids(self, content_ids: Sequence[int], *, first: bool = True, last: bool = True) -> list[int]:
        """Return the ids from the start of a question to the start of its answer; the first follows `system_ids`."""
        before = [] if first else self._plain.next_question
        return [*before, *content_ids, *(self._plain.last_answer if last else self._plain.early_answer)]

    def answer_end(self, *, last: bool = True) -> int:
        """Return the id that ends an answer."""
        del last  # QWen's differ
        return self._plain.end_id

    # ---- Reading the template

    def _render(self, contents: Sequence[str | None], *, ask: bool = False) -> str:
        """Render a conversation: a system prompt or None, and questions and answers in turn."""
        roles = ["system", *["user", "assistant"] * len(contents)]
        messages = [
            {"role": role, "content": text} for role, text in zip(roles, contents, strict=False) if text is not None
        ]
        try:
            text: Any = self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=ask,
                chat_template=self.template,
                **TEMPLATE_SETTINGS,
            )
        except Exception as error:  # a template is a program, and raises errors of its own
            raise ChatTemplateError(
                f"the chat template of {self.name} fails: {' '.join(str(error).split())}"
            ) from error
        return str(text)

    def _read_template(self) -> _Pieces:
        """Find the way of tokenising contents that gives the template's own tokens.

        Tokenizers of the SentencePiece kind put a space before a text. Some templates count on that, and others have
        texts that begin within a line.
        """
        first_error: ChatTemplateError | None = None
        for self._joins_spaces, makes_inner in ((False, None), (True, None), (False, _without_first_space)):
            self._inner = self.tokenizer if makes_inner is None else makes_inner(self.tokenizer)
            try:
                pieces = self._pieces(with_system=False)
                self._check(pieces, with_system=False)
                return pieces
            except ChatTemplateError as error:
                first_error = first_error or error
        assert first_error is not None
        raise first_error

    def _pieces(self, *, with_system: bool) -> _Pieces:
        """Split a conversation of two turns at its contents."""
        contents = [_MARKS[0] if with_system else None, *_MARKS[1:]]
        text = self._render(contents)
        marks = [mark for mark in contents if mark is not None]
        if re.findall("|".join(_MARKS), text) != marks:
            raise ChatTemplateError(
                f"the chat template of {self.name} does not write {'system prompt, ' * with_system}questions and "
                "answers once each and in their order"
            )
        *pieces, end = re.split("|".join(_MARKS), text)
        asked, written = self._render(contents[:-1], ask=True), text[: text.index(marks[-1])]
        if self._joins_spaces:
            pieces, asked, written = [piece.rstrip(" ") for piece in pieces], asked.rstrip(" "), written.rstrip(" ")
        opening, first_question = pieces[:2] if with_system else (pieces[0], "")
        early_answer, next_question, last_answer = pieces[-3:]
        if asked != written:
            raise ChatTemplateError(
                f"the chat template of {self.name} asks for an answer by {asked[-40:]!r}, but writes answers after "
                f"{last_answer[-40:]!r}"
            )
        closings = [self._template_ids(piece) for piece in (next_question, end)]
        if not all(closings) or closings[0][0] != closings[1][0] or closings[0][0] not in self._added:
            raise ChatTemplateError(f"the chat template of {self.name} ends answers by no token of their own")
        return _Pieces(
            opening=self.tokenizer.encode(opening, add_special_tokens=False),
            first_question=self._template_ids(first_question),
            early_answer=self._template_ids(early_answer),
            next_question=closings[0][1:],
            last_answer=self._template_ids(last_answer),
            end_id=closings[0][0],
        )

    def _template_ids(self, text: str) -> list[int]:
        ids: list[int] = self._inner.encode(text, add_special_tokens=False)
        return ids

    def _check(self, pieces: _Pieces, *, with_system: bool) -> None:
        """Compare prompts built from the pieces with the same prompts, rendered and tokenised as a whole.

        Raises:
            ChatTemplateError: if they differ: then the template or the tokenizer changes contents.
        """
        system = _TRIAL[0] if with_system else None
        for turns in ([_TRIAL[1]], [_TRIAL[1], _TRIAL[2], _TRIAL[3]]):
            whole = self.tokenizer.encode(self._render([system, *turns], ask=True), add_special_tokens=False)
            built = list(pieces.opening)
            if with_system:
                built += [*self.encode_text(_TRIAL[0]), *pieces.first_question]
            for number, text in enumerate(turns):
                if number % 2 == 0:
                    built += pieces.next_question if number else []
                    is_last = number == len(turns) - 1
                    built += [*self.encode_text(text), *(pieces.last_answer if is_last else pieces.early_answer)]
                else:
                    built += [*self.encode_text(text), pieces.end_id]
            if built != whole:
                raise ChatTemplateError(
                    f"the chat template of {self.name} rewrites contents, or its tokenizer joins them with what is "
                    f"around: {self.tokenizer.decode(whole)!r} would become {self.tokenizer.decode(built)!r}"
                )


def _default_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the chat template, of several the one for chats without tools."""
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:  # several, and none is the default
        names = ", ".join(tokenizer.chat_template)
        raise ChatTemplateError(
            f"{tokenizer.name_or_path} has chat templates {names}, and none is the default"
        ) from error


def _added_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, tuple[str, bool]]:
    """Return the control tokens: for each id its text, and whether the tokenizer can be told not to read it in texts.

    Qwen3's `<think>` is one that it can't. Runs of spaces or line breaks, which some tokenizers add, control nothing.
    """
    added = {index: (token.content, token.special) for index, token in tokenizer.added_tokens_decoder.items()}
    added |= dict(zip(tokenizer.all_special_ids, ((text, True) for text in tokenizer.all_special_tokens), strict=True))
    return {index: token for index, token in added.items() if token[0].strip(" \u2581\t\r\n")}


def _without_first_space(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return a copy that puts no space before a text, or the same tokenizer if it does not put one."""
    splitter = getattr(getattr(tokenizer, "backend_tokenizer", None), "pre_tokenizer", None)
    if getattr(splitter, "prepend_scheme", None) != "first":
        return tokenizer
    inner = copy.deepcopy(tokenizer)
    splitter = inner.backend_tokenizer.pre_tokenizer
    splitter.prepend_scheme = "never"
    inner.backend_tokenizer.pre_tokenizer = splitter
    return inner
