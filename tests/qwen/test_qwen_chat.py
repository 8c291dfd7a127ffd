"""`chat` and `chat_stream` give what `generate` gives, token for token, and never show half a character."""

from __future__ import annotations

import importlib
import itertools
import re
import sys

import pytest
import torch
import transformers
from tiny_qwen import tiny_model
from transformers import GenerationConfig

from qwen import IMAGE_TOKEN_ID, MultimodalQWenLMHeadModel, QWenLMHeadModel, make_context
from qwen.answering import answer_ids, decode
from qwen.sampling_loop import library_decode
from qwen.streaming import decode_growing, stream_ids

PUBLISHED = {
    **{"chat_format": "chatml", "max_window_size": 24000, "max_new_tokens": 12},
    **{"do_sample": True, "top_k": 0, "top_p": 0.8, "eos_token_id": 151643, "pad_token_id": 151643},
}
HISTORY = [("你好", "你好！"), ("What is it?", "A cat 🐈.")]
SETTINGS = {
    "published sampling": {},
    "greedy": {"do_sample": False},
    "warped": {"temperature": 0.7, "top_k": 30, "repetition_penalty": 1.2},
    "no cache": {"use_cache": False, "max_new_tokens": 6},
    "beams": {"num_beams": 3, "do_sample": False},
    "bf16": {"temperature": 2.0, "top_p": 1.0, "max_new_tokens": 24},
}


@pytest.fixture(scope="module")
def model():
    return published(tiny_model(MultimodalQWenLMHeadModel, vocab_size=151936))


def published(model):
    model.generation_config = GenerationConfig(**PUBLISHED)
    return model


def generated_text(model, tokenizer, ids, seed, **kwargs):
    """What `generate` gives, cut at the first stop token."""
    torch.manual_seed(seed)
    stops = [tokenizer.im_end_id, tokenizer.im_start_id, tokenizer.eod_id]
    ids = torch.tensor([ids]) if isinstance(ids, list) else ids
    out = model.generate(ids, attention_mask=torch.ones_like(ids), eos_token_id=stops, **kwargs)
    tokens = out[0, ids.shape[1] :].tolist()
    length = next((i for i, token in enumerate(tokens) if token in stops), len(tokens))
    return tokenizer.decode(tokens[:length])


def scripted(script):
    """A model that answers with the ids of `script`, whatever it is asked."""

    class Scripted(QWenLMHeadModel):
        num_steps = 0

        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = torch.full_like(out.logits, -1e9)
            out.logits[:, -1, script[min(self.num_steps, len(script) - 1)]] = 1e9
            self.num_steps += 1
            return out

    model = published(tiny_model(Scripted, vocab_size=151936))
    model.generation_config.max_new_tokens = 300
    return model


@pytest.mark.parametrize("name", SETTINGS)
def test_chat_and_stream_equal_generate(model, tokenizer, name):
    settings = SETTINGS[name]
    if name == "bf16":
        model = published(tiny_model(MultimodalQWenLMHeadModel, vocab_size=151936).to(torch.bfloat16))
    history, before = list(HISTORY), model.generation_config.to_dict()
    _, ids = make_context(tokenizer, "为什么？", history, "You are a helpful assistant.")
    want = generated_text(model, tokenizer, ids, 1, **settings)
    torch.manual_seed(1)
    answer, new_history = model.chat(tokenizer, "为什么？", history, **settings)
    assert answer == want
    assert new_history == [*HISTORY, ("为什么？", want)]
    if name == "beams":
        with pytest.raises(ValueError, match="num_beams is 3"):
            model.chat_stream(tokenizer, "q", **settings)
        return
    torch.manual_seed(1)
    texts = list(model.chat_stream(tokenizer, "为什么？", history, **settings))
    torch.manual_seed(1)
    ours = list(stream_ids(model, tokenizer, torch.tensor([ids]), **settings))
    assert texts[-1] == want
    assert ours == texts, "our loop and the library's draw the same"
    assert len(texts) > 2
    assert all(later.startswith(earlier) and later != earlier for earlier, later in itertools.pairwise(texts))
    assert (history, model.generation_config.to_dict()) == (HISTORY, before), "the caller's are not changed"


@pytest.mark.parametrize("do_sample", [True, False])
def test_ids_with_image_features(model, tokenizer, do_sample):
    ids = torch.tensor([[5, IMAGE_TOKEN_ID, IMAGE_TOKEN_ID, 6]])
    features = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    want = generated_text(model, tokenizer, ids, 4, do_sample=do_sample, image_features=features)
    for given in (features, (features,)):
        torch.manual_seed(4)
        texts = list(stream_ids(model, tokenizer, ids, do_sample=do_sample, image_features=given))
        torch.manual_seed(4)
        assert texts[-1] == answer_ids(model, tokenizer, ids, do_sample=do_sample, image_features=given) == want
    with pytest.raises(ValueError, match=r"holds 2 image tokens.* 1 image"):
        list(stream_ids(model, tokenizer, ids, do_sample=do_sample, image_features=features[:1]))


