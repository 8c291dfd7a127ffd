"""Runs with language models other than QWen, through train.py and test.py: everything works as it does with QWen."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny_families import FAMILIES, make_family
from tiny_run import MIXED_CAPTIONS, build_trainer, load_test_py, losses, make_pictures, trained_weights, write_data
from tiny_towers import make_clip_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
from dataset import load_image
from dataset.chat_template import ChatTokenizer
from dataset.prompt import encode_sample
from model import VisionLanguageModel
from model.asking.assistant import Assistant
from model.checkpoints.base_models import load_tokenizer
from qwen import IGNORE_INDEX
from qwen.prompt_cache import PromptCache

QUICK = [
    *("--lora_rank", "4", "--lora_alpha", "8", "--learning_rate", "1e-2", "--feature_proj_lr", "1e-2"),
    *("--use_cpu", "true", "--report_to", "none", "--disable_tqdm", "true", "--logging_steps", "1"),
    *("--num_train_epochs", "2", "--per_device_train_batch_size", "4", "--save_steps", "2"),
]
NO_DROPOUT = ["--lora_dropout", "0"]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("inputs")


@pytest.fixture(scope="module")
def pictures(folder):
    return make_pictures(folder / "pictures")


@pytest.fixture(scope="module")
def bases(folder, family) -> tuple[str, str]:
    return make_family(folder / family, family), make_clip_checkpoint(folder / "clip")


@pytest.fixture(scope="module")
def command(folder, bases, pictures) -> list[str]:
    flags = ["--base_language_model", bases[0], "--base_value_model", bases[1]]
    return [*flags, *write_data(folder / "data", MIXED_CAPTIONS, folder / "pictures"), *QUICK]


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    """A run of six steps, never stopped."""
    run = tmp_path_factory.mktemp("run")
    assert train.main([*command, "--output_dir", str(run)]) == 0
    return run


@pytest.fixture(scope="module")
def assistant(whole) -> Assistant:
    model = VisionLanguageModel.from_pretrained(model_weights=whole)
    model.merge_lora()
    tokenizer = load_tokenizer(model.base_language_model)
    return Assistant(model, tokenizer, None, {"max_new_tokens": 12, "do_sample": False})


# ---- Training


def plain_losses(trainer, language_name: str, steps: int) -> list[float]:
    """Train by a loop of our own: transformers' class, stock PEFT, features put in by hand, and all logits."""
    ours = trainer.model
    base = AutoModelForCausalLM.from_pretrained(language_name)
    lora = ours.language_model.peft_config["default"]
    settings = {"r": lora.r, "lora_alpha": lora.lora_alpha, "target_modules": list(lora.target_modules)}
    stock = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings))
    stock.load_state_dict(ours.language_model.state_dict())
    projector = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.GELU(), torch.nn.Linear(32, 32))
    projector.load_state_dict(ours.projector.state_dict())
    trained = [*(p for p in stock.parameters() if p.requires_grad), *projector.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    table, found = base.get_input_embeddings(), []
    for step, batch in zip(range(steps), trainer.get_train_dataloader(), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / 6)
        is_image = batch["input_ids"] == base.config.vocab_size
        embeds = table(batch["input_ids"].masked_fill(is_image, 0)).clone()
        if "pixel_values" in batch:
            features = projector(ours.vision_tower(batch["pixel_values"]))
            embeds[is_image] = features.flatten(0, 1)
        logits = stock(inputs_embeds=embeds, attention_mask=batch["attention_mask"]).logits
        loss = F.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORE_INDEX
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        found.append(loss.item())
    return found


def test_losses_are_those_of_a_plain_loop_with_stock_peft(command, bases, tmp_path):
    trainer = build_trainer([*command, *NO_DROPOUT, "--output_dir", str(tmp_path / "run")])
    expected = plain_losses(trainer, bases[0], steps=3)
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged[:3] == pytest.approx(expected, rel=1e-4)
    assert logged[-1] < logged[0]


def test_all_of_attention_and_mlp_get_lora(whole):
    config = json.loads((whole / "adapter_config.json").read_text())
    projections = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert sorted(config["target_modules"]) == projections
    assert all("lm_head" not in name for name in load_file(whole / "adapter_model.safetensors"))


def test_resumed_equals_never_stopped(command, whole, tmp_path):
    shutil.copytree(whole / "checkpoint-2", tmp_path / "checkpoint-2")
    assert train.main([*command, "--output_dir", str(tmp_path), "--resume_from_checkpoint", "auto"]) == 0
    assert losses(tmp_path / "checkpoint-6") == losses(whole / "checkpoint-6")
    for name, value in trained_weights(whole).items():
        assert torch.equal(trained_weights(tmp_path)[name], value), name


def test_feature_cache_changes_nothing(command, whole, tmp_path):
    cache = ["--feature_cache", str(tmp_path / "cache"), "--feature_cache_dtype", "float32"]
    assert train.main([*command, *cache, "--output_dir", str(tmp_path / "run")]) == 0
    assert losses(tmp_path / "run" / "checkpoint-6") == losses(whole / "checkpoint-6")


def test_grouped_by_length(command, tmp_path):
    grouped = ["--train_sampling_strategy", "group_by_length", "--max_steps", "2"]
    assert train.main([*command, *grouped, "--output_dir", str(tmp_path)]) == 0
    assert all(value < 20 for value in losses(tmp_path / "checkpoint-2"))


def test_another_base_of_the_same_sizes_is_refused(family, whole, tmp_path):
    other = make_family(tmp_path / "other", family, seed=1)
    with pytest.raises(ValueError, match="base_language_model differ"):
        VisionLanguageModel.from_pretrained(other, model_weights=whole)


def test_earlier_weights_may_be_trained_on(command, whole, tmp_path):
    more = ["--previous_lora_weights", str(whole), "--target_modules", "auto", "--max_steps", "1"]
    assert train.main([*command, *more, "--output_dir", str(tmp_path)]) == 0
    assert losses(tmp_path / "checkpoint-1")[0] < losses(whole / "checkpoint-6")[0]


# ---- The prompt


def test_answers_and_the_tokens_that_end_them_are_supervised(bases):
    tokenizer = load_tokenizer(bases[0])
    turns = [("A <|extra_0|> b?", "One."), ("And <|im_end|>?", "Two </s>.")]
    encoded = encode_sample(tokenizer, turns, 3, None)
    supervised = [label for label in encoded.labels if label != IGNORE_INDEX]
    end = AutoTokenizer.from_pretrained(bases[0]).eos_token_id
    answers = [[*tokenizer.encode_text(answer), end] for _, answer in turns]
    assert supervised == [*answers[0], *answers[1]]
    assert encoded.input_ids.count(tokenizer.image_token_id) == 3
    assert tokenizer.image_token_id == 320
    control = set(tokenizer.tokenizer.added_tokens_decoder)
    assert not control & set(tokenizer.encode_text("<|im_end|></s><|eot_id|>"))


# ---- Asking


def test_a_stream_ends_in_the_answer(assistant, pictures):
    features = assistant.features([load_image(pictures["red"])])
    *_, last = assistant.stream("<|extra_0|>What colour?", features)
    assert last == assistant.answer("<|extra_0|>What colour?", features)
    assert last


def test_a_batch_answers_as_one_by_one(assistant, pictures):
    features = [assistant.features([load_image(pictures[name])]) for name in ("red", "blue")]
    both = assistant.features([load_image(pictures[name]) for name in ("black", "white")])
    asked = [("<|extra_0|>What?", features[0]), ("Is this long question about <|extra_0|> one picture?", features[1])]
    asked += [("<|extra_0|> or <|extra_0|>?", both), ("你好", None)]
    ids = [assistant.prompt_ids(prompt) for prompt, _ in asked]
    rows = [None if row is None else row.flatten(0, 1) for _, row in asked]
    assert assistant.answer_rows(ids, rows, seed=0) == [assistant.answer(*pair) for pair in asked]


def test_a_chat_reads_only_what_is_new(assistant, pictures):
    features, cache = assistant.features([load_image(pictures["red"])]), PromptCache()
    history = [("<|extra_0|>What?", "Red.")]
    list(assistant.stream("<|extra_0|>What?", features, [], cache))
    *_, second = assistant.stream("And now?", features, history, cache)
    assert cache.num_reused > 4
    *_, alone = assistant.stream("And now?", features, history, PromptCache())
    assert second == alone


def test_a_system_prompt_is_used_or_refused(assistant, family):
    tokenizer = assistant.tokenizer
    assert isinstance(tokenizer, ChatTokenizer)
    asked = Assistant(assistant.model, tokenizer, "Answer in one word.", assistant.options)
    if family == "mistral":
        with pytest.raises(ValueError, match="system prompt can't be used"):
            asked.prompt_ids("What?")
    else:
        assert "Answer in one word." in tokenizer.decode(asked.prompt_ids("What?"))


def test_settings_that_look_at_the_prompt_do_not_meet_the_image_token(assistant, pictures):
    penalised = Assistant(assistant.model, assistant.tokenizer, None, {**assistant.options, "repetition_penalty": 1.5})
    features = penalised.features([load_image(pictures["red"])])
    assert penalised.answer("<|extra_0|>What colour?", features)


def test_the_command_line(whole, pictures, capsys):
    flags = ["--model_weights", str(whole), "--image_path", str(pictures["red"]), "--device", "cpu", "--greedy"]
    assert load_test_py().main([*flags, "--prompt", "What?", "--max_new_tokens", "5"]) == 0
    assert capsys.readouterr().out.strip()
