"""Language models of transformers, given image features: the numbers are those of transformers' own classes."""

from __future__ import annotations

import pytest
import torch
from tiny_families import FAMILIES, make_family
from transformers import AutoModelForCausalLM, Gemma2Config, GraniteConfig

from model.language_models.causal_lm import UnsuitableModelError, check_suitable, load_causal_lm, multimodal_class


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    """A model of ours and transformers' own, of the same folder."""
    folder = make_family(tmp_path_factory.mktemp(request.param), request.param)
    return load_causal_lm(folder, torch.float32), AutoModelForCausalLM.from_pretrained(folder)


def prompt_with_images(model) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (2, 9) with two image tokens in each row, and their features (4, D)."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(10, 300, (2, 9), generator=generator)
    ids[0, 3:5] = ids[1, 5:7] = model.image_token_id
    return ids, torch.randn(4, model.config.hidden_size, generator=generator)


def embedded(stock, ids, features) -> torch.Tensor:
    """The same by hand: (B, T, D)."""
    is_image = ids >= stock.config.vocab_size
    embeds = stock.get_input_embeddings()(ids.masked_fill(is_image, 0)).clone()
    embeds[is_image] = features
    return embeds


def test_text_alone_gives_the_same_logits(pair):
    model, stock = pair
    ids = torch.arange(14).view(2, 7)
    assert torch.equal(model(input_ids=ids).logits, stock(input_ids=ids).logits)


def test_features_take_the_place_of_image_tokens(pair):
    model, stock = pair
    ids, features = prompt_with_images(model)
    got = model(input_ids=ids, image_features=features).logits
    torch.testing.assert_close(got, stock(inputs_embeds=embedded(stock, ids, features)).logits, rtol=0, atol=0)


def test_hidden_states_at_positions_give_the_logits_there(pair):
    model, _ = pair
    ids, features = prompt_with_images(model)
    positions = torch.tensor([2, 7, 12])
    mask = torch.ones_like(ids)
    hidden = model.hidden_at(positions, ids, mask, image_features=features)
    logits = model(input_ids=ids, image_features=features).logits.flatten(0, 1)
    torch.testing.assert_close(model.get_output_embeddings()(hidden), logits[positions])


def test_padding_on_the_left_changes_nothing(pair):
    model, _ = pair
    ids, features = prompt_with_images(model)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    alone = model(input_ids=ids[:1, 3:], image_features=features[:2]).logits
    padded = model(input_ids=ids, attention_mask=mask, image_features=features).logits
    torch.testing.assert_close(padded[:1, 3:], alone, rtol=1e-4, atol=1e-4)


def test_generation_is_that_of_transformers(pair):
    model, stock = pair
    ids, features = prompt_with_images(model)
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "repetition_penalty": 1.3}
    got = model.generate(input_ids=ids, image_features=features, **settings)
    seen = torch.where(ids == model.image_token_id, ids[:, :1], ids)
    embeds = embedded(stock, ids, features)
    want = stock.generate(input_ids=seen, inputs_embeds=embeds, **settings)
    assert torch.equal(got[:, :9], ids)
    assert torch.equal(got[:, 9:], want[:, -6:])


def test_numbers_that_differ_are_refused(pair):
    model, _ = pair
    ids, features = prompt_with_images(model)
    with pytest.raises(ValueError, match=r"4.*3"):
        model(input_ids=ids, image_features=features[:3])


SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
}


@pytest.mark.parametrize(
    ("config", "reason"),
    [(Gemma2Config(**SIZES, head_dim=8), "softcapping"), (GraniteConfig(**SIZES, logits_scaling=8.0), "logits differ")],
    ids=["capped", "scaled"],
)
def test_models_that_change_their_logits_are_refused(config, reason):
    with pytest.raises(UnsuitableModelError, match=reason):
        check_suitable(multimodal_class(config)(config))
