"""A tokenizer as llama.cpp reads it: tokens, merges, and the name of a way to cut text into words before these merge.

That name is found by comparing what tokenizer.json does with what llama.cpp does under each; the model's own name plays
no part.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

from qwen import QWenTokenizer
from qwen.tokenization_qwen import ENDOFTEXT_ID, IMEND_ID, IMSTART_ID, SPECIAL_TOKENS

from .family_text import FamilyText
from .processor_files import byte_level_bpe
from .qwen_text import QwenText
from .sources import Sources
from .text_half import TextHalf

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(digits: str) -> list[dict[str, Any]]:
    pattern = {"Regex": _WORDS.replace("DIGITS", digits)}
    return [{"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}, _bytes(use_regex=False)]


def _bytes(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}


_PRES: dict[str, tuple[list[dict[str, Any]], bool]] = {
    "qwen2": (_split(r"\p{N}"), False),
    "llama-bpe": (_split(r"\p{N}{1,3}"), True),
    "smollm": ([{"type": "Digits", "individual_digits": True}, _bytes(use_regex=True)], False),
    "gpt-2": ([_bytes(use_regex=True)], False),
}
"""By llama.cpp's name: the steps of tokenizer.json's pre_tokenizer, and whether whole words that are tokens are taken
before any merge."""


@dataclass(frozen=True)
class _Vocabulary:
    """A tokenizer as llama.cpp reads it."""

    pre: str
    tokens: dict[int, tuple[str, str]]  # by id: text, in which ordinary tokens' bytes are letters, and GGUF's type
    merges: list[str]
    ends: list[int]  # of an answer; the first is the tokenizer's own
    begin: int | None
    pad: int


def tokenizer_misfits(half: FamilyText) -> list[tuple[bool, str]]:
    """Return what llama.cpp cannot express of a tokenizer: (it holds, reason)."""
    tokenizer: Any = half.chat.tokenizer
    if not tokenizer.is_fast:
        return []  # refused as such
    values = json.loads(tokenizer.backend_tokenizer.to_str())
    model, normalizer = values["model"], values["normalizer"] or {"type": "NFC"}
    plain = not any(
        model.get(name) for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    )
    is_bpe = model["type"] == "BPE" and plain and set(bytes_to_unicode().values()) <= model["vocab"].keys()
    if not is_bpe:
        return [(True, f"the tokenizer is a {model['type']}, and only byte-level BPE of all 256 bytes can be written")]
    strips = [one["content"] for one in values["added_tokens"] if one["lstrip"] or one["rstrip"] or one["single_word"]]
    rows, last = half.sources.language.vocab_size, max(_tokens(values), default=0)
    return [
        (normalizer != {"type": "NFC"}, f"the tokenizer's normalizer is {normalizer['type']}, and llama.cpp has none"),
        (_pre(values) is None, f"the tokenizer's pre_tokenizer is none of {', '.join(_PRES)}"),
        (bool(strips), f"the token {strips[:1]} takes spaces next to it, or only whole words"),
        (last >= rows, f"the tokenizer has the ID {last}, and the embedding {rows} rows"),
    ]


def _pre(values: dict[str, Any]) -> str | None:
    """Return llama.cpp's name for what a tokenizer.json does before merging, or None if it has none."""
    step = values["pre_tokenizer"] or {}
    steps = [
        {name: value for name, value in one.items() if name != "trim_offsets"}  # of offsets, not of tokens
        for one in step.get("pretokenizers", [step])
    ]
    does = (steps, bool(values["model"].get("ignore_merges")))
    return next((name for name, known in _PRES.items() if known == does), None)


def _qwen_vocabulary(name: str) -> _Vocabulary:
    vocabulary, merges = byte_level_bpe(QWenTokenizer.from_pretrained(name))
    tokens = {index: (word, "NORMAL") for word, index in vocabulary.items()}
    tokens |= {len(vocabulary) + i: (token, "CONTROL") for i, token in enumerate(SPECIAL_TOKENS)}
    ends = [ENDOFTEXT_ID, IMEND_ID, IMSTART_ID]
    return _Vocabulary("qwen2", tokens, [" ".join(pair) for pair in merges], ends, None, ENDOFTEXT_ID)


def _family_vocabulary(half: FamilyText) -> _Vocabulary:
    tokenizer: Any = half.chat.tokenizer
    values = json.loads(tokenizer.backend_tokenizer.to_str())
    pre, begin = _pre(values), tokenizer.bos_token_id
    assert pre is not None  # else refused
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in values["model"]["merges"]]
    return _Vocabulary(pre, _tokens(values), merges, end_ids(half), begin, half.chat.pad_token_id)


def _tokens(values: dict[str, Any]) -> dict[int, tuple[str, str]]:
    tokens = {index: (word, "NORMAL") for word, index in values["model"]["vocab"].items()}
    kinds = {True: "CONTROL", False: "USER_DEFINED"}
    return tokens | {one["id"]: (one["content"], kinds[one["special"]]) for one in values["added_tokens"]}


def end_ids(half: FamilyText) -> list[int]:
    """Return the ids that end an answer; the tokenizer's own comes first, because chat templates use its name."""
    own = half.chat.tokenizer.eos_token_id
    ids: list[int] = [*half.chat.stop_ids, *half.generation_config()["eos_token_id"]]
    return list(dict.fromkeys(ids if own is None else [own, *ids]))


def add_tokenizer(writer: Any, sources: Sources, half: TextHalf) -> None:
    """Add all tokens by id; rows of the embedding that no token has get a name, too."""
    from gguf import TokenType

    vocabulary = _qwen_vocabulary(sources.language_name) if isinstance(half, QwenText) else _family_vocabulary(half)
    tokens = [vocabulary.tokens.get(i, (f"[PAD{i}]", "UNUSED")) for i in range(sources.language.vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list([text for text, _ in tokens])
    writer.add_token_types([TokenType[kind] for _, kind in tokens])
    writer.add_token_merges(vocabulary.merges)
    # Up to three tokens end an answer, and llama.cpp has three names for such tokens.
    names = (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id)
    for add, index in zip(names, vocabulary.ends, strict=False):
        add(index)
    if vocabulary.begin is not None:
        writer.add_bos_token_id(vocabulary.begin)
    writer.add_pad_token_id(vocabulary.pad)
    writer.add_add_bos_token(False)
