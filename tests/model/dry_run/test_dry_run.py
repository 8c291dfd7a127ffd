"""What `--dry_run` says is what the run with the same flags then does, and no weights are needed to say it."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from tiny_run import (
    MIXED_CAPTIONS,
    build_trainer,
    make_bases,
    make_pictures,
    one_line_error,
    write_as_the_original,
    write_data,
)

import train
from model.dry_run.data_sizes import data_sizes

QUICK = [
    *("--lora_rank", "4", "--lora_dropout", "0", "--use_cpu", "true", "--report_to", "none", "--disable_tqdm", "true"),
    *("--per_device_train_batch_size", "4", "--save_strategy", "no", "--num_train_epochs", "1"),
]
EVALUATE = ("--eval_image_map", "EVAL/image_map.json", "--eval_captions_file", "EVAL/captions.json")
LENGTHS = (3, 40, 5, 31, 8, 24, 60, 2, 17, 90, 50, 12, 70)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, qwen_tiktoken) -> Path:
    """A folder with base models, those without their weights, two data sets, and pictures."""
    folder = tmp_path_factory.mktemp("inputs")
    make_bases(folder, qwen_tiktoken)
    for name in ("qwen", "clip"):
        shutil.copytree(folder / name, folder / "bare" / name, ignore=shutil.ignore_patterns("*.safetensors"))
    make_pictures(folder / "pictures")
    names = [path.name for path in sorted((folder / "pictures").iterdir())]
    samples = [(names[i % 3], ("<|extra_0|>What?", "word " * length)) for i, length in enumerate(LENGTHS)]
    write_data(folder / "data", samples, folder / "pictures")
    write_data(folder / "eval", MIXED_CAPTIONS[:5], folder / "pictures")
    return folder


def command(inputs: Path, *flags: object, bare: bool = False) -> list[str]:
    bases = inputs / "bare" if bare else inputs
    data = ["--image_map", inputs / "data/image_map.json", "--captions_file", inputs / "data/captions.json"]
    named = ["--base_language_model", bases / "qwen", "--base_value_model", bases / "clip", *data]
    return [str(word).replace("EVAL", str(inputs / "eval")) for word in (*named, *QUICK, *flags)]


@pytest.fixture
def planned(inputs, tmp_path, capsys):
    """Ask for a plan without weights; gives what is printed."""

    def plan(*flags: object, bare: bool = True) -> str:
        capsys.readouterr()
        words = command(inputs, *flags, "--output_dir", tmp_path / "planned", "--dry_run", bare=bare)
        assert train.main(words) == 0
        assert not (tmp_path / "planned").exists()
        return capsys.readouterr().out

    return plan


def number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found, text
    return int(found[1].replace(",", ""))


@pytest.mark.parametrize(
    "flags",
    [
        ["--num_train_epochs", 2.5, "--gradient_accumulation_steps", 3],
        ["--max_train_samples", 9, "--max_steps", 7],
        [*EVALUATE, "--eval_strategy", "steps", "--eval_steps", 3, "--num_train_epochs", 2, "--eval_on_start", "true"],
        [*EVALUATE, "--num_train_epochs", 3, "--eval_delay", 2, "--max_steps", 9, "--per_device_eval_batch_size", 2],
    ],
)
def test_steps_and_evaluations_are_those_of_the_run(inputs, tmp_path, planned, flags):
    said = planned(*flags)
    trainer = build_trainer(command(inputs, *flags, "--output_dir", tmp_path / "run"))
    batches = []
    step = trainer.prediction_step
    trainer.prediction_step = lambda *args, **kwargs: batches.append(1) or step(*args, **kwargs)
    trainer.train()
    state = trainer.state
    assert number(r"([\d,]+) in all;", said) == state.global_step
    assert number(r"([\d,]+) steps? per epoch", said) == round(state.global_step / state.epoch)
    times = sum("eval_loss" in entry for entry in state.log_history)
    if EVALUATE[0] in flags:
        assert number(r"an evaluation, ([\d,]+) time", said) == times > 0
        assert number(r"([\d,]+) steps? in an evaluation", said) == len(batches) / times
    else:
        assert "evaluation" not in said


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_lengths_and_padding_are_those_of_the_run(inputs, tmp_path, planned, strategy, capsys):
    """The estimate is for the longest batch that really comes."""
    flags = ("--train_sampling_strategy", strategy, "--per_device_train_batch_size", 3)
    said = planned(*flags)
    trainer = build_trainer(command(inputs, *flags, "--output_dir", tmp_path / "run"))
    logged = capsys.readouterr().err
    batches = list(trainer.get_train_dataloader())
    supervised = {batch["input_ids"].shape[1]: int((batch["labels"] != -100).sum()) for batch in batches}
    longest = max(supervised)
    found = data_sizes(trainer.train_dataset.dataset, rows=3, strategy=strategy, order_seed=42)
    assert max(batch.tokens for batch in found.batches) == longest
    assert next(batch.supervised for batch in found.batches if batch.tokens == longest) == supervised[longest]
    there = re.search(r"padding, about: ([\d.]+%) of a batch's tokens; ([\d.]+%) with samples grouped", said)
    if strategy == "group_by_length":
        assert set(there.groups()) <= set(re.findall(r"[\d.]+%", logged))
    padded, real = (sum(f(batch["attention_mask"]) for batch in batches) for f in (torch.numel, torch.sum))
    assert there[2 if strategy == "group_by_length" else 1] == f"{1 - int(real) / padded:.1%}"
    tokens = [len(trainer.train_dataset.dataset[index]["input_ids"]) for index in range(len(LENGTHS))]
    row = rf"all +{min(tokens)} +{sum(tokens) / len(tokens):.1f} +{max(tokens)}\n"
    assert re.search(row, said), said


def test_every_alternative_answer_counts(inputs, tmp_path, planned):
    """Training draws one of them in each epoch; the first one alone told 29 tokens where most had 300."""
    answers = [["A dog."], ["A dog.", *["word " * 100] * 4], ["a", "word " * 30]]
    data = write_data(tmp_path / "data", [("red.png", ("<|extra_0|>?", a)) for a in answers], inputs / "pictures")
    said = planned(*data, "--per_device_train_batch_size", 2)
    flags = (*data, "--per_device_train_batch_size", 2)
    trainer = build_trainer(command(inputs, *flags, "--output_dir", tmp_path / "run"))
    samples = trainer.train_dataset.dataset
    supervised = [{} for _ in answers]
    for epoch in range(30):
        samples.set_epoch(epoch)
        for index, by_text in enumerate(supervised):
            by_text[str(samples[index]["labels"])] = int((samples[index]["labels"] != -100).sum())
    dog, (few, many) = supervised[0].popitem()[1], sorted(supervised[2].values())
    long = max(supervised[1].values())
    expected = (dog + (dog + 4 * long) / 5 + (few + many) / 2) / 3
    assert re.search(rf"supervised +{few} +{expected:.1f} +{long}\n", said), said
    padding = re.search(r"padding, about: ([\d.]+%)", said)[1]
    samples.set_epoch(0)
    batches = list(trainer.get_train_dataloader())
    padded, real = (sum(f(batch["attention_mask"]) for batch in batches) for f in (torch.numel, torch.sum))
    assert padding == f"{1 - int(real) / padded:.1%}"


def test_what_a_feature_cache_takes_and_what_is_stored(inputs, tmp_path, planned):
    cache = tmp_path / "cache"
    flags = ("--feature_cache", cache, "--feature_cache_dtype", "float32", *EVALUATE)
    block = os.statvfs(tmp_path).f_frsize
    said = planned(*flags, bare=False)
    # 3 pictures of the training set and 4 of the evaluation set, of which some are the same.
    images = number(r"feature cache: (\d+) distinct images, 4 × 32 float32 each", said)
    assert 4 <= images <= 6
    assert f"at most {images * block:,} bytes on the disk" in said
    assert "stored already" not in said
    assert not cache.exists()
    assert train.main(command(inputs, *flags, "--output_dir", tmp_path / "run")) == 0
    stored = list(cache.glob("*/??/*.safetensors"))
    assert len(stored) == images
    assert sum(path.stat().st_blocks * 512 for path in stored) == images * block
    (folder,) = cache.iterdir()
    assert re.search(rf"stored already, .*{inputs / 'clip'}: {images} in {folder.name}\n", planned(*flags, bare=False))


# ---- What the run would refuse


@pytest.fixture
def refused(inputs, tmp_path, capsys):
    """Begin a run and ask for its plan; gives the line that each ends with."""

    def refuse(*flags: object) -> list[str]:
        said = []
        for more in ([], ["--dry_run"]):
            words = command(inputs, "--output_dir", tmp_path / "refused", *flags, *more, bare=bool(more))
            capsys.readouterr()
            assert train.main(words) == 2
            said.append(one_line_error(capsys.readouterr().err, "train.py"))
        return said

    return refuse


@pytest.mark.parametrize("names", [("image_map", "captions_file"), ("eval_image_map", "eval_captions_file")])
def test_too_many_bad_samples_are_refused_as_by_the_run(inputs, tmp_path, refused, names):
    samples = [("red.png", ("no placeholder", "a")), *[(None, ("q", "a"))] * 3]
    data = write_data(tmp_path / "data", samples, inputs / "pictures")
    run, plan = refused(f"--{names[0]}", data[1], f"--{names[1]}", data[3])
    for line in (run, plan):
        assert line.startswith("train.py: 1 of 4 samples is bad, more than --max_bad_fraction 0.01 allows; ")
    assert "sample 0" in plan
    strict = refused(f"--{names[0]}", data[1], f"--{names[1]}", data[3], "--on_bad_sample", "error")
    assert all("1 bad sample in" in line for line in strict)


def test_flags_against_earlier_weights_are_refused_as_by_the_run(inputs, tmp_path, refused):
    """The original project's too; a flag that says what the checkpoint has is none."""
    ours = tmp_path / "ours"
    assert train.main(command(inputs, "--output_dir", ours, "--max_steps", 1, "--lora_alpha", 8)) == 0
    same = ["--lora_alpha", 8, "--projector_layers", 2, "--target_modules", "w2|c_attn|w1"]
    for previous in (ours, write_as_the_original(ours, tmp_path / "original")):
        on = ["--previous_lora_weights", previous]
        assert train.main(command(inputs, *on, *same, "--dry_run", bare=True)) == 0
        for flag, value, there in (
            ("--lora_rank", 8, 4),
            ("--lora_alpha", 16, 8),
            ("--target_modules", "w1|w2", "c_attn|w1|w2"),
            ("--projector_layers", 1, 2),
        ):
            run, plan = refused(*on, flag, value)
            assert run == plan
            assert f"{flag} {value}" in plan
            assert str(there) in plan


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--base_language_model", "EMPTY"), "config.json"),
        (("--base_language_model", "BROKEN"), "must be even"),
        (("--base_value_model", "UNKNOWN"), "'llama'"),
        (("--target_modules", "nothing"), "nothing"),
        (("--max_length", "3"), "--max_length 3"),
    ],
)
def test_mistakes_are_one_line(inputs, tmp_path, capsys, flags, said):
    contents = {"EMPTY": None, "UNKNOWN": "llama", "BROKEN": "qwen"}
    for name, model_type in contents.items():
        (tmp_path / name).mkdir()
        if model_type is not None:
            config = {"model_type": model_type, "intermediate_size": 7}
            (tmp_path / name / "config.json").write_text(json.dumps(config))
    words = [str(tmp_path / word) if word in contents else word for word in flags]
    assert train.main(command(inputs, *words, "--dry_run", bare=True)) == 2
    assert said in one_line_error(capsys.readouterr().err, "train.py")


def test_neither_weights_nor_images_are_needed_and_nothing_is_written(tmp_path, planned):
    data = write_data(tmp_path / "data", MIXED_CAPTIONS, tmp_path / "no_pictures")
    before = sorted(tmp_path.rglob("*"))
    said = planned(*data)
    assert said.startswith("parameters ")
    assert "looked at: 12 of 12 samples" in said
    assert "3 steps per epoch, 3 in all; 4 samples × 1 batch × 1 process a step" in said
    assert sorted(tmp_path.rglob("*")) == before
