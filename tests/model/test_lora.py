"""LoRA: where it goes, what is trained, and what merging does."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from tiny_qwen import tiny_model
from tiny_vlm import (
    ALPHA,
    RANK,
    collate,
    enliven_trained,
    logits_of,
    make_language_model,
    new_model,
    sample,
)
from torch import nn
from torch.testing import assert_close

from model import LoraSettings, LoraTargetError, VisionLanguageModel
from model.lora import LeanLoraLinear, add_lora, make_lean
from qwen import MultimodalQWenLMHeadModel

LAYERS, WIDTH, INNER = 2, 16, 24


def language_model():
    return tiny_model(MultimodalQWenLMHeadModel).requires_grad_(False)


@pytest.mark.parametrize(
    ("targets", "unmatched"),
    [
        pytest.param(("c_atn",), "c_atn", id="misspelt"),
        pytest.param(("c_attn", "q_proj", "w3"), "q_proj, w3", id="two of three"),
        pytest.param(("attn",), "attn", id="a module that is no linear layer"),
        pytest.param(("ttn",), "ttn", id="the end of a name"),
        pytest.param((), "(empty)", id="none"),
    ],
)
def test_a_target_that_matches_nothing_is_an_error_that_lists_what_exists(targets, unmatched):
    model = language_model()
    with pytest.raises(LoraTargetError) as error:
        add_lora(model, LoraSettings(target_modules=targets))
    message = str(error.value)
    assert f"is called {unmatched};" in message
    assert "the language model has c_attn, c_proj, w1, w2, lm_head." in message
    assert "lora" not in str(model)


def test_fresh_lora_changes_nothing():
    model, ids = language_model(), torch.arange(6)[None]
    before = model(input_ids=ids).logits
    wrapped = add_lora(model, LoraSettings(rank=3)).eval()
    assert_close(wrapped(input_ids=ids).logits, before, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merging_adds_the_update_to_the_weight_and_rounds_once(tiny_bases, dtype):
    model = enliven_trained(new_model(tiny_bases, dtype=dtype)).eval()
    layers = {name: layer for name, layer in model.qwen.named_modules() if isinstance(layer, LoraLinear)}
    assert len(layers) == LAYERS * 3
    expected = {name: merged(layer) for name, layer in layers.items()}
    untouched = {n: p.detach().clone() for n, p in model.qwen.named_parameters() if "c_proj" in n or "ln_" in n}
    batch = collate(sample(1), sample(2, seed=1))
    before = logits_of(model, batch)

    model.merge_lora()

    assert type(model.language_model) is MultimodalQWenLMHeadModel
    weights = dict(model.language_model.named_parameters())
    for name, weight in expected.items():
        assert torch.equal(weights[f"{name}.weight"], weight), name
    for name, weight in untouched.items():
        assert torch.equal(weights[name], weight), name
    if dtype == torch.float32:
        assert_close(logits_of(model, batch), before, rtol=1e-4, atol=1e-4)
    model.merge_lora()  # a second time changes nothing
    assert dict(model.language_model.named_parameters()).keys() == weights.keys()


def merged(layer: LoraLinear) -> torch.Tensor:
    """W + (alpha / r) B A, added in fp32 and rounded once to the dtype of W."""
    A, B = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
    base = layer.base_layer.weight.detach()
    return base.float().addmm_(B, A, alpha=ALPHA / RANK).to(base.dtype)


@pytest.mark.parametrize("tied", [False, True], ids=["head of its own", "head tied to the embedding"])
def test_merging_into_the_head_leaves_the_embedding_alone(tiny_bases, tmp_path, tied):
    language = make_language_model(tmp_path / "qwen", tie_word_embeddings=tied)
    model = VisionLanguageModel.from_pretrained(language, tiny_bases[1], device="cpu")
    model.add_lora(LoraSettings(rank=RANK, alpha=ALPHA, dropout=0.0, target_modules=("c_attn", "lm_head")))
    enliven_trained(model)
    embedding = model.qwen.transformer.wte.weight.detach().clone()
    batch = collate(sample(1), sample(0, seed=1))
    before = logits_of(model, batch)
    model.merge_lora()
    assert_close(logits_of(model, batch), before, rtol=1e-4, atol=1e-4)
    assert torch.equal(model.qwen.transformer.wte.weight, embedding)
    assert not torch.equal(model.qwen.lm_head.weight, embedding)


# The layer's arithmetic: PEFT's own forward is what it is held against.


def lora_layer(dtype: torch.dtype, dropout: float = 0.0, **settings) -> LeanLoraLinear:
    torch.manual_seed(0)
    wrapped = nn.Sequential(nn.Linear(12, 20)).to(dtype).requires_grad_(False)
    config = LoraConfig(r=5, lora_alpha=7, lora_dropout=dropout, target_modules=["0"], **settings)
    peft = get_peft_model(wrapped, config)
    make_lean(peft)
    layer = peft.base_model.model[0]
    assert type(layer) is LeanLoraLinear
    nn.init.normal_(layer.lora_B["default"].weight)
    return layer


def results(layer: nn.Module, forward, x: torch.Tensor, autocast: bool) -> dict[str, torch.Tensor]:
    layer.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(5)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = forward(layer, x)
    out.backward(torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype))
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return {"out": out.detach(), "x": x.grad, "A": a.grad, "B": b.grad}


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(torch.float32, False), (torch.bfloat16, True), (torch.bfloat16, False), (torch.float16, True)],
)
def test_the_lean_layer_gives_what_pefts_own_gives(dtype, autocast, dropout):
    layer = lora_layer(dtype, dropout)
    x = torch.randn(2, 3, 12, dtype=dtype)
    ours = results(layer, LeanLoraLinear.forward, x, autocast)
    theirs = results(layer, LoraLinear.forward, x, autocast)
    exact = dtype == torch.float32
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype
        difference = (ours[name] - value).float().norm() / value.float().norm()
        assert difference < (1e-5 if exact else 1e-2), (name, difference)


def test_an_input_without_gradient_gets_none_and_the_update_still_does():
    layer = lora_layer(torch.float32)
    layer(torch.randn(2, 12)).sum().backward()
    assert layer.lora_A["default"].weight.grad.any()
    assert layer.lora_B["default"].weight.grad.any()


def test_merged_and_disabled_layers_are_left_to_peft():
    layer, x = lora_layer(torch.float32), torch.randn(2, 12)
    plain = layer(x)
    layer.merge()
    assert_close(layer(x), plain, rtol=1e-5, atol=1e-6)
    layer.unmerge()
    layer.enable_adapters(False)
    assert_close(layer(x), layer.base_layer(x))
