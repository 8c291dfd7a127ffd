"""A language model other than QWen as engines know it: its own architecture, tokenizer and chat template.

While training, an image token has an id beyond the vocabulary. Engines need one that their tokenizer knows, so the
tokenizer gets `<|extra_0|>`. Its id is a row of the embedding that no token uses, if there is one. Else embedding and
head grow by a row, the mean of all others: the logit of a mean is below the largest, so no greedy answer has it.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from dataset.chat_template import TEMPLATE_SETTINGS, ChatTokenizer
from dataset.prompt import encode_prompt
from qwen import IMAGE_TOKEN
from qwen.answering import DEFAULT_MAX_NEW_TOKENS

from ..checkpoints.base_models import load_tokenizer
from .sources import Sources, base_file, language_weights

_ROWS = 1 << 14
"""Rows that are added up at once."""
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
_TRIALS = (
    (f"{IMAGE_TOKEN}What is it?",),
    (f"Is {IMAGE_TOKEN} or {IMAGE_TOKEN} red?", "The first.", "And blue?", "None.", f"Why?{IMAGE_TOKEN}"),
)
_FLATTEN = """\
{%- set flat = namespace(messages=[]) -%}
{%- for message in messages -%}
    {%- if message['content'] is not defined or message['content'] is none or message['content'] is string -%}
        {%- set flat.messages = flat.messages + [message] -%}
    {%- else -%}
        {%- set flat.text = '' -%}
        {%- for part in message['content'] -%}
            {%- if part['type'] in ('image', 'image_url') -%}
                {%- set flat.text = flat.text + IMAGE -%}
            {%- elif part['type'] == 'text' -%}
                {%- set flat.text = flat.text + part['text'] -%}
            {%- endif -%}
        {%- endfor -%}
        {%- set flat.messages = flat.messages + [dict(message, content=flat.text)] -%}
    {%- endif -%}
{%- endfor -%}
{%- set messages = flat.messages -%}
"""
"""Comes before the family's template, which then sees contents as text, as it did while training."""


