"""Qwen2, Qwen3 and Llama leave as GGUF, too, and llama.cpp's own server answers as our model does."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace

import pytest
import torch
from tiny_run import one_line_error
from tiny_towers import make_siglip_checkpoint
from tokenizers import Regex, Tokenizer, pre_tokenizers

from model import VisionLanguageModel
from model.checkpoints.base_models import load_tokenizer
from model.export import gguf_text, gguf_tokenizer, llama_server
from model.export.verify import Answer, ExportMismatchError

gguf = pytest.importorskip("gguf", reason="--format gguf writes with it")
needs_llama_cpp = pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp is not installed")
FAMILIES = ("qwen2", "qwen3", "llama")
ODD_TEXTS = (
    "é à 한국어 🙂🙃 नमस्ते مرحبا",
    "  two  spaces\n\n\ttab",
    "1234567 ½ don't I'LL we'Re",
    "<b>x</b>\r\n",
    "a1b22c333",
)
LLAMA3 = gguf_tokenizer._WORDS.replace("DIGITS", r"\p{N}{1,3}")
SCALED = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
SLIDING = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}


@pytest.fixture
def export(run_export):
    return run_export


def read(file) -> tuple[dict[str, object], dict[str, torch.Tensor]]:
    """Metadata and tensors, by gguf's own reader."""
    reader = gguf.GGUFReader(file)
    tensors = {one.name: torch.tensor(one.data).reshape(tuple(one.shape.tolist())[::-1]) for one in reader.tensors}
    return {name: field.contents() for name, field in reader.fields.items()}, tensors


def edit_tokenizer(checkpoint, change) -> None:
    """Change the base language model's tokenizer.json."""
    path = checkpoint.parent / "language" / "tokenizer.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    change(values)
    path.write_text(json.dumps(values), encoding="utf-8")


def set_words(checkpoint, words, ignore_merges=False) -> None:
    def change(values):
        twin = Tokenizer.from_str(json.dumps(values))
        twin.pre_tokenizer = words
        values |= json.loads(twin.to_str())
        values["model"]["ignore_merges"] = ignore_merges

    edit_tokenizer(checkpoint, change)


def words_of(pattern):
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level])


# ---- The files


@pytest.mark.parametrize("family", FAMILIES)
def test_the_file_holds_the_merged_weights(export, make_family_checkpoint, family):
    """No row is added for an image token, and a tied head is not written."""
    checkpoint = make_family_checkpoint(family, make_siglip_checkpoint, vocab_size=300, tie_word_embeddings=True)
    _, tensors = read(export(checkpoint, "--format", "gguf") / "model-f32.gguf")
    ours = VisionLanguageModel.from_pretrained(model_weights=checkpoint, device="cpu")
    ours.merge_lora()
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.upper()], 2)
    expected = {table.get_name(name, (".weight", ".bias")): W for name, W in ours.language_model.state_dict().items()}
    del expected["output.weight"]
    if family == "llama":  # channels that turn together are neighbours: (0, 4), (1, 5), … of a head's 8
        order = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
        for name, W in expected.items():
            if "attn_q." in name or "attn_k." in name:
                expected[name] = torch.cat([head[order] for head in W.split(8)])
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], value) for name, value in expected.items())


