"""Logits and generated tokens equal those of transformers' Qwen2 with the weights mapped over, within `seq_length`."""

from __future__ import annotations

import pytest
import torch
from tiny_qwen import as_qwen2, left_padded, random_ids, tiny_model
from torch.testing import assert_close

from qwen import QWenLMHeadModel

SHAPES = {
    "heads fill the width": {"hidden_size": 16, "num_attention_heads": 2, "kv_channels": 8},
    "heads wider": {"hidden_size": 48, "num_attention_heads": 4, "kv_channels": 16, "num_hidden_layers": 3},
    "heads narrower": {"hidden_size": 40, "num_attention_heads": 3, "kv_channels": 8, "intermediate_size": 70},
    "one head, other base": {"num_attention_heads": 1, "kv_channels": 32, "rotary_emb_base": 500.0},
}


def close(ours, theirs):
    assert ours.abs().max() > 0.5, "these logits are too small for an absolute tolerance to mean anything"
    assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.fixture(params=list(SHAPES), ids=list(SHAPES))
def shape(request):
    return SHAPES[request.param]


@pytest.fixture(params=["sdpa", "eager"])
def pair(request, shape):
    model = tiny_model(attn_implementation=request.param, **shape)
    return model, as_qwen2(model)


@torch.no_grad()
def test_logits_without_cache(pair):
    ours, theirs = pair
    ids = random_ids(2, 21)
    close(ours(ids, use_cache=False).logits, theirs(ids, use_cache=False).logits)


@torch.no_grad()
def test_logits_chunk_by_chunk(pair):
    ours, theirs = pair
    ids = random_ids(2, 17)
    cache, got = None, []
    for chunk in ids.split([5, 1, 7, 4], dim=1):
        out = ours(chunk, past_key_values=cache)
        cache = out.past_key_values
        got.append(out.logits)
    close(torch.cat(got, dim=1), theirs(ids).logits)


@torch.no_grad()
def test_logits_of_right_padded_rows(pair):
    ours, theirs = pair
    ids = random_ids(3, 14)
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    mask[2, 1:] = 0
    real = mask.bool()
    close(ours(ids, attention_mask=mask).logits[real], theirs(ids, attention_mask=mask).logits[real])


@torch.no_grad()
def test_left_padded_rows_with_and_without_cache(pair):
    ours, theirs = pair
    ids = random_ids(3, 14)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    mask[2, :7] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    want = theirs(ids, attention_mask=mask, position_ids=positions).logits
    whole = ours(ids, attention_mask=mask).logits
    close(whole[mask.bool()], want[mask.bool()])
    assert whole.isfinite().all(), "padding must not give NaN: it would spread through the cache"
    first = ours(ids[:, :8], attention_mask=mask[:, :8])
    second = ours(ids[:, 8:13], attention_mask=mask[:, :13], past_key_values=first.past_key_values)
    third = ours(ids[:, 13:], attention_mask=mask, past_key_values=second.past_key_values)
    got = torch.cat((first.logits, second.logits, third.logits), dim=1)
    close(got[mask.bool()], want[mask.bool()])


