"""The assembled model: what is trained, the loss, mixed batches, and generation."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tiny_qwen import left_padded
from tiny_vlm import (
    ALPHA,
    PAD_ID,
    VOCAB_SIZE,
    collate,
    enliven_trained,
    logits_of,
    new_model,
    prompt_of,
    sample,
    trainable_parameters,
)
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from model import LoraSettings, VisionLanguageModel
from qwen import IGNORE_INDEX, IMAGE_TOKEN_ID, loss

MIXED = (sample(1), sample(0, num_words=9, seed=1), sample(2, num_words=2, num_answer=6, seed=2))


@pytest.fixture
def model(tiny_bases):
    return enliven_trained(new_model(tiny_bases))


@pytest.fixture(scope="module")
def still(tiny_bases):
    """A model for inference; not to be changed."""
    return enliven_trained(new_model(tiny_bases)).eval()


def gradients(model: VisionLanguageModel) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


# What is trained


def test_a_batch_without_images_gives_the_projector_zeros_and_no_other_loss(model):
    batch = collate(sample(0), sample(0, num_words=2, seed=1))
    assert "pixel_values" not in batch
    for return_logits in (True, False):
        model.zero_grad()
        out = model.train()(**batch, return_logits=return_logits)
        out.loss.backward()
        for parameter in model.projector.parameters():
            assert parameter.grad is not None
            assert not parameter.grad.any()
        assert_close(out.loss, model.qwen(**batch).loss, rtol=1e-6, atol=0)


# The loss


@pytest.mark.parametrize("chunk", [1, VOCAB_SIZE * 5, 2**30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_loss_in_chunks_is_that_of_the_whole_head(monkeypatch, chunk, dtype):
    monkeypatch.setattr(loss, "CHUNK_LOGITS", chunk)
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(16, VOCAB_SIZE, bias=False).to(dtype).requires_grad_(False)
    targets = torch.randint(0, VOCAB_SIZE, (12,), generator=generator)
    found = []
    for whole in (True, False):
        hidden = torch.randn(12, 16, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
        one = loss.supervised_loss(head(hidden), targets, 7) if whole else loss.head_loss(hidden, head, targets, 7)
        (3 * one).backward()
        found.append((one.detach(), hidden.grad))
    exact = dtype == torch.float32
    assert_close(found[1][0], found[0][0], rtol=1e-6, atol=0)
    assert_close(found[1][1], found[0][1], rtol=1e-4 if exact else 3e-2, atol=1e-6 if exact else 1e-3)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("return_logits", [False, True], ids=["loss alone", "with logits"])
def test_padding_on_either_side_changes_neither_loss_nor_gradients(model, side, return_logits):
    batch = collate(*MIXED)
    if side == "left":
        lengths = batch["attention_mask"].sum(dim=1)
        for name in ("input_ids", "attention_mask", "labels"):
            batch[name] = torch.stack(
                [row.roll(len(row) - int(n)) for row, n in zip(batch[name], lengths, strict=True)]
            )
    model.train()(**batch, return_logits=return_logits, num_items_in_batch=7).loss.backward()
    together = gradients(model)
    model.zero_grad()
    for one in MIXED:
        model(**collate(one), num_items_in_batch=7).loss.backward()
    for name, gradient in gradients(model).items():
        assert_close(together[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_lora_on_the_head_is_trained(tiny_bases):
    model = VisionLanguageModel.from_pretrained(*tiny_bases, device="cpu", trainable=True)
    model.add_lora(LoraSettings(rank=4, alpha=ALPHA, dropout=0.0, target_modules=("c_attn", "lm_head")))
    batch = collate(*MIXED)
    enliven_trained(model)
    lean = model.train()(**batch, return_logits=False).loss
    lean.backward()
    found = gradients(model)
    assert sum("lm_head.lora_" in name and bool(gradient.any()) for name, gradient in found.items()) == 2
    model.zero_grad()
    whole = model(**batch).loss
    whole.backward()
    assert_close(lean, whole)
    for name, gradient in gradients(model).items():
        assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("return_logits", [False, True], ids=["loss alone", "with logits"])
def test_a_loss_stores_no_keys_and_values(model, return_logits):
    asked = []
    decoder = model.qwen.transformer
    decoder.register_forward_pre_hook(lambda _, args, kwargs: asked.append(kwargs["use_cache"]), with_kwargs=True)
    batch = collate(*MIXED)
    out = model.eval()(**batch, return_logits=return_logits)
    assert out.past_key_values is None
    with_cache = model(**batch, use_cache=True)
    assert with_cache.past_key_values is not None
    assert asked == [False, True]
    assert_close(out.loss, with_cache.loss)


def test_the_loss_is_the_mean_over_supervised_tokens_or_the_sum_by_the_number_given(model):
    batch = collate(*MIXED)
    logits = logits_of(model, batch)
    by_hand = [
        F.cross_entropy(logits[row, t - 1], label)
        for row, labels in enumerate(batch["labels"])
        for t, label in enumerate(labels)
        if label != IGNORE_INDEX
    ]
    assert len(by_hand) == 3 + 3 + 6
    total = torch.stack(by_hand).sum()
    with torch.no_grad():
        for return_logits in (True, False):
            assert_close(model(**batch, return_logits=return_logits).loss, total / len(by_hand))
            for number in (5, torch.tensor(5)):
                loss = model(**batch, return_logits=return_logits, num_items_in_batch=number).loss
                assert_close(loss, total / 5)


@pytest.mark.parametrize("return_logits", [False, True], ids=["loss alone", "with logits"])
def test_a_batch_in_which_nothing_is_supervised_has_a_loss_of_zero(model, return_logits):
    batch = collate(sample(1))
    batch["labels"][:] = IGNORE_INDEX
    out = model.train()(**batch, return_logits=return_logits)
    assert out.loss.item() == 0
    out.loss.backward()
    assert not any(gradient.any() for gradient in gradients(model).values())


# Images and rows


@pytest.mark.parametrize("return_logits", [False, True], ids=["loss alone", "with logits"])
@pytest.mark.parametrize("number", [0, 2, 4])
def test_another_number_of_images_is_refused_with_both_numbers(still, number, return_logits):
    batch = collate(*MIXED)
    batch["pixel_values"] = batch["pixel_values"][[0, 1, 2, 0]][:number]
    message = rf"12 image tokens .*\[4, 0, 8\].*\b{4 * number}\b"
    with pytest.raises(ValueError, match=message):
        still(**batch, return_logits=return_logits)
    if number:
        with pytest.raises(ValueError, match=message):
            still.generate(batch["input_ids"], batch["attention_mask"], batch["pixel_values"], max_new_tokens=1)


def test_features_of_the_tower_stand_for_pixels(still):
    batch = collate(*MIXED)
    expected = logits_of(still, batch)
    pixels = batch.pop("pixel_values")
    stored = still.vision_tower(pixels)
    assert torch.equal(logits_of(still, {**batch, "vision_features": stored}), expected)
    with pytest.raises(ValueError, match=r"pixel_values \(3, 3, 28, 28\) and vision_features \(3, 4, 32\)"):
        still(**batch, pixel_values=pixels, vision_features=stored)
    with pytest.raises(ValueError, match=r"\(N, 4, 32\), got \(3, 4, 31\)"):
        still(**batch, vision_features=stored[..., 1:])


def test_images_do_not_move_between_rows_where_only_the_sum_is_right(model):
    first, second = collate(sample(1), sample(1, seed=1))["input_ids"]
    first[0] = IMAGE_TOKEN_ID
    second[second.tolist().index(IMAGE_TOKEN_ID)] = 5
    ids = torch.stack([first, second])
    assert (ids == IMAGE_TOKEN_ID).sum(dim=1).tolist() == [5, 3]
    pixel_values = sample(2)["pixel_values"]
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=r"\[5, 3\].*multiple of 4"):
            call(ids, pixel_values=pixel_values)


# Generation


def prompts() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids, mask = left_padded([prompt_of(one) for one in MIXED], PAD_ID)
    return ids, mask, collate(*MIXED)["pixel_values"]


def one_prompt(index: int) -> dict:
    one = MIXED[index]
    inputs = {"input_ids": prompt_of(one)[None], "pixel_values": one.get("pixel_values")}
    return {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}


@pytest.mark.parametrize("copies", [{}, {"num_beams": 4, "num_return_sequences": 2}], ids=["greedy", "beams"])
def test_a_left_padded_batch_gives_every_row_what_it_gets_alone(still, copies):
    options = {**copies, "max_new_tokens": 6, "do_sample": False}
    ids, mask, pixel_values = prompts()
    together = still.generate(ids, mask, pixel_values, **options)
    alone = torch.cat([still.generate(**one_prompt(row), **options)[:, -6:] for row in range(3)])
    assert together[:, ids.shape[1] :].tolist() == alone.tolist()


# Precision and memory


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_in_half_precision_under_autocast(tiny_bases, dtype):
    batch = collate(*MIXED)
    with torch.no_grad():
        exact = enliven_trained(new_model(tiny_bases), std=0.05)(**batch).loss
    model = enliven_trained(new_model(tiny_bases, dtype=dtype), std=0.05).train()
    with torch.autocast("cpu", dtype=dtype):
        loss = model(**batch, return_logits=False).loss
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=0.03)
    loss.backward()
    found = gradients(model)
    assert found.keys() == trainable_parameters(model).keys()
    assert all(g.dtype == torch.float32 and g.isfinite().all() and g.any() for g in found.values())


@pytest.mark.parametrize("method", ["activation_checkpointing_enable", "gradient_checkpointing_enable"])
def test_options_of_gradient_checkpointing_reach_the_language_model(model, monkeypatch, method):
    """Trainer of transformers 5.23 calls the first, that of 5.20 to 5.22 the second."""
    calls = []
    monkeypatch.setattr(VisionLanguageModel, "qwen", SimpleNamespace(**{method: lambda **kwargs: calls.append(kwargs)}))
    options = {method.replace("enable", "kwargs"): {"use_reentrant": True}, "every_n_layers": 2, "offload": True}
    getattr(model, method)(**options)
    assert calls == [options]
