"""Past the trained length: dynamic NTK and log-n attention, against a plain computation from their formulas."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_qwen import left_padded, random_ids, tiny_model
from torch.testing import assert_close

from qwen.long_context import log_n_scale, ntk_alpha

SEQ_LENGTH = 16


@torch.no_grad()
def plain_logits(model, ids, alpha, log_n):
    """Logits (T, vocab) of one row, position by position in fp64, with `alpha` and log-n as told."""
    config = model.config
    weights = {name: value.double() for name, value in model.state_dict().items()}
    heads, channels = config.num_attention_heads, config.kv_channels
    base = config.rotary_emb_base * alpha ** (channels / (channels - 2))

    def norm(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + config.layer_norm_epsilon).sqrt() * weight

    def turned(x, p):
        half = channels // 2
        angles = torch.tensor([p * base ** (-2 * i / channels) for i in range(half)], dtype=torch.float64)
        a, b = x[..., :half], x[..., half:]
        return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), dim=-1)

    x = weights["transformer.wte.weight"][ids]
    for i in range(config.num_hidden_layers):
        w = {k.removeprefix(f"transformer.h.{i}."): v for k, v in weights.items()}
        fused = norm(x, w["ln_1.weight"]) @ w["attn.c_attn.weight"].T + w["attn.c_attn.bias"]
        q, k, v = (part.unflatten(-1, (heads, channels)) for part in fused.chunk(3, dim=-1))
        k = torch.stack([turned(k[p], p) for p in range(len(ids))])
        out = []
        for p in range(len(ids)):
            query = turned(q[p], p)
            if log_n:
                query = query * max(1.0, math.log(p + 1) / math.log(SEQ_LENGTH))
            scores = torch.einsum("hc,khc->hk", query, k[: p + 1]) / math.sqrt(channels)
            out.append(torch.einsum("hk,khc->hc", scores.softmax(-1), v[: p + 1]).flatten())
        x = x + torch.stack(out) @ w["attn.c_proj.weight"].T
        y = norm(x, w["ln_2.weight"])
        gate = y @ w["mlp.w2.weight"].T
        x = x + ((y @ w["mlp.w1.weight"].T) * gate * gate.sigmoid()) @ w["mlp.c_proj.weight"].T
    return (norm(x, weights["transformer.ln_f.weight"]) @ weights["lm_head.weight"].T).float()


@pytest.fixture(params=["sdpa", "eager"])
def model(request):
    return tiny_model(seq_length=SEQ_LENGTH, attn_implementation=request.param)


@pytest.mark.parametrize(
    ("length", "alpha"),
    # ceil(log2(n / 16) + 1) is 1 up to 16, 2 up to 32, 3 up to 64, 4 up to 128; 2 to that power, less 1.
    [(1, 1), (16, 1), (17, 3), (32, 3), (33, 7), (64, 7), (65, 15), (129, 31)],
)
def test_alpha_by_hand(length, alpha):
    got = ntk_alpha(None, length, SEQ_LENGTH)
    assert (1.0 if got is None else got.item()) == alpha
    # the same row, left-padded to 200 keys
    mask = torch.zeros(1, 200)
    mask[0, 200 - length :] = 1
    assert ntk_alpha(mask, 200, SEQ_LENGTH).tolist() == [alpha]


def test_log_n_by_hand():
    positions = torch.tensor([[0, 14, 15, 16, 63, 255]])
    got = log_n_scale(positions, SEQ_LENGTH).flatten().tolist()
    # log 17 / log 16 = 2.833213 / 2.772589; log 64 / log 16 = 1.5; log 256 / log 16 = 2
    assert got == pytest.approx([1, 1, 1, 1.0218654, 1.5, 2.0], abs=1e-6)


@pytest.mark.parametrize(("length", "alpha"), [(16, 1.0), (17, 3.0), (40, 7.0)])
def test_logits_past_the_trained_length(model, length, alpha):
    ids = random_ids(length)
    assert_close(model(ids[None]).logits[0], plain_logits(model, ids, alpha, log_n=True), atol=1e-5, rtol=0)


def test_each_switch_alone():
    ids = random_ids(40)
    for ntk, log_n in ((True, False), (False, True), (False, False)):
        model = tiny_model(seq_length=SEQ_LENGTH, use_dynamic_ntk=ntk, use_logn_attn=log_n)
        want = plain_logits(model, ids, 7.0 if ntk else 1.0, log_n=log_n)
        assert_close(model(ids[None]).logits[0], want, atol=1e-5, rtol=0)


def test_training_uses_neither(model):
    ids = random_ids(40)
    model.train()
    assert_close(model(ids[None]).logits[0], plain_logits(model, ids, 1.0, log_n=False), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("prompt_length", "alpha"),
    [(12, 1.0), (20, 3.0), (30, 3.0)],
    ids=["generation passes the trained length", "prompt past it", "generation passes the next power of two"],
)
def test_alpha_of_the_prompt_rules_the_whole_generation(model, prompt_length, alpha):
    ids = random_ids(prompt_length)
    got = model.generate(ids[None], attention_mask=torch.ones(1, prompt_length), max_new_tokens=12, do_sample=False)
    want = plain_logits(model, got[0], alpha, log_n=True)[prompt_length - 1 : -1].argmax(-1)
    assert torch.equal(got[0, prompt_length:], want)


@torch.no_grad()
def test_cached_logits_keep_the_alpha_of_the_prefill(model):
    ids = random_ids(40)
    cache = model(ids[None, :20]).past_key_values
    got = [model(ids[None, t : t + 1], past_key_values=cache).logits[0, 0] for t in range(20, 40)]
    assert_close(torch.stack(got), plain_logits(model, ids, 3.0, log_n=True)[20:], atol=1e-5, rtol=0)


@torch.no_grad()
def test_left_padded_rows_get_what_they_get_alone(model):
    rows = [random_ids(n, seed=n) for n in (5, 16, 20, 40)]
    ids, mask = left_padded(rows)
    batch = model(ids, attention_mask=mask).logits
    for row, logits in zip(rows, batch, strict=True):
        assert_close(logits[-len(row) :], model(row[None]).logits[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_left_padded_rows_generate_what_they_generate_alone(num_beams):
    model = tiny_model(seq_length=SEQ_LENGTH)
    rows = [random_ids(n, seed=n) for n in (12, 40)]
    ids, mask = left_padded(rows)
    settings = {"max_new_tokens": 8, "do_sample": False, "num_beams": num_beams, "pad_token_id": 0}
    batch = model.generate(ids, attention_mask=mask, **settings)[:, ids.shape[1] :]
    for row, tokens in zip(rows, batch, strict=True):
        alone = model.generate(row[None], attention_mask=torch.ones(1, len(row)), **settings)[0, len(row) :]
        assert torch.equal(tokens, alone)