@pytest.mark.parametrize("do_sample", [True, False])
def test_end_tokens_in_the_prompt_are_no_padding(model, tokenizer, do_sample):
    """`generate` would take them for padding where they do not end the answer, and nobody says otherwise."""
    ids = torch.tensor([[5, tokenizer.eod_id, 6, tokenizer.eod_id, 7]])
    settings = {"do_sample": do_sample, "eos_token_id": 9}
    torch.manual_seed(4)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    want = tokenizer.decode(out[0, 5:])
    torch.manual_seed(4)
    assert answer_ids(model, tokenizer, ids, **settings) == want
    torch.manual_seed(4)
    assert list(stream_ids(model, tokenizer, ids, loop=library_decode if do_sample else decode, **settings))[-1] == want


# ---- Prompt, history, settings


def prompt_of(model, monkeypatch):
    """The ids that reach `generate`."""
    seen = []
    generate = type(model).generate

    def spy(self, *args, **kwargs):
        seen.append((kwargs["input_ids"][0].tolist(), kwargs["generation_config"]))
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "generate", spy)
    return seen


def test_history_may_hold_lists(model, tokenizer):
    """As JSON gives them."""
    _, new = model.chat(tokenizer, "q", [["a", "b"]], max_new_tokens=2)
    assert new[0] == ("a", "b")
    with pytest.raises(ValueError, match="pairs"):
        model.chat(tokenizer, "q", ["ab"])
    with pytest.raises(ValueError, match="pairs"):
        model.chat_stream(tokenizer, "q", ["ab"])  # before anything is taken from it


def test_window_size_comes_from_the_generation_config(tokenizer, monkeypatch):
    model = published(tiny_model(vocab_size=151936))
    just_enough = len(make_context(tokenizer, "q", HISTORY[1:], "You are a helpful assistant.")[1])
    window = {"max_window_size": just_enough}
    seen = prompt_of(model, monkeypatch)
    model.chat(tokenizer, "q", HISTORY, max_new_tokens=1, **window)
    model.generation_config.update(**window)
    model.chat(tokenizer, "q", HISTORY, max_new_tokens=1)
    model.chat(tokenizer, "q", HISTORY, generation_config=GenerationConfig(max_new_tokens=1))
    assert len(seen) == 3
    for ids, _ in seen:
        assert len(ids) == just_enough


def test_the_model_s_generation_config_rules_unless_told_otherwise(model, tokenizer, monkeypatch):
    seen = prompt_of(model, monkeypatch)
    model.chat(tokenizer, "q")
    model.chat(tokenizer, "q", top_p=0.5, max_new_tokens=3)
    model.chat(tokenizer, "q", generation_config=GenerationConfig(top_p=0.3, max_new_tokens=2))
    configs = [config for _, config in seen]
    assert [(c.do_sample, c.top_k, c.top_p, c.max_new_tokens) for c in configs] == [
        (True, 0, 0.8, 12),
        (True, 0, 0.5, 3),
        (True, 0, 0.3, 2),
    ]
    assert all(set(c.eos_token_id) == {151643, 151644, 151645} for c in configs)


def test_answers_are_not_cut_short_without_a_published_config(tokenizer, monkeypatch):
    """transformers' own limit would be 20 tokens in all; ours is that of the published chat models."""
    model = scripted(tokenizer.encode_text("a"))
    model.generation_config = GenerationConfig()
    assert model.chat(tokenizer, "q")[0] == "a" * 512


# ---- Where answers end


@pytest.mark.parametrize("do_sample", [True, False])
@pytest.mark.parametrize("stop", ["<|im_end|>", "<|im_start|>", "<|endoftext|>"])
def test_stop_tokens_end_the_answer_and_are_not_in_it(tokenizer, stop, do_sample):
    ids = [*tokenizer.encode_text("一 yes\n"), tokenizer.convert_tokens_to_ids(stop), *tokenizer.encode_text("no")]
    assert scripted(ids).chat(tokenizer, "q", do_sample=do_sample)[0] == "一 yes\n"
    texts = list(scripted(ids).chat_stream(tokenizer, "q", do_sample=do_sample))
    assert texts == ["一", "一 yes", "一 yes\n"]


