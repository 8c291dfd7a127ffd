"""Runs with language models other than QWen, through train.py and test.py: everything works as it does with QWen."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from plain_training import plain_losses
from safetensors.torch import load_file
from tiny_families import FAMILIES, make_family
from tiny_run import (
    MIXED_CAPTIONS,
    build_trainer,
    load_test_py,
    losses,
    make_pictures,
    start,
    trained_weights,
    write_data,
)
from tiny_towers import make_clip_checkpoint
from transformers import AutoTokenizer

import train
from dataset import ImageCaptionDataset, VLMCollator, load_image
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


def families(*quick: str) -> list:
    """Return all families; those that are not quick are of the slow tier."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]


@pytest.fixture(scope="module", params=families("qwen3", "llama"))
def family(request) -> str:
    return request.param


one_family = pytest.mark.parametrize("family", families("qwen3"), indirect=True, scope="module")
"""Of tests of which one family tells nearly as much as all."""


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


@one_family
def test_resumed_equals_never_stopped(command, whole, tmp_path):
    shutil.copytree(whole / "checkpoint-2", tmp_path / "checkpoint-2")
    assert train.main([*command, "--output_dir", str(tmp_path), "--resume_from_checkpoint", "auto"]) == 0
    assert losses(tmp_path / "checkpoint-6") == losses(whole / "checkpoint-6")
    for name, value in trained_weights(whole).items():
        assert torch.equal(trained_weights(tmp_path)[name], value), name


@one_family
def test_feature_cache_changes_nothing(command, whole, tmp_path):
    cache = ["--feature_cache", str(tmp_path / "cache"), "--feature_cache_dtype", "float32"]
    assert train.main([*command, *cache, "--output_dir", str(tmp_path / "run")]) == 0
    assert losses(tmp_path / "run" / "checkpoint-6") == losses(whole / "checkpoint-6")


@one_family
def test_grouped_by_length(command, tmp_path):
    grouped = ["--train_sampling_strategy", "group_by_length", "--max_steps", "2"]
    assert train.main([*command, *grouped, "--output_dir", str(tmp_path)]) == 0
    assert all(value < 20 for value in losses(tmp_path / "checkpoint-2"))


@one_family
def test_another_base_of_the_same_sizes_is_refused(family, whole, tmp_path):
    other = make_family(tmp_path / "other", family, seed=1)
    with pytest.raises(ValueError, match="base_language_model differ"):
        VisionLanguageModel.from_pretrained(other, model_weights=whole)


llama_first = pytest.mark.parametrize("family", families("llama"), indirect=True, scope="module")


@pytest.mark.slow
@llama_first
def test_two_processes_train_as_one(command, tmp_path):
    """The same samples a step, of which half go to each; in some steps one process sees no image."""
    assert train.main([*command, *NO_DROPOUT, "--output_dir", str(tmp_path / "one")]) == 0
    half = [*command, *NO_DROPOUT, "--per_device_train_batch_size", "2", "--output_dir", tmp_path / "two"]
    done = start("torchrun", "--standalone", "--nproc_per_node=2", "train.py", *half)
    assert done.returncode == 0, done.stderr
    one, two = (losses(tmp_path / name / "checkpoint-6") for name in ("one", "two"))
    assert two == pytest.approx(one, abs=1e-5)
    for name, value in trained_weights(tmp_path / "one").items():
        torch.testing.assert_close(trained_weights(tmp_path / "two")[name], value, rtol=0, atol=1e-4)


@llama_first
def test_gradient_checkpointing_and_evaluation(command, whole, tmp_path):
    """Dropout is drawn again as it was; the evaluation takes the first answer of each sample."""
    evaluate = ["--eval_image_map", command[5], "--eval_captions_file", command[7], "--eval_steps", "3"]
    flags = ["--gradient_checkpointing", "true", "--eval_strategy", "steps", *evaluate]
    assert train.main([*command, *flags, "--output_dir", str(tmp_path)]) == 0
    assert losses(tmp_path / "checkpoint-6") == pytest.approx(losses(whole / "checkpoint-6"), abs=1e-5)
    history = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
    found = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    model = VisionLanguageModel.from_pretrained(model_weights=tmp_path)
    tokenizer, see = load_tokenizer(model.base_language_model), model.vision_tower.image_transform
    samples = ImageCaptionDataset(
        *(command[5], command[7], tokenizer, see, model.num_image_tokens), system=None, training=False
    )
    total = count = 0
    for sample in samples:
        batch = VLMCollator(tokenizer.pad_token_id)([sample])
        number = int((batch["labels"] != IGNORE_INDEX).sum())
        with torch.no_grad():
            total += number * model(**batch).loss.item()
        count += number
    assert len(found) == 2
    assert found[-1] == pytest.approx(total / count, rel=1e-4)


@llama_first
def test_earlier_weights_may_be_trained_on(command, whole, tmp_path):
    rates = ["--learning_rate", "1e-9", "--feature_proj_lr", "1e-9", "--max_steps", "1"]
    earlier = ["--previous_lora_weights", str(whole), "--target_modules", "auto", "--output_dir", str(tmp_path)]
    assert train.main([*command, *rates, *earlier]) == 0
    assert losses(tmp_path / "checkpoint-1")[0] < losses(whole / "checkpoint-6")[0]
    for name, value in trained_weights(whole).items():
        torch.testing.assert_close(trained_weights(tmp_path)[name], value, rtol=0, atol=1e-6)


@llama_first
def test_a_dry_run_tells_the_parameters_of_the_run(command, whole, tmp_path, capsys):
    assert train.main([*command, "--output_dir", str(tmp_path / "run"), "--dry_run"]) == 0
    said = capsys.readouterr().out
    trained = sum(value.numel() for value in trained_weights(whole).values())
    assert re.search(rf"all +[\d,]+ +{trained:,} ", said)
    assert "6 in all" in said
    assert "most at one moment" in said


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


@one_family
def test_settings_that_look_at_the_prompt_do_not_meet_the_image_token(assistant, pictures):
    penalised = Assistant(assistant.model, assistant.tokenizer, None, {**assistant.options, "repetition_penalty": 1.5})
    features = penalised.features([load_image(pictures["red"])])
    assert penalised.answer("<|extra_0|>What colour?", features)


@one_family
def test_the_command_line(whole, pictures, capsys):
    flags = ["--model_weights", str(whole), "--image_path", str(pictures["red"]), "--device", "cpu", "--greedy"]
    assert load_test_py().main([*flags, "--prompt", "What?", "--max_new_tokens", "5"]) == 0
    assert capsys.readouterr().out.strip()
