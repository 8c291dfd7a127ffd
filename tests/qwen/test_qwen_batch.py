"""Batches of prompts get the answers that each would get alone, and the cache behind them holds what it should."""

from __future__ import annotations

import pytest
import torch
from tiny_qwen import random_ids, tiny_model
from transformers import DynamicCache

from qwen import IMAGE_TOKEN_ID, MultimodalQWenLMHeadModel, QWenLMHeadModel
from qwen.answering import answer_ids, pad_left
from qwen.batch_answering import answer_batch
from qwen.cache import GrowingCache

VOCABULARY = IMAGE_TOKEN_ID + 2
LENGTHS = (30, 7, 19, 7, 64)


@pytest.fixture(scope="module")
def model():
    return tiny_model(MultimodalQWenLMHeadModel, vocab_size=VOCABULARY)


@pytest.fixture(scope="module")
def prompts():
    """Rows of several lengths; the first has an image of 4 tokens, the third two."""
    rows = [random_ids(length, vocab_size=150_000, seed=i).tolist() for i, length in enumerate(LENGTHS)]
    rows[0][5:9] = [IMAGE_TOKEN_ID] * 4
    rows[2][2:10] = [IMAGE_TOKEN_ID] * 8
    return rows


@pytest.fixture(scope="module")
def features():
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(4, 16, generator=generator), None, torch.randn(2, 4, 16, generator=generator), None, None]


def alone(model, tokenizer, prompts, features, seed=0, **options) -> list[str]:
    answers = []
    for prompt, row in zip(prompts, features, strict=True):
        torch.manual_seed(seed)
        images = {} if row is None else {"image_features": (row.flatten(0, -2),)}
        answers.append(answer_ids(model, tokenizer, torch.tensor([prompt]), **images, **options))
    return answers