class FamilyText:
    """The language model of an export, if it is any but QWen; see `text_half`."""

    max_length: int | None = None
    """The family's own `max_position_embeddings`, which its configuration says, is the limit."""

    def __init__(self, sources: Sources) -> None:
        self.sources, self.name = sources, str(sources.language.model_type)
        chat = load_tokenizer(sources.language_name)
        assert isinstance(chat, ChatTokenizer)
        self.chat = chat
        self.tokenizer = self._make_tokenizer()
        self.image_token_id: int = self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self.num_rows = max(sources.language.vocab_size, self.image_token_id + 1)

    def misfits(self) -> list[tuple[bool, str]]:
        """Return what LLaVA cannot express: (it holds, reason)."""
        kind = self.sources.language.model_type
        ours, theirs = set(self.sources.language_shapes), self._decoder_names()
        return [
            (
                ours != {*theirs, self.sources.names.head},
                f"the language model {kind} is more than a decoder and the matrix of its head",
            ),
            (not self.tokenizer.is_fast, f"the tokenizer of {kind} can't be written as a tokenizer.json"),
            (
                any(map(self._differs, _TRIALS)),
                f"the tokenizer of {kind} splits a text after a picture differently than in training",
            ),
        ]

    def config(self) -> dict[str, Any]:
        """Return the language model's own configuration."""
        language = self.sources.language
        values = language.to_dict()
        rotary = values.get("rope_parameters") or {}
        if "rope_theta" in rotary:
            values["rope_theta"] = rotary["rope_theta"]  # some engines read it here alone
        return values | {
            "architectures": [self.sources.names.architecture],
            "vocab_size": self.num_rows,
            "tie_word_embeddings": self.sources.is_tied,
            "dtype": str(self.sources.dtype).removeprefix("torch."),
        }

    def generation_config(self) -> dict[str, Any]:
        """Keep the base model's own settings, so that answers are drawn as by test.py; the same tokens end them."""
        path = base_file(self.sources.language_name, "generation_config.json")
        own: dict[str, Any] = {"eos_token_id": self.sources.language.eos_token_id}
        if path is not None:
            own = json.loads(path.read_text(encoding="utf-8"))
        left_out = ("_from_model_config", *(() if own.get("do_sample") else _SAMPLING))
        kept = {name: value for name, value in own.items() if name not in left_out and value is not None}
        if "max_length" not in kept:
            kept.setdefault("max_new_tokens", DEFAULT_MAX_NEW_TOKENS)
        stops = torch.tensor(kept.get("eos_token_id", [])).flatten().tolist()
        return kept | {
            "eos_token_id": sorted({*self.chat.stop_ids, *stops}),
            "pad_token_id": self.chat.pad_token_id,
            "suppress_tokens": [*kept.get("suppress_tokens", []), self.image_token_id],
        }

    def write_tokenizer(self, folder: Path) -> None:
        """Write the tokenizer with the image token."""
        self.tokenizer.save_pretrained(str(folder))
        path = folder / "tokenizer_config.json"
        values = json.loads(path.read_text(encoding="utf-8"))
        for name in ("is_local", "local_files_only"):
            values.pop(name, None)
        if values["tokenizer_class"] == "TokenizersBackend":  # a name that engines with an older transformers lack
            values["tokenizer_class"] = "PreTrainedTokenizerFast"
        path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def chat_template(self) -> str:
        """Return the family's own template, for messages with pictures, with the settings of training as defaults."""
        defaults = "".join(
            f"{{%- if {name} is not defined -%}}\n    {{%- set {name} = {_literal(value)} -%}}\n{{%- endif -%}}\n"
            for name, value in TEMPLATE_SETTINGS.items()
        )
        # What follows an expression is kept as it is; after a block, a line break would be lost.
        return f"{_FLATTEN.replace('IMAGE', _literal(IMAGE_TOKEN))}{defaults}{{{{- '' }}}}{self.chat.template}"

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the language model's tensors, LoRA merged, under the names that engines know."""
        names = self.sources.names
        for name, value in language_weights(self.sources):
            new = "lm_head.weight" if name == names.head else f"model.{name.removeprefix(f'{names.prefix}.')}"
            is_grown = name in (names.embedding, names.head)
            yield new, with_mean_rows(value, self.num_rows) if is_grown else value

    def notes(self) -> list[str]:
        """Return what differs from test.py."""
        row = "a row of the embedding that no other token uses"
        if self.num_rows > self.sources.language.vocab_size:
            row = "a new row of embedding and head, their mean, which no greedy answer has"
        return [
            f"**The image token** is `{IMAGE_TOKEN}` with ID {self.image_token_id}, {row}.",
            "**Chat template**: the language model's own. Where it trims texts, spaces at their ends are lost; test.py "
            "keeps\n  them. Thinking is off unless `enable_thinking` is given, and a template that writes the date "
            "always\n  gets 26 July 2024, as in training.",
        ]

    def _make_tokenizer(self) -> Any:
        tokenizer: Any = AutoTokenizer.from_pretrained(self.sources.language_name, trust_remote_code=False)
        tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
        tokenizer.add_bos_token = tokenizer.add_eos_token = False  # the chat template writes all control tokens
        tokenizer.model_input_names = ["input_ids", "attention_mask"]  # LLaVA takes no token_type_ids
        tokenizer.chat_template = self.chat_template()
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(self.chat.pad_token_id)  # some families have none
        return tokenizer

    def _differs(self, turns: tuple[str, ...]) -> bool:
        """Return whether a conversation that ends in a question has other ids than in training."""
        roles = itertools.cycle(("user", "assistant"))
        messages = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]
        found = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        history = list(zip(turns[:-1:2], turns[1::2], strict=True))
        ids = encode_prompt(self.chat, turns[-1], 1, history, None)[0]
        return bool(found != [self.image_token_id if i == self.chat.image_token_id else i for i in ids])

    def _decoder_names(self) -> set[str]:
        """Return the names of the decoder that LLaVA builds, as the whole language model has them."""
        with torch.device("meta"):
            decoder = AutoModel.from_config(self.sources.language)
        return {f"{self.sources.names.prefix}.{name}" for name in decoder.state_dict()}


def _literal(value: str | bool) -> str:
    """Write a value as Jinja does."""
    return str(value).lower() if isinstance(value, bool) else f"'{value}'"


def with_mean_rows(W: Tensor, number: int) -> Tensor:
    """Add rows to W (N, K) until there are `number`: each the mean of all, whose logit is the mean of theirs."""
    if len(W) == number:
        return W
    total = sum(rows.float().sum(0) for rows in W.split(_ROWS))  # (K,)
    grown = W.new_empty(number, W.shape[1])
    grown[: len(W)], grown[len(W) :] = W, total / len(W)
    return grown
