"""Image features stand where the prompt says `<|extra_0|>`, and everything else is as for text."""

from __future__ import annotations

import pytest
import torch
from tiny_qwen import left_padded, tiny_model
from torch.testing import assert_close

from qwen import IMAGE_TOKEN_ID, MultimodalQWenLMHeadModel, MultimodalQWenModel, QWenLMHeadModel

IMG = IMAGE_TOKEN_ID
WIDTH = 16
NO_IMAGE = [11, 12, 13, 14]
ONE_IMAGE = [21, IMG, IMG, IMG, 22]
TWO_IMAGES = [IMG, IMG, IMG, 31, 32, IMG, IMG, IMG, 33]
GREEDY = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0}


@pytest.fixture(scope="module")
def model():
    return tiny_model(MultimodalQWenLMHeadModel, vocab_size=151936)


def features(num_images, seed=3):
    return torch.randn(num_images, 3, WIDTH, generator=torch.Generator().manual_seed(seed))


def batch(*rows):
    return left_padded([torch.tensor(row) for row in rows])


def embeds_by_hand(model, ids, image_features):
    """Walk through the ids and take the next feature at each image token."""
    remaining = iter(image_features.reshape(-1, WIDTH))
    table = model.get_input_embeddings().weight
    return torch.stack([torch.stack([next(remaining) if i == IMG else table[i] for i in row]) for row in ids.tolist()])


BATCHES = {
    "no image": ([NO_IMAGE], 0),
    "two images": ([TWO_IMAGES], 2),
    "mixed rows": ([ONE_IMAGE, NO_IMAGE, TWO_IMAGES], 3),
    "none in the first row": ([NO_IMAGE, TWO_IMAGES], 2),
}


@torch.no_grad()
@pytest.mark.parametrize(("rows", "num_images"), BATCHES.values(), ids=list(BATCHES))
def test_features_land_where_the_image_tokens_are(model, rows, num_images):
    ids, mask = batch(*rows)
    images = features(num_images)
    want = embeds_by_hand(model, ids, images)
    got = model(ids, attention_mask=mask, image_features=images if num_images else None).logits
    assert torch.equal(got, model(inputs_embeds=want, attention_mask=mask).logits)


@torch.no_grad()
def test_without_images_it_is_the_language_model(model):
    plain = QWenLMHeadModel(model.config).eval()
    plain.load_state_dict(model.state_dict())
    ids = torch.tensor([NO_IMAGE])
    assert torch.equal(model(ids).logits, plain(ids).logits)
    assert torch.equal(model(ids, image_features=features(0)).logits, plain(ids).logits)
    assert type(model.transformer) is MultimodalQWenModel


@pytest.mark.parametrize(
    ("row", "num_images", "numbers"),
    [(NO_IMAGE, 1, (0, 3)), (ONE_IMAGE, 0, (3, 0)), (ONE_IMAGE, 2, (3, 6)), ([21, IMG, 22], 1, (1, 3))],
)
def test_counts_that_differ_are_an_error_with_both(model, row, num_images, numbers):
    ids = torch.tensor([row])
    tokens, given = numbers
    for images in [features(num_images)] + ([None] if num_images == 0 else []):
        with pytest.raises(ValueError, match=rf"holds {tokens} image tokens.* {given} image\s+features"):
            model(ids, image_features=images)
        with pytest.raises(ValueError, match=rf"holds {tokens} image tokens.* {given} image\s+features"):
            model.generate(ids, image_features=images, **GREEDY)
    ids, mask = batch(ONE_IMAGE, NO_IMAGE, TWO_IMAGES)
    with pytest.raises(ValueError, match=r"holds 9 image tokens .*\[3, 0, 6\].* 6 image"):
        model(ids, attention_mask=mask, image_features=features(2))


@torch.no_grad()
def test_an_image_after_a_cached_beginning(model):
    ids = torch.tensor([[*ONE_IMAGE, *TWO_IMAGES]])
    images = features(3)
    whole = model(ids, image_features=images).logits
    begun = model(ids[:, :5], image_features=images[:1], use_cache=True)
    with pytest.raises(ValueError, match=r"holds 6 image tokens .* 3 image"):
        model(ids[:, 5:], image_features=images[1:2], past_key_values=begun.past_key_values)
    rest = model(ids[:, 5:], image_features=images[1:], past_key_values=begun.past_key_values)
    assert_close(rest.logits, whole[:, 5:], atol=1e-5, rtol=0)


def test_other_widths_and_embeddings_are_refused(model):
    ids = torch.tensor([ONE_IMAGE])
    with pytest.raises(ValueError, match=r"8 channels.*16"):
        model(ids, image_features=torch.zeros(1, 3, 8))
    with pytest.raises(ValueError, match="input_ids"):
        model(inputs_embeds=torch.zeros(1, 3, WIDTH), image_features=features(1))
    with pytest.raises(ValueError, match="input_ids"):
        model.generate(inputs_embeds=torch.zeros(1, 3, WIDTH), image_features=features(1), **GREEDY)


def test_gradient_reaches_the_features_and_not_the_frozen_embedding():
    model = tiny_model(MultimodalQWenLMHeadModel, vocab_size=151936).train().requires_grad_(False)
    ids, mask = batch(ONE_IMAGE, NO_IMAGE, TWO_IMAGES)
    images = features(3).requires_grad_()
    model(ids, attention_mask=mask, image_features=images, labels=ids.masked_fill(ids == IMG, -100)).loss.backward()
    assert (images.grad.abs().sum(-1) > 0).all(), "every feature has an influence on the loss"
    assert model.get_input_embeddings().weight.grad is None


SETTINGS = {
    "greedy": GREEDY,
    "sampling": {**GREEDY, "do_sample": True, "top_p": 0.8},
    "beams": {**GREEDY, "num_beams": 3},
    "several answers": {**GREEDY, "do_sample": True, "num_return_sequences": 2},
    "no cache": {**GREEDY, "use_cache": False},
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("form", ["tensor", "tuple by rows"])
def test_generate_equals_generate_from_embeddings(model, name, form):
    settings = SETTINGS[name]
    ids, mask = batch(ONE_IMAGE, NO_IMAGE, TWO_IMAGES)
    images = features(3)
    given = images if form == "tensor" else (images[0], images[0, :0], images[1:].flatten(0, 1))
    torch.manual_seed(1)
    got = model.generate(ids, attention_mask=mask, image_features=given, **settings)[:, ids.shape[1] :]
    torch.manual_seed(1)
    embeds = embeds_by_hand(model, ids, images)
    want = model.generate(inputs_embeds=embeds, attention_mask=mask, **{**settings, "use_cache": True})
    assert torch.equal(got, want)


def test_drawing_the_image_token_is_no_crash(model):
    """Nothing keeps a model from drawing `<|extra_0|>`; it is an ordinary id then."""

    def always_image(input_ids, scores):
        return torch.full_like(scores, -1e9).index_fill(1, torch.tensor([IMG]), 0.0)

    for prompt, images in ((ONE_IMAGE, features(1)), (NO_IMAGE, None), (NO_IMAGE[:1], None)):
        ids = torch.tensor([prompt])
        got = model.generate(ids, image_features=images, logits_processor=[always_image], **GREEDY)
        assert got[0, len(prompt) :].tolist() == [IMG] * 8