SETTINGS = {
    "greedy": {"do_sample": False, "max_new_tokens": 7},
    "penalty": {"do_sample": False, "max_new_tokens": 7, "repetition_penalty": 1.7},
    "top_p": {"do_sample": True, "max_new_tokens": 7, "top_p": 0.7, "temperature": 1.4, "top_k": 0},
    "top_k": {"do_sample": True, "max_new_tokens": 7, "top_k": 5, "repetition_penalty": 1.2},
    "whole length": {"do_sample": False, "max_length": 70},
    "beams": {"do_sample": False, "max_new_tokens": 4, "num_beams": 2},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_answers_are_those_of_each_prompt_alone(model, tokenizer, prompts, features, name):
    options = SETTINGS[name]
    together = answer_batch(model, tokenizer, prompts, features, seed=5, **options)
    assert together == alone(model, tokenizer, prompts, features, seed=5, **options)
    assert len(set(together)) > 1
    # Nothing depends on the neighbours, or on the order.
    backwards = answer_batch(model, tokenizer, prompts[::-1], features[::-1], seed=5, **options)
    assert backwards == together[::-1]


def test_rows_end_each_at_its_own_stop(model, tokenizer, prompts, features):
    """Every token of the vocabulary's first two thirds is a stop, so that rows end at different lengths."""
    stops = list(range(100_000))
    options = {"do_sample": True, "eos_token_id": stops, "max_new_tokens": 12}
    together = answer_batch(model, tokenizer, prompts, features, seed=1, **options)
    assert together == alone(model, tokenizer, prompts, features, seed=1, **options)
    assert len({len(answer) for answer in together}) > 1


def test_past_the_trained_length_each_row_has_its_own_positions(tokenizer):
    """Short rows beside one that is past `seq_length`: dynamic NTK and log-n are of the row, not of the batch."""
    model = tiny_model(MultimodalQWenLMHeadModel, vocab_size=VOCABULARY, seq_length=32)
    prompts = [random_ids(length, vocab_size=150_000, seed=length).tolist() for length in (30, 90, 33, 8)]
    options = {"do_sample": True, "max_new_tokens": 10}
    together = answer_batch(model, tokenizer, prompts, seed=2, **options)
    assert together == alone(model, tokenizer, prompts, [None] * 4, seed=2, **options)


def test_what_can_not_be_answered(model, tokenizer, prompts):
    assert answer_batch(model, tokenizer, []) == []
    with pytest.raises(ValueError, match="a prompt is empty"):
        answer_batch(model, tokenizer, [[1], []])
    with pytest.raises(ValueError, match=r"64 tokens.* max_length 50.*max_new_tokens"):
        answer_batch(model, tokenizer, prompts, max_length=50)
    with pytest.raises(ValueError, match="12 image tokens"):
        answer_batch(model, tokenizer, prompts, max_new_tokens=2)


def test_tokens_of_a_bf16_model_are_drawn_from_fp32_scores(tokenizer, prompts):
    model = tiny_model(MultimodalQWenLMHeadModel, vocab_size=VOCABULARY).to(torch.bfloat16)
    dtypes = set()

    def spy(ids, scores):
        dtypes.add(scores.dtype)
        return scores

    options = {"do_sample": True, "max_new_tokens": 3, "logits_processor": [spy]}
    together = answer_batch(model, tokenizer, prompts[1:4:2], seed=5, **options)
    assert together == alone(model, tokenizer, prompts[1:4:2], [None] * 2, seed=5, **options)
    assert dtypes == {torch.float32}


def test_padding_adds_no_token_that_the_row_does_not_hold():
    ids, mask = pad_left([[5, 6, 7], [8]], torch.device("cpu"))
    assert ids.tolist() == [[5, 6, 7], [8, 8, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


# ---- The cache


def states(tokens: int, seed: int, rows: int = 2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 2, tokens, 8, generator=generator), torch.randn(rows, 2, tokens, 8, generator=generator)


def test_the_growing_cache_holds_what_transformers_own_holds():
    config = tiny_model().config
    ours, theirs = GrowingCache(config), DynamicCache(config=config)
    steps = [5, 1, 1, 200, *[1] * 100, 3]
    for step, tokens in enumerate(steps):
        for layer in range(2):
            new = states(tokens, 10 * step + layer)
            for mine, yours in zip(ours.update(*new, layer), theirs.update(*new, layer), strict=True):
                assert torch.equal(mine, yours)
        assert ours.get_seq_length() == theirs.get_seq_length() == sum(steps[: step + 1])


def test_the_growing_cache_moves_only_now_and_then():
    cache = GrowingCache(tiny_model().config)
    places = {cache.update(*states(1, step), 0)[0].data_ptr() for step in range(400)}
    assert len(places) < 10


def test_truncated_dropped_and_reordered_rows_are_continued_right():
    config = tiny_model().config
    cache = GrowingCache(config)
    for layer in range(2):
        cache.update(*states(6, layer, rows=3), layer)
    cache.truncate(4)
    cache.select_rows(torch.tensor([2, 0]))
    cache.reorder_cache(torch.tensor([1, 0]))
    new = states(2, 9)
    keys, values = cache.update(*new, 1)
    before = states(6, 1, rows=3)
    assert torch.equal(keys, torch.cat((before[0][[0, 2], :, :4], new[0]), dim=2))
    assert torch.equal(values, torch.cat((before[1][[0, 2], :, :4], new[1]), dim=2))


def test_a_cache_of_the_callers_own_is_filled_and_inference_mode_left():
    model = tiny_model(QWenLMHeadModel)
    ids = random_ids(1, 6)
    own = DynamicCache(config=model.config)
    model.generate(ids, max_new_tokens=2, past_key_values=own, do_sample=False, pad_token_id=0)
    assert own.get_seq_length() == 7
    with torch.inference_mode():
        cache = model(ids[:, :5]).past_key_values
    with torch.no_grad():
        after = model(ids[:, 5:], past_key_values=cache).logits[:, -1]
        torch.testing.assert_close(after, model(ids).logits[:, -1])