@pytest.mark.parametrize("do_sample", [True, False])
def test_own_stop_ids(tokenizer, do_sample):
    ids = [*tokenizer.encode_text("a b"), tokenizer.im_end_id, *tokenizer.encode_text(" c d")]
    stop = tokenizer.encode_text(" d")
    model = scripted(ids)
    assert model.chat(tokenizer, "q", do_sample=do_sample, eos_token_id=stop[0])[0] == "a b<|im_end|> c"
    model = scripted(ids)
    assert list(model.chat_stream(tokenizer, "q", do_sample=do_sample, eos_token_id=stop))[-1] == "a b<|im_end|> c"


@pytest.mark.parametrize("do_sample", [True, False])
def test_an_empty_answer(tokenizer, do_sample):
    script = [tokenizer.im_end_id]
    assert scripted(script).chat(tokenizer, "q", do_sample=do_sample) == ("", [("q", "")])
    assert list(scripted(script).chat_stream(tokenizer, "q", do_sample=do_sample)) == [""]


# ---- Unicode

HARD_TEXT = "中文，龘䶮 𠮷 👩🏽‍🚀🇩🇪 naïve résumé ﷽ ไทย \u0e01\u0e33 한국 𝔘𝔫𝔦 a\u0323\u0307"


def byte_ids(tokenizer, data):
    """One token for each byte: the hardest way to cut a text."""
    return [tokenizer.convert_tokens_to_ids(bytes([byte])) for byte in data]


def test_no_broken_character_is_shown(tokenizer):
    for ids in (tokenizer.encode_text(HARD_TEXT), byte_ids(tokenizer, HARD_TEXT.encode())):
        texts = list(decode_growing(tokenizer, ids))
        assert texts[-1] == tokenizer.decode(ids)
        for earlier, later in itertools.pairwise(texts):
            assert later.startswith(earlier)
            assert len(later) > len(earlier)
        assert all("\ufffd" not in text for text in texts)
    assert len(list(decode_growing(tokenizer, byte_ids(tokenizer, "中文👩".encode())))) == 3


@pytest.mark.parametrize(
    ("data", "texts"),
    [
        (b"ok \xe4\xb8", ["o", "ok", "ok ", "ok \ufffd"]),  # the first two bytes of three
        (b"\xe4a", ["\ufffda"]),  # shown once the next byte proves it
        (b"", [""]),
    ],
)
def test_malformed_ends(tokenizer, data, texts):
    ids = byte_ids(tokenizer, data)
    assert list(decode_growing(tokenizer, ids)) == texts
    assert tokenizer.decode(ids) == texts[-1]


# ---- Refusals, abandoned streams, and the library's import


@pytest.mark.parametrize("do_sample", [True, False])
def test_a_stream_computes_only_what_is_asked_for(tokenizer, do_sample):
    model = scripted(tokenizer.encode_text("a"))
    stream = model.chat_stream(tokenizer, "q", do_sample=do_sample, max_new_tokens=100_000)
    assert model.num_steps == 0
    assert [next(stream), next(stream)] == ["a", "aa"]
    assert model.num_steps == 2
    stream.close()
    assert model.chat(tokenizer, "q", do_sample=do_sample, max_new_tokens=2)[0] == "aa"
    assert model.num_steps == 4


REFUSED = {
    "num_return_sequences": 2,
    "cache_implementation": "static",
    "temperature": 1e-40,
    "repetition_penalty": 1e40,
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_cannot_be_used_are_refused_at_once(model, tokenizer, name):
    for ask in (model.chat, model.chat_stream):
        with pytest.raises(ValueError, match=rf"{name} is .?{re.escape(str(REFUSED[name]))}"):
            ask(tokenizer, "q", **{name: REFUSED[name]})
    assert model.chat(tokenizer, "q", do_sample=False, temperature=1e-40)[0], "greedy answers ask for no temperature"


@pytest.mark.parametrize("shape", [(2, 3), (3,), (1, 0)])
def test_one_prompt_at_a_time(model, tokenizer, shape):
    for ask in (answer_ids, stream_ids):
        with pytest.raises(ValueError, match="one prompt"):
            ask(model, tokenizer, torch.zeros(shape, dtype=torch.long))


def test_the_import_leaves_transformers_as_it_was(model, tokenizer):
    list(model.chat_stream(tokenizer, "q"))
    assert "transformers_stream_generator.main" in sys.modules
    for name in ("BeamSearchScorer", "ConstrainedBeamSearchScorer", "DisjunctiveConstraint", "PhrasalConstraint"):
        assert not hasattr(transformers, name)
    utils = importlib.import_module("transformers.generation.utils")
    assert not hasattr(utils, "SampleOutput")
    assert hasattr(utils, "GenerateOutput")
    assert not hasattr(transformers.PreTrainedModel, "sample_stream")
