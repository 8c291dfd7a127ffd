"""QWen's tokenizer, the prompt as a chat template, and the tower's image processor, for transformers' own classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from transformers import Qwen2Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from dataset import SYSTEM_PROMPT
from qwen import IMAGE_TOKEN, QWenTokenizer
from qwen.tokenization_qwen import ENDOFTEXT, SPECIAL_TOKENS
from visual.loading import load_image_processor

_TEMPLATE = """\
{%- if not messages or messages[0]['role'] != 'system' -%}
    {{- '<|im_start|>system\\n' + SYSTEM + '<|im_end|>' -}}
{%- endif -%}
{%- for message in messages -%}
    {{- ('' if loop.first and message['role'] == 'system' else '\\n') + '<|im_start|>' + message['role'] + '\\n' -}}
    {%- if message['content'] is string -%}
        {{- message['content'] -}}
    {%- else -%}
        {%- for part in message['content'] or [] -%}
            {%- if part['type'] in ('image', 'image_url') -%}
                {{- IMAGE -}}
            {%- elif part['type'] == 'text' -%}
                {{- part['text'] -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|im_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '\\n<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
"""What `dataset.prompt.encode_prompt` builds, as text."""


def write_processor(folder: Path, vision_name: str, image_size: int, settings: dict[str, Any]) -> None:
    """Write how pictures become pixels, and how many tokens each takes.

    Args:
        folder: where the files go.
        vision_name: hub name or folder of the vision tower.
        image_size: side of the picture that the tower takes, in pixels.
        settings: LLaVA's, from which it counts the tokens of a picture.

    Raises:
        OSError: if the tower's preprocessor_config.json is missing, or a file can't be written.
    """
    images = load_image_processor(vision_name, image_size)[0].to_dict()
    # The Pillow form has a name of its own, which only the newest transformers know.
    images["image_processor_type"] = str(images["image_processor_type"]).removesuffix("Pil")
    settings = {"processor_class": "LlavaProcessor", "image_token": IMAGE_TOKEN, **settings}
    for name, values in {"preprocessor_config.json": images, "processor_config.json": settings}.items():
        (folder / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def chat_template() -> str:
    """Return the template that gives test.py's prompts, its default system prompt included."""
    return _TEMPLATE.replace("IMAGE", _quoted(IMAGE_TOKEN)).replace("SYSTEM", _quoted(SYSTEM_PROMPT))


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def write_tokenizer(folder: Path, tokenizer: QWenTokenizer, max_length: int) -> None:
    """Write QWen's tokenizer as a Qwen2Tokenizer: the same ids for the same text, special tokens included.

    Args:
        folder: where the files go.
        tokenizer: QWen's.
        max_length: the longest text that the model was trained for, in tokens.

    Raises:
        OSError: if files can't be written.
    """
    vocabulary, merges = byte_level_bpe(tokenizer)
    make: Any = Qwen2Tokenizer
    twin = make(
        vocab=vocabulary,
        merges=merges,
        eos_token=ENDOFTEXT,
        pad_token=ENDOFTEXT,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
    twin.add_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS], special_tokens=True
    )
    twin.save_pretrained(str(folder))


def byte_level_bpe(tokenizer: QWenTokenizer) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return QWen's ordinary tokens with their ids, and the merges in order, as tokenizer.json and GGUF write them.

    Raises:
        ValueError: if byte-pair encoding can't have made the vocabulary.
    """
    ranks = {token: rank for token, rank in tokenizer.get_vocab().items() if isinstance(token, bytes)}
    letters = bytes_to_unicode()  # byte-level BPE writes each byte as one visible character

    def visible(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = [(visible(first), visible(second)) for first, second in merges_of(ranks)]
    return {visible(token): rank for token, rank in ranks.items()}, merges


def merges_of(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Return the pair that each token was merged from, in the order of training.

    Byte-pair encoding with the tokens of lower rank splits a token into exactly that pair.

    Raises:
        ValueError: if that is not so: the vocabulary is not one that byte-pair encoding has made.
    """
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pairs = [ranks.get(parts[i] + parts[i + 1], rank) for i in range(len(parts) - 1)]
            if min(pairs) == rank:
                raise ValueError(
                    f"the vocabulary has {token!r}, but no two tokens that it was merged from: it is damaged"
                )
            at = pairs.index(min(pairs))
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges
