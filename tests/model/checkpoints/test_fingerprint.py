"""Fingerprints tell base models apart by what they are, not by where they lie."""

import pytest
import torch
from torch import nn

from model.checkpoints.fingerprint import comparable, model_fingerprint


def layer(seed: int = 0, size: int = 300) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Linear(size, 5)


def test_the_same_weights_have_the_same_fingerprint_in_bf16_and_fp32():
    assert model_fingerprint(layer()) == model_fingerprint(layer())
    assert model_fingerprint(layer().to(torch.bfloat16)) == model_fingerprint(layer())


def test_other_weights_shapes_names_and_settings_have_another():
    prints = [
        model_fingerprint(layer()),
        model_fingerprint(layer(seed=1)),
        model_fingerprint(layer(size=301)),
        model_fingerprint(nn.Sequential(layer())),
        model_fingerprint(layer(), {"image_mean": 0.5}),
    ]
    assert len(set(prints)) == len(prints)


@pytest.mark.parametrize("size", [1, 2, 63, 64, 65, 19_447_808])  # the last is past what fp32 can count to
def test_tensors_of_any_size(size):
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(size, dtype=torch.bfloat16))
    before = model_fingerprint(model)
    with torch.no_grad():
        model.weight[-1] = 1  # the last value counts in every size
    assert model_fingerprint(model) != before


def test_of_a_model_in_fp16_it_is_compared_with_others_in_fp16():
    half, same, other = (model_fingerprint(layer(seed).to(torch.float16)) for seed in (0, 0, 1))
    assert half == same != other
    assert comparable(half, other)
    for wide in (model_fingerprint(layer()), model_fingerprint(layer().to(torch.bfloat16))):
        assert comparable(wide, wide)
        assert not comparable(half, wide)
        assert not comparable(wide, half)
    assert not comparable("", half)
    assert not comparable(half, "")
