"""The tokenizer of QWen-1: byte-level BPE by tiktoken behind the conventions of transformers' slow tokenizers.

The vocabulary file `qwen.tiktoken` holds one line per token: the token's bytes in base64, a space, and its rank. The
ranks are the ids 0 … 151642; the special tokens, which are not in the file, follow them. Ordinary tokens are `bytes` (a
token may be a part of a character), special tokens are `str`.
"""

from __future__ import annotations

import base64
import re
import unicodedata
from pathlib import Path
from typing import Any

import tiktoken
from transformers import PreTrainedTokenizer
from transformers.tokenization_utils_base import AddedToken

from .chatml import ChatML

NUM_RANKS = 151643

ENDOFTEXT = "<|endoftext|>"
IMSTART = "<|im_start|>"
IMEND = "<|im_end|>"
IMAGE_TOKEN = "<|extra_0|>"

SPECIAL_TOKENS: dict[str, int] = {
    token: NUM_RANKS + offset
    for offset, token in enumerate((ENDOFTEXT, IMSTART, IMEND, *(f"<|extra_{i}|>" for i in range(205))))
}
ENDOFTEXT_ID = SPECIAL_TOKENS[ENDOFTEXT]
IMSTART_ID = SPECIAL_TOKENS[IMSTART]
IMEND_ID = SPECIAL_TOKENS[IMEND]
IMAGE_TOKEN_ID = SPECIAL_TOKENS[IMAGE_TOKEN]

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# The pattern backtracks over white space, and tiktoken's stack overflows at runs of about a million characters.
MAX_WHITESPACE_RUN = 100_000

_SPECIAL_SPLIT = re.compile("(" + "|".join(re.escape(token) for token in SPECIAL_TOKENS) + ")")
_WHITESPACE = re.compile(r"\s+")
_SURROGATE = re.compile("[\ud800-\udfff]")


