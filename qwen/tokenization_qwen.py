"""The tokenizer of QWen-1: byte-level BPE by tiktoken behind the conventions of transformers' slow tokenizers.

The vocabulary file `qwen.tiktoken` holds one line per token: the token's bytes in base64, a space, and its rank. The
ranks are the ids 0 … 151642; the special tokens, which are not in the file, follow them. Ordinary tokens are `bytes` (a
token may be a part of a character), special tokens are `str`.
"""

from __future__ import annotations

import base64
import binascii
import re
import unicodedata
from pathlib import Path
from typing import Any

import tiktoken
from transformers import PreTrainedTokenizer
from transformers.tokenization_utils_base import AddedToken

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

VOCAB_FILES_NAMES = {"vocab_file": "qwen.tiktoken"}

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# The pattern backtracks over white space, and tiktoken's stack overflows at runs of about a million characters.
MAX_WHITESPACE_RUN = 100_000

_SPECIAL_SPLIT = re.compile("(" + "|".join(re.escape(token) for token in SPECIAL_TOKENS) + ")")
_WHITESPACE = re.compile(r"\s+")
_SURROGATE = re.compile("[\ud800-\udfff]")
_REPLACEMENT = "\ufffd".encode()


def normalize(text: str) -> str:
    """Bring text into the form that is tokenised: NFC, without surrogates.

    Two surrogates that make up a character become that character (JSON written by other programs has them); a lone one
    stands for no character and becomes U+FFFD.
    """
    if _SURROGATE.search(text):
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return unicodedata.normalize("NFC", text)


def load_vocabulary(path: str | Path) -> dict[bytes, int]:
    """Read a `qwen.tiktoken` file: token bytes -> id, 151,643 of them, with the ids 0 … 151642.

    Raises:
        ValueError: the file is missing, unreadable, damaged or has another number of tokens.
    """
    again = "copy or download qwen.tiktoken again"
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read the vocabulary {path}: {error.strerror or error}; {again}") from error
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), start=1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise ValueError(
                f"{path}, line {number}: expected a base64 token, a space and its rank, got {line[:60]!r}; {again}"
            ) from None
    if len(ranks) != NUM_RANKS or set(ranks.values()) != set(range(NUM_RANKS)):
        raise ValueError(f"{path} holds {len(ranks):,} different tokens, expected {NUM_RANKS:,} ranked from 0; {again}")
    return ranks