def test_the_metadata_says_what_llama_cpp_needs(export, make_family_checkpoint):
    sizes = {"head_dim": 24, "num_hidden_layers": 3, "rms_norm_eps": 1e-5, "rope_theta": 5e5}
    checkpoint = make_family_checkpoint("qwen3", make_siglip_checkpoint, **sizes)
    set_words(checkpoint, words_of(LLAMA3.replace("{1,3}", "")))
    folder = export(checkpoint, "--format", "gguf")
    values, _ = read(folder / "model-f32.gguf")
    tokenizer = load_tokenizer(str(checkpoint.parent / "language"))
    expected = {
        "general.architecture": "qwen3",
        "qwen3.block_count": 3,
        "qwen3.context_length": 512,
        "qwen3.embedding_length": 32,
        "qwen3.feed_forward_length": 48,
        "qwen3.attention.head_count": 4,
        "qwen3.attention.head_count_kv": 2,
        "qwen3.attention.key_length": 24,
        "qwen3.attention.value_length": 24,
        "qwen3.rope.dimension_count": 24,
        "qwen3.rope.freq_base": 5e5,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.eos_token_id": tokenizer.stop_ids[0],
        "tokenizer.ggml.padding_token_id": tokenizer.pad_token_id,
        "tokenizer.ggml.add_bos_token": False,
    }
    assert {name: values[name] for name in expected} == expected
    assert values["qwen3.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    words, kinds = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    assert len(words) == len(set(words)) == len(kinds) == 320
    assert kinds[words.index("<|im_end|>")] == 3
    assert kinds[300:] == [5] * 20
    assert "--ctx-size 512 " in (folder / "EXPORT.md").read_text(encoding="utf-8")


# ---- What cannot be expressed


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("mistral", {}, "the language model is mistral"),
        ("llama", {"rope_parameters": SCALED}, "rope_type is 'linear'"),
        ("qwen2", SLIDING, "sliding window"),
        ("qwen2", {"head_dim": 16}, "64 wide"),
        ("qwen3", {"attention_bias": True}, "k_proj.bias"),
        ("llama", {"mlp_bias": True}, "down_proj.bias"),
        ("llama", {"hidden_act": "gelu"}, "gelu"),
    ],
    ids=["kind", "rotation", "window", "heads", "bias", "another bias", "activation"],
)
def test_models_that_are_refused(export, make_family_checkpoint, capfd, family, changes, reason):
    folder = export(make_family_checkpoint(family, make_siglip_checkpoint, **changes), "--format", "gguf", status=2)
    assert reason in one_line_error(capfd.readouterr().err, "export.py")
    assert not folder.exists()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (words_of(LLAMA3), "pre_tokenizer"),  # with merges, which llama.cpp would leave out for some words
        (words_of(LLAMA3.replace("{1,3}", "{1,2}")), "pre_tokenizer"),
        (pre_tokenizers.Metaspace(), "pre_tokenizer"),
    ],
    ids=["merges", "digits", "SentencePiece"],
)
def test_words_that_llama_cpp_does_not_know_are_refused(export, make_family_checkpoint, capfd, words, reason):
    checkpoint = make_family_checkpoint("llama", make_siglip_checkpoint)
    set_words(checkpoint, words)
    export(checkpoint, "--format", "gguf", status=2)
    assert reason in one_line_error(capfd.readouterr().err, "export.py")


def as_unigram(values) -> None:
    words = sorted(values["model"]["vocab"], key=values["model"]["vocab"].get)
    values["model"] = {"type": "Unigram", "unk_id": 0, "vocab": [[word, -1.0] for word in words]}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda values: values.update(normalizer={"type": "NFKC"}), "NFKC"),
        (lambda values: values["added_tokens"][1].update(lstrip=True), "<|eot_id|>"),
        (lambda values: values["model"].update(byte_fallback=True), "BPE"),
        (as_unigram, "Unigram"),
    ],
    ids=["normalizer", "strips", "bytes", "unigram"],
)
def test_tokenizers_that_are_refused(export, make_family_checkpoint, capfd, change, reason):
    checkpoint = make_family_checkpoint("llama", make_siglip_checkpoint)
    edit_tokenizer(checkpoint, change)
    export(checkpoint, "--format", "gguf", status=2)
    assert reason in one_line_error(capfd.readouterr().err, "export.py")


# ---- llama.cpp's server


