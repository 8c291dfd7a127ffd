"""The tokenizer over the real vocabulary: ids, special tokens, and the conventions of transformers' tokenizers."""

from __future__ import annotations

import base64
import json
import pickle
import shutil

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen.tokenization_qwen import IMAGE_TOKEN, IMAGE_TOKEN_ID, QWenTokenizer

# Worked out from the published pattern and vocabulary, text by text.
IDS = {
    "你好": [108386],
    "你是一位图像理解助手。": [56568, 109182, 107553, 101128, 110498, 1773],
    "a photo of two dogs": [64, 6548, 315, 1378, 12590],
    "don't I'LL": [15007, 944, 358, 6, 4086],
    "😀": [141334],
    "👨\u200d👩\u200d👧": [145367, 378, 235, 145233, 378, 235, 145665],
    "𠮷": [150152],
    "Привет мир": [53645, 26991, 8178, 137144],
    "مرحبا": [124122, 29825, 124671],
    "สวัสดี": [143126, 23271, 125136, 28319],
    "3.14": [18, 13, 16, 19],
    "  two": [220, 1378],
    "a\n\n b\t\tc": [64, 271, 293, 197, 1444],
    "line\r\nend": [1056, 319, 408],
    "é": [963],
    "e\u0301": [963],
    "\u212b": [144044],
    "\ud83d\ude00": [141334],  # two surrogates that make up a character
    "a\ud83d": [64, 5691],
    "": [],
}


@pytest.fixture(scope="module")
def reference(qwen_tiktoken):
    """The same encoding, built here from the file and the published description alone."""
    ranks = {}
    for line in qwen_tiktoken.read_text(encoding="ascii").splitlines():
        token, rank = line.split(" ")
        ranks[base64.b64decode(token)] = int(rank)
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"] + [f"<|extra_{i}|>" for i in range(205)]
    return tiktoken.Encoding(
        "reference",
        pat_str=r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+",
        mergeable_ranks=ranks,
        special_tokens={token: 151643 + i for i, token in enumerate(specials)},
        explicit_n_vocab=151851,
    )


@pytest.mark.parametrize("text", IDS)
def test_exact_ids(tokenizer, text):
    assert tokenizer.encode_text(text) == IDS[text]
    assert tokenizer.encode(text) == IDS[text]
    assert tokenizer(text)["input_ids"] == IDS[text]


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=60))
def test_equals_tiktoken_and_comes_back(tokenizer, reference, text):
    import unicodedata

    normal = unicodedata.normalize("NFC", text)
    assert tokenizer.encode_text(text) == reference.encode_ordinary(normal)
    assert tokenizer.decode(tokenizer.encode_text(text)) == normal


def test_special_tokens_have_their_published_ids(tokenizer, reference):
    assert len(tokenizer) == tokenizer.vocab_size == reference.n_vocab == 151851
    assert (tokenizer.eod_id, tokenizer.im_start_id, tokenizer.im_end_id) == (151643, 151644, 151645)
    assert tokenizer.image_token_id == IMAGE_TOKEN_ID == 151646
    assert tokenizer.convert_tokens_to_ids("<|extra_204|>") == 151850
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 151643
    assert tokenizer.all_special_ids == list(range(151643, 151851))


def test_special_tokens_are_parsed_only_where_asked(tokenizer, reference):
    text = "a<|im_start|><|extra_0|>b<|extra_205|><|im_end|>\n<|endoftext|>"
    ids = tokenizer.encode(text)
    assert ids == reference.encode(text, allowed_special="all", disallowed_special=())
    assert ids[:4] == [64, 151644, 151646, 65]
    assert tokenizer(text, split_special_tokens=True)["input_ids"] == tokenizer.encode_text(text)
    assert tokenizer.encode_text(text) == reference.encode_ordinary(text)
    assert max(tokenizer.encode_text(text)) < 151643


def test_decoding(tokenizer):
    ids = [151644, 108386, 151645, 151646]
    assert tokenizer.decode(ids) == "<|im_start|>你好<|im_end|><|extra_0|>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "你好"
    assert tokenizer.batch_decode([[108386], [64]]) == ["你好", "a"]
    flag_joiner = IDS["👨\u200d👩\u200d👧"][1:2]  # two of a character's three bytes
    assert tokenizer.decode(flag_joiner) == "\ufffd"
    with pytest.raises(UnicodeDecodeError):
        tokenizer.decode(flag_joiner, errors="strict")
    assert tokenizer.decode([151935]) == "\ufffd", "a model's table is larger than the vocabulary"
    with pytest.raises(ValueError, match="-100"):
        tokenizer.decode([64, -100])


