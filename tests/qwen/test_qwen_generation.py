"""`generate` works whole: greedy, sampling, beams, batches, embeddings; and gradient checkpointing."""

from __future__ import annotations

import pytest
import torch
from tiny_qwen import as_qwen2, left_padded, random_ids, tiny_model
from torch.testing import assert_close
from transformers import DynamicCache

GREEDY = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}
SAMPLING = {"do_sample": True, "top_p": 0.8, "top_k": 0, "max_new_tokens": 12, "pad_token_id": 0}
ROWS = [random_ids(n, seed=n) for n in (4, 9, 13)]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def new_tokens(model, ids, mask=None, **settings):
    mask = torch.ones_like(ids) if mask is None else mask
    torch.manual_seed(5)
    return model.generate(ids, attention_mask=mask, **settings)[:, ids.shape[1] :]


@torch.no_grad()
def test_greedy_takes_the_likeliest_token(model):
    row = ROWS[1][None]
    for _ in range(12):
        row = torch.cat((row, model(row, use_cache=False).logits[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(new_tokens(model, ROWS[1][None], **GREEDY), row[:, 9:])


@pytest.mark.parametrize(
    "settings",
    [
        GREEDY,
        SAMPLING,
        {**SAMPLING, "top_k": 5, "temperature": 0.7, "repetition_penalty": 1.3},
        {**GREEDY, "num_beams": 3, "num_return_sequences": 2},
        {**SAMPLING, "num_beams": 2},
        {**SAMPLING, "num_return_sequences": 3},
        {**GREEDY, "no_repeat_ngram_size": 2, "min_new_tokens": 5, "eos_token_id": 7},
    ],
    ids=["greedy", "sampling", "warped", "beams", "beam sampling", "several answers", "processors"],
)
def test_every_mode_gives_the_tokens_of_qwen2(model, settings):
    ids, mask = left_padded(ROWS)
    got = new_tokens(model, ids, mask, **settings)
    assert torch.equal(got, new_tokens(as_qwen2(model), ids, mask, **settings))
    assert torch.equal(got, new_tokens(model, ids, mask, **settings)), "the same seed gives the same tokens"


@pytest.mark.parametrize("settings", [GREEDY, {**GREEDY, "num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_left_padded_rows_get_what_they_get_alone(settings, attn_implementation):
    model = tiny_model(attn_implementation=attn_implementation)
    ids, mask = left_padded(ROWS)
    batch = new_tokens(model, ids, mask, **settings)
    for row, tokens in zip(ROWS, batch, strict=True):
        assert torch.equal(tokens, new_tokens(model, row[None], **settings)[0])


@pytest.mark.parametrize(
    "settings", [GREEDY, SAMPLING, {**GREEDY, "num_beams": 3}], ids=["greedy", "sampling", "beams"]
)
def test_cache_changes_nothing(model, settings):
    ids, mask = left_padded(ROWS)
    with_cache = new_tokens(model, ids, mask, **settings)
    assert torch.equal(with_cache, new_tokens(model, ids, mask, **settings, use_cache=False))
    assert torch.equal(with_cache, new_tokens(model, ids, mask, **settings, cache_implementation="static"))


def test_going_on_from_a_cache(model):
    ids = ROWS[2][None]
    cache = DynamicCache(config=model.config)
    first = model.generate(ids, past_key_values=cache, **GREEDY)
    longer = torch.cat((first, ROWS[0][None]), dim=1)
    again = model.generate(longer, past_key_values=cache, **GREEDY)
    assert torch.equal(again, model.generate(longer, **GREEDY))


def gradients(model, ids, mask):
    model.zero_grad()
    loss = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("options", [None, {"use_reentrant": False}, {"use_reentrant": True}])
def test_gradient_checkpointing_gives_equal_gradients(options):
    model = tiny_model().train()
    ids, mask = left_padded(ROWS)
    loss, want = gradients(model, ids, mask)
    runs = []
    model.transformer.h[1].ln_1.register_forward_hook(lambda *_: runs.append(1))
    model.gradient_checkpointing_enable(options)
    if options and options["use_reentrant"]:
        model.enable_input_require_grads()
    again, got = gradients(model, ids, mask)
    assert len(runs) == 2, "the block is to be computed again in the backward pass"
    assert_close(again, loss)
    for name, gradient in want.items():
        assert gradient.abs().max() > 0, name
        assert_close(got[name], gradient, atol=1e-7, rtol=1e-5)
    model.gradient_checkpointing_disable()
    assert_close(gradients(model, ids, mask)[0], loss)


def test_checkpointing_lora_through_peft():
    """With frozen weights the first block gets an input without gradient, and LoRA must get its own all the same."""
    from peft import LoraConfig, get_peft_model

    ids, mask = left_padded(ROWS)
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["c_attn", "w1", "w2"], lora_dropout=0.0))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(ids, attention_mask=mask, labels=ids).loss.backward()
        results.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert results[0].keys() == results[1].keys()
    assert len(results[0]) == 2 * 3 * 2
    for name, gradient in results[0].items():
        assert gradient.abs().max() > 0, name
        assert_close(results[1][name], gradient, atol=1e-7, rtol=1e-5)
