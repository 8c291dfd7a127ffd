"""The parts of a layer and of the loss, each against its formula in the precision that people train and answer in."""

from __future__ import annotations

import math

import pytest
import torch
from einops import rearrange
from tiny_qwen import random_ids, tiny_config, tiny_model
from torch import nn
from torch.testing import assert_close

from qwen.layers import QWenAttention, QWenRMSNorm, Rotation, rotary_tables, rotate
from qwen.loss import head_loss, supervised_loss

BF16 = torch.bfloat16


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_norm_takes_its_statistics_in_fp32_and_is_cast_before_the_weight():
    x, norm = random(7, 48).to(BF16), QWenRMSNorm(48, eps=1e-6).to(BF16)
    norm.weight.data = random(48, seed=1).to(BF16)
    wide = x.float()
    normal = wide * (wide.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()
    assert_close(norm(x), normal.to(BF16) * norm.weight, atol=0, rtol=0)


@pytest.mark.parametrize("position", [1, 257, 32767])
def test_rotary_tables_of_far_positions(position):
    cos, sin = rotary_tables(torch.tensor([[position]]), 128, 10000.0, None)
    angles = torch.tensor([position * 10000.0 ** (-2 * i / 128) for i in range(64)], dtype=torch.float64).repeat(2)
    error = 1e-6 + 1e-7 * position  # of an angle in fp32
    assert_close(cos.flatten(), angles.cos().float(), atol=error, rtol=0)
    assert_close(sin.flatten(), angles.sin().float(), atol=error, rtol=0)


def test_rotation_in_bf16_rounds_once():
    x = random(2, 3, 5, 8).to(BF16)
    rotation = Rotation(*rotary_tables(torch.arange(5)[None] * 77, 8, 10000.0, None), None)
    assert torch.equal(rotate(x, rotation), rotate(x.float(), rotation).to(BF16))


@torch.no_grad()
def test_rotary_on_a_part_of_the_channels():
    """With `rotary_pct` 0.5 the upper half of every head stays unturned: check against the formula, head by head."""
    x = random(1, 1, 3, 8)
    got = rotate(x, Rotation(*rotary_tables(torch.arange(3)[None], 4, 10000.0, None), None))
    for p in range(3):
        for pair_index, frequency in enumerate((1.0, 10000.0**-0.5)):
            a, b = x[0, 0, p, pair_index], x[0, 0, p, pair_index + 2]
            angle = torch.tensor(p * frequency)
            assert_close(got[0, 0, p, pair_index], a * angle.cos() - b * angle.sin())
            assert_close(got[0, 0, p, pair_index + 2], b * angle.cos() + a * angle.sin())
    assert torch.equal(got[..., 4:], x[..., 4:])
    assert isinstance(tiny_model(rotary_pct=0.5)(random_ids(1, 4)).logits, torch.Tensor)


@torch.no_grad()
@pytest.mark.parametrize("num_tokens", [1, 9])
def test_eager_attention_weights_in_bf16(num_tokens):
    """They are the softmax of fp32 scores, rounded once."""
    config = tiny_config(hidden_size=32, num_attention_heads=4)
    config._attn_implementation = "eager"
    attention = QWenAttention(config, 0).to(BF16).eval()
    attention.c_attn.weight.data.normal_(generator=torch.Generator().manual_seed(3))
    x = random(2, num_tokens, 32).to(BF16)
    rotation = Rotation(*rotary_tables(torch.arange(num_tokens)[None], 8, 10000.0, None), None)
    _, weights = attention(x, rotation, None, None)

    query, key, _ = rearrange(attention.c_attn(x), "b t (three h c) -> three b h t c", three=3, h=4)
    scores = (rotate(query, rotation) @ rotate(key, rotation).mT).float() / math.sqrt(8)
    scores += torch.full((num_tokens, num_tokens), float("-inf")).triu(1)
    assert torch.equal(weights, scores.softmax(-1).to(BF16))


@torch.no_grad()
@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("dropout", ["emb_dropout_prob", "attn_dropout_prob"])
def test_each_dropout_is_for_training_only(dropout, attn_implementation):
    model = tiny_model(attn_implementation=attn_implementation, **{dropout: 0.5})
    ids = random_ids(1, 13)
    assert torch.equal(model(ids).logits, tiny_model(attn_implementation=attn_implementation)(ids).logits)
    model.train()
    assert not torch.allclose(model(ids).logits, model(ids).logits, atol=1e-2)


@torch.no_grad()
def test_nothing_is_cached_while_training():
    model = tiny_model()
    assert model(random_ids(1, 5)).past_key_values is not None
    assert model.train()(random_ids(1, 5)).past_key_values is None


# ---- The loss in chunks


def test_tiny_gradients_survive_fp16():
    """All but the target have a probability of 1e-9, which fp16 would round to 0."""
    head = nn.Linear(2, 151_936, bias=False, dtype=torch.float16).requires_grad_(False)
    head.weight[:] = torch.tensor([0.0, 1.0])
    head.weight[7] = torch.tensor([1.0, 0.0])
    hidden = torch.tensor([[20.7, 0.0]], dtype=torch.float16, requires_grad=True)
    head_loss(hidden, head, torch.tensor([7])).backward()
    exact = hidden.detach().double().requires_grad_()
    supervised_loss(exact @ head.weight.double().T, torch.tensor([7])).backward()
    assert exact.grad[0, 1] > 1e-4
    assert_close(hidden.grad, exact.grad.half(), atol=0, rtol=0.05)


def test_a_head_with_a_bias():
    head = nn.Linear(16, 50).requires_grad_(False)
    hidden, targets = random(9, 16), random_ids(9, vocab_size=50)
    assert_close(head_loss(hidden, head, targets), supervised_loss(head(hidden), targets))
    assert not torch.allclose(head_loss(hidden, head, targets), supervised_loss(hidden @ head.weight.T, targets))
