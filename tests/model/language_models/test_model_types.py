"""Many kinds of decoders, tiny and random: each computes what transformers and PEFT compute, or is refused at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from tiny_families import make_tokenizer
from tiny_qwen import enliven
from tiny_towers import make_clip_checkpoint, pixels
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from dataset import VLMCollator
from dataset.prompt import encode_sample
from model import LoraSettings, VisionLanguageModel
from model.asking.assistant import Assistant
from model.checkpoints.base_models import load_tokenizer
from model.language_models.causal_lm import UnsuitableModelError, load_causal_lm, multimodal_class
from qwen import IGNORE_INDEX

SIZES = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
MIXED_WINDOWS = {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]}
WORK: dict[str, tuple[str, dict[str, Any]]] = {
    # Quick: without positions in some layers, scaled embeddings, and a name that transformers changed.
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0]}),
    "gemma3": ("gemma3_text", MIXED_WINDOWS),
    "gpt_neox": ("gpt_neox", {}),
    # Slow.
    "gemma": ("gemma", {}),
    "phi3": ("phi3", {}),
    "olmo2": ("olmo2", {}),
    "glm4": ("glm4", {}),
    "starcoder2": ("starcoder2", {}),
    "stablelm": ("stablelm", {}),
    "ernie4_5": ("ernie4_5", {}),
    "qwen3_moe": ("qwen3_moe", EXPERTS),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "yarn": ("llama", {"rope_parameters": YARN}),
    "llama3": ("llama", {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 32}}),
    "window": ("mistral", {"sliding_window": 24}),
    "some windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}),
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "granite": ({"logits_scaling": 8.0}, "logits differ"),
    "cohere": ({"logit_scale": 0.0625}, "logits differ"),
    "gemma2": ({}, "softcapping"),
    "mamba": ({"state_size": 8}, "more than keys and values"),
    "lfm2": ({"layer_types": ["conv", "full_attention"]}, "can't be run on .* a growing cache"),
    "llama4_text": ({"num_local_experts": 2, "intermediate_size_mlp": 48}, "can't be run on image features"),
}


def make_base(folder, model_type: str, **changes: Any) -> str:
    tokenizer = make_tokenizer("qwen2")
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](**{**SIZES, **ids, **changes})
    enliven(AutoModelForCausalLM.from_config(config), 0).save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return str(folder)


def embedded(stock, ids, features) -> torch.Tensor:
    """Embeddings (B, T, D) with features (N, P, D) put in by hand."""
    is_image = ids == stock.config.vocab_size
    embeds = stock.get_input_embeddings()(ids.masked_fill(is_image, 0)).clone()
    if features is not None:
        embeds[is_image] = features.detach().flatten(0, 1)
    return embeds


def a_batch(tokenizer, num_image_tokens: int) -> dict[str, torch.Tensor]:
    """A short sample and a long one of two turns, each with an image."""
    turns = [[("A <|extra_0|> b?", "One two.")]]
    turns += [[("And <|extra_0|>, what is it, please?", "It is red, I think."), ("Why?", "Because.")]]
    samples = []
    for number, one in enumerate(turns):
        encoded = encode_sample(tokenizer, one, num_image_tokens, None)
        ids, labels = torch.tensor(encoded.input_ids), torch.tensor(encoded.labels)
        samples.append({"input_ids": ids, "labels": labels, "pixel_values": pixels(1, seed=number), "ids": number})
    batch = VLMCollator(tokenizer.pad_token_id)(samples)
    batch.pop("ids", None)
    return batch


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("smollm3", "gemma3", "gpt_neox") else pytest.param(name, marks=pytest.mark.slow)
        for name in WORK
    ],
)
def test_losses_gradients_and_answers_are_those_of_transformers_and_peft(name, tmp_path):
    model_type, changes = WORK[name]
    base, clip = make_base(tmp_path / "base", model_type, **changes), make_clip_checkpoint(tmp_path / "clip")
    model = VisionLanguageModel.from_pretrained(base, clip, device="cpu", trainable=True)
    model.add_lora(LoraSettings(rank=4, alpha=8, dropout=0.0, target_modules=None))
    targets = sorted(model.language_model.peft_config["default"].target_modules)
    with torch.no_grad():
        for parameter_name, parameter in model.language_model.named_parameters():
            if "lora_B" in parameter_name:
                parameter.normal_(std=0.1)
    stock = AutoModelForCausalLM.from_pretrained(base)
    peft = get_peft_model(stock, LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=targets)).train()
    peft.load_state_dict(model.language_model.state_dict())

    tokenizer = load_tokenizer(base)
    batch = a_batch(tokenizer, model.num_image_tokens)
    loss = model(**batch, return_logits=False).loss
    loss.backward()
    embeds = embedded(stock, batch["input_ids"], model.encode_images(batch["pixel_values"]))
    logits = peft(inputs_embeds=embeds, attention_mask=batch["attention_mask"]).logits
    targets_ = batch["labels"][:, 1:].flatten()
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets_, ignore_index=IGNORE_INDEX)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    found = dict(model.language_model.named_parameters())
    compared = [(found[name].grad, p.grad) for name, p in peft.named_parameters() if p.grad is not None]
    assert len(compared) >= 4
    for ours, theirs in compared:
        assert (ours - theirs).norm() <= 1e-2 * theirs.norm() + 1e-6

    model.eval().merge_lora()
    merged = peft.eval().merge_and_unload()
    assistant = Assistant(model, tokenizer, None, {"max_new_tokens": 10, "do_sample": False})
    prompts = ["<|extra_0|>What colour is it?", "Is this a long question about <|extra_0|> one picture?", "Hello"]
    features = [model.encode_images(pixels(1, seed=5)), model.encode_images(pixels(1, seed=6)), None]
    answers = [assistant.answer(prompt, row) for prompt, row in zip(prompts, features, strict=True)]
    for prompt, row, answer in zip(prompts, features, answers, strict=True):
        ids = torch.tensor([assistant.prompt_ids(prompt)])
        settings = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": list(tokenizer.stop_ids)}
        new = merged.generate(
            inputs_embeds=embedded(merged, ids, row), attention_mask=torch.ones_like(ids), pad_token_id=0, **settings
        )
        assert answer == tokenizer.decode([index for index in new[0].tolist() if index not in tokenizer.stop_ids])
    rows = [None if row is None else row.flatten(0, 1) for row in features]
    assert assistant.answer_rows([assistant.prompt_ids(prompt) for prompt in prompts], rows, seed=0) == answers
    *_, last = assistant.stream(prompts[0], features[0])
    assert last == answers[0]


@pytest.mark.parametrize("model_type", REFUSED)
def test_what_computes_otherwise_is_refused_when_it_is_loaded(model_type, tmp_path):
    changes, reason = REFUSED[model_type]
    base = make_base(tmp_path, model_type, **changes)
    with pytest.raises(UnsuitableModelError, match=reason) as error:
        load_causal_lm(base, torch.float32)
    assert "\n" not in str(error.value)


def test_a_saved_copy_names_the_class_of_transformers(tmp_path):
    """So that other programs load it."""
    config = CONFIG_MAPPING["llama"](**SIZES)
    multimodal_class(config)(config).save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.architectures == ["LlamaForCausalLM"]


ROPES = [None, YARN, {**YARN, "factor": 2.0}, {**LLAMA3, "original_max_position_embeddings": 32}]


def test_how_positions_are_scaled_is_in_the_fingerprint(tmp_path):
    clip = make_clip_checkpoint(tmp_path / "clip")
    found = set()
    for number, rope in enumerate(ROPES):
        base = make_base(tmp_path / str(number), "llama", **({} if rope is None else {"rope_parameters": rope}))
        fingerprints = VisionLanguageModel.from_pretrained(base, clip, device="cpu").fingerprints
        found.add(fingerprints["language_model_fingerprint"])
    assert len(found) == len(ROPES)