@torch.no_grad()
def test_hidden_states_and_attentions():
    ours = tiny_model(attn_implementation="eager")
    theirs = as_qwen2(ours)
    theirs.set_attn_implementation("eager")
    ids = random_ids(2, 9)
    got = ours(ids, output_hidden_states=True, output_attentions=True)
    want = theirs(ids, output_hidden_states=True, output_attentions=True)
    assert len(got.hidden_states) == len(want.hidden_states) == 3
    assert len(got.attentions) == len(want.attentions) == 2
    for mine, reference in zip(got.hidden_states + got.attentions, want.hidden_states + want.attentions, strict=True):
        assert_close(mine, reference, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("keep", [1, 2, 9, 20, torch.tensor([8, 0, 4]), torch.arange(9).flip(0)])
@pytest.mark.parametrize("rows", [1, 2])
def test_logits_to_keep(keep, rows):
    ours = tiny_model()
    ids = random_ids(rows, 9)
    chosen = slice(-keep, None) if isinstance(keep, int) else keep
    whole = ours(ids, output_hidden_states=True)
    assert_close(ours(ids, logits_to_keep=keep).logits, whole.logits[:, chosen])
    assert_close(ours(inputs_embeds=ours.transformer.wte(ids), logits_to_keep=keep).logits, whole.logits[:, chosen])
    with_states = ours(ids, logits_to_keep=keep, output_hidden_states=True)
    assert_close(with_states.logits, whole.logits[:, chosen])
    assert_close(with_states.hidden_states, whole.hidden_states)
    after = [random_ids(rows, 1, seed=1), ours(ids, logits_to_keep=keep).past_key_values]
    assert_close(ours(after[0], past_key_values=after[1]).logits, ours(torch.cat((ids, after[0]), 1)).logits[:, -1:])


@torch.no_grad()
@pytest.mark.parametrize("heads_together", [1, 3, 4])
@pytest.mark.parametrize("padded", [False, True])
def test_heads_of_one_query_are_converted_in_parts(monkeypatch, heads_together, padded):
    model = tiny_model(num_attention_heads=4, kv_channels=8).to(torch.bfloat16)
    ids, mask = random_ids(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[1, :3] = 1 - padded

    def last() -> torch.Tensor:
        past = model(ids[:, :8], attention_mask=mask[:, :8]).past_key_values
        return model(ids[:, 8:], attention_mask=mask, past_key_values=past).logits

    want = last()
    monkeypatch.setattr("qwen.cpu_kernels._CONVERTED_TOGETHER", heads_together * 2 * 9 * 8)
    assert_close(last(), want, atol=0, rtol=0)


def test_loss_and_its_gradients():
    ours = tiny_model()
    theirs = as_qwen2(ours)
    ids = random_ids(3, 11)
    labels = ids.clone()
    labels[0, :6] = -100
    labels[2] = -100
    got = ours(ids, labels=labels).loss
    want = theirs(ids, labels=labels).loss
    assert_close(got, want)
    num_items = (labels[:, 1:] != -100).sum().item()
    for given in (40, torch.tensor(40)):  # of a whole optimizer step
        assert_close(ours(ids, labels=labels, num_items_in_batch=given).loss, got * num_items / 40)
    assert ours(ids, labels=torch.full_like(ids, -100)).loss == 0
    got.backward()
    want.backward()
    assert_close(ours.transformer.wte.weight.grad, theirs.model.embed_tokens.weight.grad, atol=1e-6, rtol=1e-4)
    gate = ours.transformer.h[1].mlp.w2.weight.grad
    assert_close(gate, theirs.model.layers[1].mlp.gate_proj.weight.grad, atol=1e-6, rtol=1e-4)


@torch.no_grad()
def test_wrong_masks_and_inputs_are_refused():
    ours = tiny_model()
    ids = random_ids(2, 5)
    with pytest.raises(ValueError, match=r"\(2, 4\).*\(2, 5\)"):
        ours(ids, attention_mask=torch.ones(2, 4))
    with pytest.raises(ValueError, match="exactly one"):
        ours()
    with pytest.raises(ValueError, match="eager"):
        ours(ids, output_attentions=True)
    with pytest.raises(ValueError, match="exactly one"):
        ours(ids, inputs_embeds=ours.get_input_embeddings()(ids))


def test_configuration_rejects_odd_sizes():
    with pytest.raises(ValueError, match="twice"):
        tiny_model(QWenLMHeadModel, intermediate_size=31)
    with pytest.raises(ValueError, match="rotary"):
        tiny_model(QWenLMHeadModel, kv_channels=5)


# ---- `generate`

GREEDY = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}
SAMPLING = {"do_sample": True, "top_p": 0.8, "top_k": 0, "max_new_tokens": 12, "pad_token_id": 0}
ROWS = [random_ids(n, seed=n) for n in (4, 9, 13)]


def new_tokens(model, ids, mask, **settings):
    torch.manual_seed(5)
    return model.generate(ids, attention_mask=mask, **settings)[:, ids.shape[1] :]


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
def test_every_mode_gives_the_tokens_of_qwen2(settings):
    model = tiny_model()
    ids, mask = left_padded(ROWS)
    got = new_tokens(model, ids, mask, **settings)
    assert torch.equal(got, new_tokens(as_qwen2(model), ids, mask, **settings))
    assert torch.equal(got, new_tokens(model, ids, mask, **settings)), "the same seed gives the same tokens"


@pytest.mark.parametrize("settings", [SAMPLING, {**GREEDY, "num_beams": 3}], ids=["sampling", "beams"])
def test_cache_changes_nothing(settings):
    model = tiny_model()
    ids, mask = left_padded(ROWS)
    with_cache = new_tokens(model, ids, mask, **settings)
    assert torch.equal(with_cache, new_tokens(model, ids, mask, **settings, use_cache=False))
    assert torch.equal(with_cache, new_tokens(model, ids, mask, **settings, cache_implementation="static"))