def load_vocabulary(path: str | Path) -> dict[bytes, int]:
    """Read a `qwen.tiktoken` file: token bytes -> id, 151,643 of them, with the ids 0 … 151642.

    Raises:
        ValueError: the file is missing, unreadable, damaged or has another number of tokens.
    """
    again = "copy or download qwen.tiktoken again"
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise ValueError(f"cannot read the vocabulary {path}: {error.strerror or error}; {again}") from error
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(lines, start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise ValueError(
                f"{path}, line {number}: expected a base64 token, a space and its rank, got {line[:60]!r}; {again}"
            ) from None
    if len(ranks) != NUM_RANKS or set(ranks.values()) != set(range(NUM_RANKS)):
        raise ValueError(f"{path} holds {len(ranks):,} different tokens, expected {NUM_RANKS:,} ranked from 0; {again}")
    return ranks


class QWenTokenizer(ChatML, PreTrainedTokenizer):
    """QWen's tokenizer. `<|endoftext|>` is both the end and the padding token; no token is put around a text by itself.

    `encode` and `tokenizer(text)` turn `<|im_start|>` and the like in the text into special tokens; `encode_text` never
    does and is the one for what people typed. Tokens cannot be added: the 208 special ones are fixed.
    """

    vocab_files_names = {"vocab_file": "qwen.tiktoken"}
    model_input_names = ["input_ids", "attention_mask"]
    eod_id = ENDOFTEXT_ID
    im_start_id = IMSTART_ID
    im_end_id = IMEND_ID
    image_token_id = IMAGE_TOKEN_ID
    stop_ids = (IMEND_ID, IMSTART_ID, ENDOFTEXT_ID)
    """What ends an answer."""

    def __init__(
        self,
        vocab_file: str | None = None,
        errors: str = "replace",
        pad_token: str | AddedToken | None = ENDOFTEXT,
        eos_token: str | AddedToken | None = ENDOFTEXT,
        **kwargs: Any,
    ) -> None:
        """Read the vocabulary `qwen.tiktoken`; `errors` says what decoding does with malformed UTF-8, as for `bytes`.

        Raises:
            ValueError: the vocabulary is missing or damaged, or a token is not a special token of QWen.
        """
        if vocab_file is None:
            raise ValueError("the tokenizer needs its vocabulary: no qwen.tiktoken was found in the model's folder")
        self.errors = errors
        self._ranks = load_vocabulary(vocab_file)
        self._tokens: dict[int, Any] = {index: token for token, index in (self._ranks | SPECIAL_TOKENS).items()}
        self._encoding = tiktoken.Encoding(
            "qwen", pat_str=PATTERN, mergeable_ranks=self._ranks, special_tokens=SPECIAL_TOKENS
        )
        kwargs.pop("auto_map", None)  # published configs name remote code here, which is not needed
        kwargs.pop("added_tokens_decoder", None)  # QWen's own tokens need no entry
        super().__init__(pad_token=pad_token, eos_token=eos_token, errors=errors, **kwargs)
        self._add_tokens(list(self.special_tokens_map.values()))  # only to refuse unknown ones

    @property
    def vocab_size(self) -> int:
        """Return the number of ids, the special ones included: 151,851. A model's table may be larger."""
        return NUM_RANKS + len(SPECIAL_TOKENS)

    @property
    def all_special_tokens(self) -> list[str]:
        """Return all 208 special tokens, in the order of their ids."""
        return list(SPECIAL_TOKENS)

    def get_vocab(self) -> dict[Any, int]:
        """Return every token and its id: `bytes` for ordinary tokens, `str` for special ones."""
        return {**self._ranks, **SPECIAL_TOKENS}

    def _add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> int:
        unknown = [str(token) for token in new_tokens or () if str(token) not in SPECIAL_TOKENS]
        if unknown:
            raise ValueError(
                f"QWen's vocabulary is fixed, cannot add {unknown}: use one of <|extra_1|> … <|extra_204|>"
            )
        return 0

    def encode_text(self, text: str) -> list[int]:
        """Return the token ids of a text as content: whatever it contains, no special token comes out.

        Two surrogates that make up a character become that character (JSON written by other programs has them), a lone
        one U+FFFD. The text is brought into NFC, and cut inside runs of white space that are too long for tiktoken.
        """
        if _SURROGATE.search(text):
            text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        text = unicodedata.normalize("NFC", text)
        ids: list[int] = []
        start = 0
        for match in _WHITESPACE.finditer(text) if len(text) > MAX_WHITESPACE_RUN else ():
            for cut in range(match.start() + MAX_WHITESPACE_RUN, match.end(), MAX_WHITESPACE_RUN):
                ids += self._encoding.encode_ordinary(text[start:cut])
                start = cut
        return ids + self._encoding.encode_ordinary(text[start:])

    def tokenize(self, text: str, *args: Any, **kwargs: Any) -> list[Any]:
        """Return a text's tokens: `bytes`, and `str` for special ones, parsed unless `split_special_tokens` is true."""
        parts = [text]
        if not kwargs.get("split_special_tokens", self.split_special_tokens):
            parts = _SPECIAL_SPLIT.split(unicodedata.normalize("NFC", text))  # every second part is a special token
        tokens: list[Any] = []
        for position, part in enumerate(parts):
            tokens += [part] if position % 2 else [self._tokens[index] for index in self.encode_text(part)]
        return tokens

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        """Return the id of a token, or those of a list; `str` is a special token, or else stands for its UTF-8 bytes.

        What is not a token has None: QWen has no unknown token.
        """
        if tokens is None:
            return None
        if not isinstance(tokens, str | bytes):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        if tokens in SPECIAL_TOKENS:
            return SPECIAL_TOKENS[str(tokens)]
        return self._ranks.get(tokens if isinstance(tokens, bytes) else tokens.encode("utf-8", "surrogatepass"))

    def _convert_id_to_token(self, index: int) -> Any:
        if index < 0:
            raise ValueError(f"{index} is not a token id; remove ignored labels before decoding")
        # A model's table is padded beyond the vocabulary, so it can produce ids that stand for nothing.
        return self._tokens.get(index, "\ufffd")

    def convert_tokens_to_string(self, tokens: list[Any], errors: str | None = None) -> str:
        """Return the text that tokens (`bytes` or `str`) stand for; malformed UTF-8 is treated as `errors` says."""
        data = b"".join(token if isinstance(token, bytes) else token.encode() for token in tokens)
        return data.decode(errors=errors or self.errors)

    def _decode(self, token_ids: int | list[int], *args: Any, errors: str | None = None, **kwargs: Any) -> str:
        """Return the text of ids. It has its own spaces: `clean_up_tokenization_spaces` would only damage it."""
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        tokens = self.convert_ids_to_tokens(ids, kwargs.get("skip_special_tokens", False))
        return self.convert_tokens_to_string(tokens, errors)

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Write `qwen.tiktoken` into a folder, from memory: the file that it was read from need not exist any more."""
        path = Path(save_directory, f"{filename_prefix}-qwen.tiktoken" if filename_prefix else "qwen.tiktoken")
        temporary = path.with_name(path.name + ".part")
        temporary.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(self._tokens[i]), i) for i in range(NUM_RANKS)))
        temporary.replace(path)  # an earlier one stays until the new one is complete
        return (str(path),)