def test_tokens_and_ids_convert_both_ways(tokenizer):
    text = "两 dogs<|extra_0|> 👨\u200d👩"
    tokens = tokenizer.tokenize(text)
    assert IMAGE_TOKEN in tokens
    assert all(isinstance(token, bytes) for token in tokens if token != IMAGE_TOKEN)
    ids = tokenizer.convert_tokens_to_ids(tokens)
    assert ids == tokenizer.encode(text)
    assert tokenizer.convert_ids_to_tokens(ids) == tokens
    assert tokenizer.convert_tokens_to_string(tokens) == text
    assert tokenizer.convert_tokens_to_ids("你好") == tokenizer.convert_tokens_to_ids("你好".encode()) == 108386
    assert tokenizer.convert_tokens_to_ids("你好 is no single token") is None


@pytest.mark.parametrize("unit", ["a", " ", " \n", "中"])
def test_a_megabyte_of_one_character(tokenizer, unit):
    text = unit * (1_000_000 // len(unit))
    assert tokenizer.decode(tokenizer.encode_text(text)) == text


def test_long_texts_are_cut_in_white_space_only(tokenizer, reference):
    text = ("The quick brown fox jumps over 12 dogs. " * 30 + "\n" * 500 + " " * 999) * 60
    assert len(text) > 100_000
    assert tokenizer.encode_text(text) == reference.encode_ordinary(text)


def test_other_processes_get_the_same_tokenizer(tokenizer):
    other = pickle.loads(pickle.dumps(tokenizer))
    assert other.encode("你好<|im_end|>") == [108386, 151645]
    assert other.pad_token_id == 151643


def test_saves_and_loads(tokenizer, tmp_path, qwen_tiktoken):
    first = QWenTokenizer(str(qwen_tiktoken), model_max_length=8192, padding_side="left", pad_token="<|extra_1|>")
    first.save_pretrained(tmp_path)
    assert (tmp_path / "qwen.tiktoken").read_bytes() == qwen_tiktoken.read_bytes()
    again = QWenTokenizer.from_pretrained(tmp_path)
    assert (again.model_max_length, again.padding_side, again.pad_token_id) == (8192, "left", 151647)
    assert again.encode("你好<|im_end|>") == [108386, 151645]
    again.save_pretrained(tmp_path)  # over the file that it was read from
    assert (tmp_path / "qwen.tiktoken").read_bytes() == qwen_tiktoken.read_bytes()


@pytest.mark.parametrize("with_config", [True, False])
def test_a_published_folder_needs_no_remote_code(tmp_path, qwen_tiktoken, with_config):
    shutil.copy(qwen_tiktoken, tmp_path)
    if with_config:
        config = {
            "model_max_length": 8192,
            "tokenizer_class": "QWenTokenizer",
            "auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]},
        }
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = QWenTokenizer.from_pretrained(str(tmp_path))
    assert tokenizer.encode("你好") == [108386]
    if with_config:
        assert tokenizer.model_max_length == 8192
        tokenizer.save_pretrained(tmp_path / "copy")
        assert "auto_map" not in json.loads((tmp_path / "copy" / "tokenizer_config.json").read_text())


def test_a_missing_or_damaged_vocabulary_says_so(tmp_path, qwen_tiktoken):
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"no qwen\.tiktoken"):
        QWenTokenizer.from_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="cannot read the vocabulary"):
        QWenTokenizer(str(tmp_path / "absent"))
    lines = qwen_tiktoken.read_bytes().splitlines(keepends=True)
    damaged = {
        b"".join(lines[:1000]): "holds 1,000 different tokens, expected 151,643",
        b"".join(lines[:5]) + b"IQ": "line 6",
        b"".join(lines[:5]) + b"I!== 5": "line 6",
        b"version https://git-lfs.github.com/spec/v1\n": "line 1",
        b"".join([*lines[:-1], lines[0]]): "151,642 different",
        b"": "holds 0",
    }
    for content, message in damaged.items():
        (tmp_path / "qwen.tiktoken").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            QWenTokenizer.from_pretrained(str(tmp_path))


def test_misuse_says_what_to_do(tokenizer, qwen_tiktoken):
    with pytest.raises(ValueError, match="fixed"):
        tokenizer.add_tokens(["<image>"])
    with pytest.raises(ValueError, match="<pad>"):
        QWenTokenizer(str(qwen_tiktoken), pad_token="<pad>")