class QWenTokenizer(PreTrainedTokenizer):
    """QWen's tokenizer. `<|endoftext|>` is both the end and the padding token; no token is put around a text by itself.

    `encode` and `tokenizer(text)` turn `<|im_start|>` and the like in the text into special tokens; `encode_text` never
    does and is the one for what people typed. Tokens cannot be added: the 208 special ones are fixed.

    Args:
        vocab_file: the path of `qwen.tiktoken`.
        errors: what decoding does with malformed UTF-8: "replace", "ignore" or "strict".
        pad_token: any special token of QWen.
        eos_token: likewise.
        **kwargs: as for every tokenizer of transformers (`padding_side`, `model_max_length`, …).

    Raises:
        ValueError: the vocabulary is missing or damaged, or `pad_token` or `eos_token` is not a special token of QWen.
    """

    vocab_files_names = VOCAB_FILES_NAMES
    model_input_names = ["input_ids", "attention_mask"]
    eod_id = ENDOFTEXT_ID
    im_start_id = IMSTART_ID
    im_end_id = IMEND_ID
    image_token_id = IMAGE_TOKEN_ID

    def __init__(
        self,
        vocab_file: str | None = None,
        errors: str = "replace",
        pad_token: str | AddedToken | None = ENDOFTEXT,
        eos_token: str | AddedToken | None = ENDOFTEXT,
        **kwargs: Any,
    ) -> None:
        if vocab_file is None:
            raise ValueError("the tokenizer needs its vocabulary: no qwen.tiktoken was found in the model's folder")
        self.errors = errors
        self._ranks = load_vocabulary(vocab_file)
        self._tokens: dict[int, bytes | str] = {index: token for token, index in self.get_vocab().items()}
        self._encoding = tiktoken.Encoding(
            "qwen", pat_str=PATTERN, mergeable_ranks=self._ranks, special_tokens=SPECIAL_TOKENS
        )
        # Published configs name remote code here. It is not needed, and must not be asked for after saving either.
        kwargs.pop("auto_map", None)
        # Added tokens cannot differ from QWen's own, which need no entry.
        kwargs.pop("added_tokens_decoder", None)
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

    @property
    def all_special_ids(self) -> list[int]:
        """Return the ids of all 208 special tokens, ascending."""
        return list(SPECIAL_TOKENS.values())

    def get_vocab(self) -> dict[Any, int]:
        """Return every token and its id: `bytes` for ordinary tokens, `str` for special ones."""
        return {**self._ranks, **SPECIAL_TOKENS}

    def _add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> int:
        unknown = [str(token) for token in new_tokens or () if str(token) not in SPECIAL_TOKENS]
        if unknown:
            raise ValueError(
                f"QWen's vocabulary is fixed, cannot add {', '.join(map(repr, unknown))}: "
                f"use one of <|extra_1|> … <|extra_204|> instead"
            )
        return 0

    def encode_text(self, text: str) -> list[int]:
        """Return the token ids of a text as content: whatever it contains, no special token comes out.

        The text is NFC-normalised, and lone surrogates become U+FFFD. White space runs of over 100,000 characters are
        tokenised in parts.

        Raises:
            TypeError: `text` is not a string.
        """
        if not isinstance(text, str):
            raise TypeError(f"expected a string to tokenise, got {type(text).__name__}")
        return self._encode_ordinary(normalize(text))

    def _encode_ordinary(self, text: str) -> list[int]:
        """Encode text, cut only inside runs of white space that are too long for tiktoken."""
        ids: list[int] = []
        start = 0
        for match in _WHITESPACE.finditer(text) if len(text) > MAX_WHITESPACE_RUN else ():
            for cut in range(match.start() + MAX_WHITESPACE_RUN, match.end(), MAX_WHITESPACE_RUN):
                ids += self._encoding.encode_ordinary(text[start:cut])
                start = cut
        return ids + self._encoding.encode_ordinary(text[start:])

    def tokenize(
        self, text: str, pair: str | None = None, add_special_tokens: bool = False, **kwargs: Any
    ) -> list[Any]:
        """Return a text's tokens: `bytes`, and `str` for special ones (parsed unless `split_special_tokens` is true).

        The other arguments are transformers' own, and ignored: QWen puts no token around a text.
        """
        text = normalize(text)
        if kwargs.get("split_special_tokens", self.split_special_tokens):
            return [self._tokens[index] for index in self._encode_ordinary(text)]
        tokens: list[Any] = []
        for position, part in enumerate(_SPECIAL_SPLIT.split(text)):  # every second part is a special token
            tokens += [part] if position % 2 else [self._tokens[index] for index in self._encode_ordinary(part)]
        return tokens

    def _convert_token_to_id(self, token: Any) -> int | None:
        if token in SPECIAL_TOKENS:
            return SPECIAL_TOKENS[token]
        return self._ranks.get(token if isinstance(token, bytes) else token.encode("utf-8", "surrogatepass"))

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        """Return the id of a token, or those of a list; `str` is a special token, or else stands for its UTF-8 bytes.

        What is not a token has None: QWen has no unknown token.
        """
        if tokens is None or isinstance(tokens, (str, bytes)):
            return None if tokens is None else self._convert_token_to_id(tokens)
        return [self._convert_token_to_id(token) for token in tokens]

    def _convert_id_to_token(self, index: int) -> Any:
        if index < 0:
            raise ValueError(f"{index} is not a token id; remove ignored labels before decoding")
        # A model's table is padded beyond the vocabulary, so it can produce ids that stand for nothing.
        return self._tokens.get(index, _REPLACEMENT)

    def convert_tokens_to_string(self, tokens: list[Any]) -> str:
        """Return the text that tokens (`bytes` or `str`) stand for; malformed UTF-8 is treated as `errors` says."""
        return self._text(tokens, self.errors)

    @staticmethod
    def _text(tokens: list[Any], errors: str) -> str:
        return b"".join(token.encode() if isinstance(token, str) else token for token in tokens).decode(errors=errors)

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        errors: str | None = None,
        **kwargs: Any,
    ) -> str:
        """Return the text of ids. It has its own spaces: `clean_up_tokenization_spaces` would only damage it."""
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        tokens = self.convert_ids_to_tokens(ids, skip_special_tokens=skip_special_tokens)
        return self._text(tokens, errors or self.errors)

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Write `qwen.tiktoken` into a folder, from memory: the file that it was read from need not exist any more."""
        name = VOCAB_FILES_NAMES["vocab_file"]
        path = Path(save_directory) / (f"{filename_prefix}-{name}" if filename_prefix else name)
        temporary = path.with_name(path.name + ".part")
        with temporary.open("wb") as file:
            for token, rank in sorted(self._ranks.items(), key=lambda item: item[1]):
                file.write(base64.b64encode(token) + b" %d\n" % rank)
        temporary.replace(path)  # an earlier one stays until the new one is complete
        return (str(path),)