@needs_llama_cpp
@pytest.mark.parametrize("family", FAMILIES)
def test_the_server_answers_as_our_model(export, make_family_checkpoint, family):
    checkpoint = make_family_checkpoint(family, make_siglip_checkpoint)
    report = (export(checkpoint, "--format", "gguf", verify=True) / "EXPORT.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1:-1] for line in report.splitlines() if " of 12 |" in line]
    assert len(rows) == 6
    assert all(row[3].strip() == "12 of 12" for row in rows)
    assert all(float(row[4]) <= 2e-3 * float(row[5]) for row in rows)


@needs_llama_cpp
@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("llama-bpe", words_of(LLAMA3)),
        pytest.param("qwen2", words_of(LLAMA3.replace("{1,3}", "")), marks=pytest.mark.slow),
        pytest.param(
            "smollm",
            pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
            marks=pytest.mark.slow,
        ),
        pytest.param("gpt-2", pre_tokenizers.ByteLevel(add_prefix_space=False), marks=pytest.mark.slow),
    ],
)
def test_texts_become_the_same_tokens(export, make_family_checkpoint, pre, words):
    """Merges across what the words are: without the right words, they would make other tokens."""
    checkpoint = make_family_checkpoint("llama", make_siglip_checkpoint, vocab_size=340)

    def merge_more(values):
        pairs = ["1 2", "12 3", "123 4", "3 3", "ĠĠ Ġ", "Ġ Ġ", "' t", "' L", "' R", "> x", "c 3", "a 1", "/ b"]
        for pair in pairs:
            values["model"]["merges"].append(pair.split())
            values["model"]["vocab"].setdefault(pair.replace(" ", ""), 300 + len(values["model"]["vocab"]) - 296)

    edit_tokenizer(checkpoint, merge_more)
    set_words(checkpoint, words, ignore_merges=pre == "llama-bpe")
    folder = export(checkpoint, "--format", "gguf")
    values, _ = read(folder / "model-f32.gguf")
    assert values["tokenizer.ggml.pre"] == pre
    tokenizer = load_tokenizer(str(checkpoint.parent / "language"))
    with llama_server.serving(folder / "model-f32.gguf", folder / "mmproj-f32.gguf", 256) as server:
        for text in ODD_TEXTS:
            found = server.post("/tokenize", content=text, add_special=False)["tokens"]
            assert found == tokenizer.encode_text(text), text


@needs_llama_cpp
@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "name", "wrong"),
    [
        ("qwen3", "self_attn.q_norm", "attn_k_norm"),
        ("llama", "interleaved", lambda W, heads: W),
        ("qwen3", "TEMPLATE_SETTINGS", {"enable_thinking": True}),
    ],
    ids=["norms swapped", "rows in transformers' order", "thinking"],
)
def test_an_export_that_differs_is_an_error(export, make_family_checkpoint, monkeypatch, family, name, wrong):
    checkpoint = make_family_checkpoint(family, make_siglip_checkpoint)
    if name in gguf_text._NAMES:
        monkeypatch.setitem(gguf_text._NAMES, name, wrong)
        monkeypatch.setitem(gguf_text._NAMES, "self_attn.k_norm", "attn_q_norm")
    else:
        monkeypatch.setattr(gguf_text, name, wrong)
    assert not export(checkpoint, "--format", "gguf", status=1, verify=True).exists()


def test_an_answer_that_ends_too_early_is_an_error():
    logits = torch.randn(5, 10)
    tokens = logits.argmax(-1).tolist()
    rows = [dict(enumerate(row.tolist())) for row in logits.log_softmax(-1)]
    ours = Answer("What?", False, {"input_ids": torch.tensor([[1, 2]])}, tokens[:4], logits)
    theirs = llama_server.ServerAnswer([1, 2], 2, tokens[:4], rows[:4])
    assert llama_server._compare(ours, theirs, torch.float32).num_equal == 4
    early = replace(theirs, tokens=tokens[:2], likeliest=rows[:2])
    with pytest.raises(ExportMismatchError):
        llama_server._compare(ours, early, torch.float32)


def test_parts_of_characters_are_known(make_family_checkpoint):
    """Bytes beyond ASCII are; letters, whole characters and control tokens are not."""
    checkpoint = make_family_checkpoint("qwen2", make_siglip_checkpoint)
    tiny = load_tokenizer(str(checkpoint.parent / "language"))
    parts = llama_server.parts_of_characters(tiny, 320)
    assert len(parts) == 128
    assert not {*tiny.encode_text("What is it?"), *tiny.stop_ids} & {*parts}
    assert {*tiny.encode_text("图")} <= {*parts}
