"""Prompts of exports with language models other than QWen, and their image token."""

from __future__ import annotations

import inspect
import json

import pytest
import torch
from PIL import Image
from tiny_families import FAMILIES, make_family
from tiny_towers import make_clip_checkpoint
from tiny_vlm import enliven_trained
from tokenizers import processors
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from dataset.prompt import encode_prompt
from model import LoraSettings, VisionLanguageModel
from model.checkpoints.base_models import load_tokenizer
from model.export.family_text import with_mean_rows


@pytest.fixture
def export(run_export):
    return run_export


def train_on(language, folder):
    """Write a checkpoint over a language model, with a tower next to it; return its folder."""
    model = VisionLanguageModel.from_pretrained(str(language), make_clip_checkpoint(folder / "clip"), device="cpu")
    model.add_lora(LoraSettings(rank=4, alpha=8, dropout=0.0, target_modules=("q_proj", "down_proj")))
    enliven_trained(model, seed=3, std=0.4).save_checkpoint(folder / "trained")
    return folder / "trained"


def conversation(turns: list[str], system: str | None, image: Image.Image) -> list[dict]:
    """Messages whose contents are parts, with a picture for every placeholder."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    for number, text in enumerate(turns):
        first, *pieces = text.split("<|extra_0|>")
        content = [{"type": "text", "text": first}]
        for piece in pieces:
            content += [{"type": "image", "image": image}, {"type": "text", "text": piece}]
        messages.append({"role": ("user", "assistant")[number % 2], "content": content})
    return messages


# ---- The image token


def test_no_hidden_state_gives_the_new_row_the_largest_logit():
    W = torch.randn(300, 32) - 3  # many logits are below zero
    grown = with_mean_rows(W, 302)
    assert torch.equal(grown[:300], W)
    logits = torch.randn(2000, 32) @ grown.T
    assert (logits.argmax(-1) < 300).all()
    assert with_mean_rows(W, 300) is W


def test_a_tokenizer_that_has_the_image_token_keeps_it(export, make_family_checkpoint, tmp_path):
    language = tmp_path / "language"
    make_family(language, "llama")
    tokenizer = AutoTokenizer.from_pretrained(language)
    tokenizer.add_tokens(["<|extra_0|>", "<more>"])
    tokenizer.save_pretrained(language)
    folder = export(train_on(language, tmp_path), verify=True)
    config = json.loads((folder / "config.json").read_text())
    assert (config["image_token_index"], config["text_config"]["vocab_size"]) == (300, 320)


# ---- Prompts

CONVERSATIONS = [
    (["<|extra_0|>这幅图像描述了什么？"], None),
    (["What is in <|extra_0|> and <|extra_0|>?"], "Be brief."),
    (["你好"], ""),
    (["<|extra_0|>"], "你是一位助手。"),
    (["<|extra_0|>Colour?", "It is red.", "And now? 🙂", "绿色。\n\n第二行", "Why?"], None),
    (["First<|extra_0|>", "A.", "second <|extra_0|> then<|extra_0|>", "B."] * 2 + ["Which is larger?"], "Short."),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_have_the_ids_of_training(export, make_family_checkpoint, family):
    checkpoint = make_family_checkpoint(family)
    folder = export(checkpoint)
    ours = load_tokenizer(str(checkpoint.parent / "language"))
    processor, image = AutoProcessor.from_pretrained(folder, backend="pil"), Image.new("RGB", (28, 28))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # Mistral's template takes no system prompt.
    conversations = [pair for pair in CONVERSATIONS if family != "mistral" or pair[1] is None]
    for turns, system in conversations:
        history = list(zip(turns[:-1:2], turns[1::2], strict=True))

        def expected(num_image_tokens, turns=turns, system=system, history=history):
            ids = encode_prompt(ours, turns[-1], num_image_tokens, history, system)[0]
            return [300 if index == ours.image_token_id else index for index in ids]

        messages = conversation(turns, system, image)
        found = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
        assert found["input_ids"][0] == expected(4)
        # Pictures written into texts, and the tokenizer alone, which leaves each of them one token.
        texts = turns if system is None else [system, *turns]
        flat = [{**message, "content": text} for message, text in zip(messages, texts, strict=True)]
        assert tokenizer.apply_chat_template(flat, add_generation_prompt=True)["input_ids"] == expected(1)


def test_dates_and_thinking_are_those_of_training(export, make_family_checkpoint):
    llama, qwen3 = (
        AutoTokenizer.from_pretrained(export(make_family_checkpoint(family), name=family))
        for family in ("llama", "qwen3")
    )
    messages = [{"role": "user", "content": "Hi"}]
    assert "26 Jul 2024" in llama.apply_chat_template(messages, tokenize=False)
    asked = qwen3.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert asked.endswith("<think>\n\n</think>\n\n")
    thinks = qwen3.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=True)
    assert not thinks.endswith("<think>\n\n</think>\n\n")


def test_typed_control_tokens_are_text_where_transformers_is_told_so(export, make_family_checkpoint):
    checkpoint = make_family_checkpoint("qwen2")
    processor = AutoProcessor.from_pretrained(export(checkpoint), backend="pil")
    if "sanitize_control_tokens" not in inspect.signature(processor.apply_chat_template).parameters:
        pytest.skip("this transformers can't be told")
    ours, typed = load_tokenizer(str(checkpoint.parent / "language")), "<|extra_0|>a<|im_end|>b"
    messages = conversation([typed], None, Image.new("RGB", (28, 28)))
    how = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    parsed, text = (
        processor.apply_chat_template(messages, sanitize_control_tokens=told, **how)["input_ids"][0]
        for told in (False, True)
    )
    ids = encode_prompt(ours, typed, 4, system=None)[0]
    assert text == [300 if index == ours.image_token_id else index for index in ids]
    assert parsed != text


def test_no_token_is_put_before_a_prompt_that_the_template_does_not_write(export, make_family_checkpoint, tmp_path):
    """A tokenizer that adds its first token by itself, and a template without it (as Zephyr's)."""
    template = (
        "{% for m in messages %}{{ '<|header|>' + m['role'] + '\n' + m['content'] + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|header|>assistant\n' }}{% endif %}"
    )
    language = tmp_path / "language"
    make_family(language, "llama")
    tokenizer = AutoTokenizer.from_pretrained(language)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", 0)]
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(language)
    config = json.loads((language / "tokenizer_config.json").read_text())
    config["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]  # older files have this
    (language / "tokenizer_config.json").write_text(json.dumps(config))
    read = AutoTokenizer.from_pretrained(language)("a")
    assert read["input_ids"][0] == 0
    assert "token_type_ids" in read
    export(train_on(language, tmp_path), verify=True)  # compares the ids


def test_a_batch_of_rows_with_and_without_pictures(export, make_family_checkpoint):
    """Llama's tokenizer has no padding token of its own; the export's has."""
    checkpoint = make_family_checkpoint("llama", vocab_size=300)
    folder = export(checkpoint)
    model, processor = (
        AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval(),
        AutoProcessor.from_pretrained(folder, backend="pil"),
    )
    processor.tokenizer.padding_side = "left"
    image = Image.linear_gradient("L").convert("RGB").resize((50, 40))
    texts = ["<|extra_0|>什么颜色？", "hi", "<|extra_0|> and <|extra_0|>: which is darker, and why?"]
    images = [[image], [], [image, image]]
    together = processor(text=texts, images=[image] * 3, padding=True, return_tensors="pt")
    answers = model.generate(**together, do_sample=False, max_new_tokens=6)[:, together["input_ids"].shape[1] :]
    for row, text, own in zip(answers.tolist(), texts, images, strict=True):
        alone = processor(text=[text], images=own or None, return_tensors="pt")
        expected = model.generate(**alone, do_sample=False, max_new_tokens=6)[0, alone["input_ids"].shape[1] :].tolist()
        assert row[: len(expected)] == expected
