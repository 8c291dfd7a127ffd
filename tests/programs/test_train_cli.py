"""train.py and train.sh as people call them: what is printed, written, and said where something is wrong."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_run import (
    MIXED_CAPTIONS,
    ROOT,
    build_trainer,
    free_port,
    losses,
    one_line_error,
    printed_steps,
    start,
    too_much_memory,
    trained_weights,
    weights_differ,
    write_as_the_original,
    write_data,
)
from transformers import TrainingArguments

import train
from dataset import ImageCaptionDataset, VLMCollator
from model import VisionLanguageModel, arguments
from model.arguments import parse_arguments
from qwen import MultimodalQWenLMHeadModel, QWenTokenizer

PUBLISHED = shlex.split(
    "--nproc_per_node=1 --master_port=25642 train.py --lora_rank 128 --lora_dropout 0.10 "
    "--per_device_train_batch_size 4 --gradient_accumulation_steps 1 --num_train_epochs 2 --save_steps 1000 "
    "--save_total_limit 5 --learning_rate 3e-5 --seed 42 --ddp_find_unused_parameters False --feature_proj_lr 1e-4 "
    "--remove_unused_columns false --logging_steps 100 --output_dir ./weights/train_V1_5 "
    "--target_modules 'c_attn|w1|w2' --image_map data/image_map_b.json --captions_file data/captions_b.json"
)
QUICK = shlex.split(
    "--lora_rank 4 --lora_alpha 8 --lora_dropout 0 --learning_rate 1e-2 --feature_proj_lr 3e-2 --logging_steps 1 "
    "--save_steps 2 --num_train_epochs 2 --use_cpu true"
)
EXTRA = ["--num_train_epochs", "1", "--run_name", "two words"]


@pytest.fixture(scope="module")
def bases(base_flags) -> list[str]:
    return base_flags


@pytest.fixture(scope="module")
def photos(pictures) -> Path:
    return pictures["red"].parent


@pytest.fixture(scope="module")
def data(mixed_data) -> list[str]:
    return mixed_data


@pytest.fixture(scope="module")
def run(tmp_path_factory, bases, data) -> tuple[Path, str, str]:
    """Six steps of four samples under plain python, evaluated: (run folder, stdout, stderr)."""
    folder = tmp_path_factory.mktemp("run")
    evaluation = ["--eval_image_map", data[1], "--eval_captions_file", data[3], "--per_device_eval_batch_size", "12"]
    flags = [*QUICK, "--per_device_train_batch_size", "4", "--save_total_limit", "2", "--output_dir", folder]
    done = start(sys.executable, "train.py", *bases, *data, *evaluation, *flags)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout, done.stderr


def quick_run(*flags: object) -> int:
    """Train in this process; under a second where a new one takes ten."""
    return train.main([*QUICK, "--report_to", "none", "--disable_tqdm", "true", *(str(flag) for flag in flags)])


# ---- What a run prints and writes


def test_each_step_shows_loss_both_learning_rates_and_speed(run):
    _, stdout, stderr = run
    steps = printed_steps(stdout)
    assert len(steps) == 6
    for number, step in enumerate(steps):
        assert step["learning_rate"] == pytest.approx(1e-2 * (6 - number) / 6, rel=1e-3)
        assert step["feature_proj_lr"] == pytest.approx(3e-2 * (6 - number) / 6, rel=1e-3)
        assert step["samples_per_second"] > 0
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.5
    assert "6/6" in stderr  # the progress bar
    assert "there is already one" not in stderr  # Trainer's word on two callbacks of one class
    for part in ("vision_tower", "projector", "language_model", "lora"):
        assert stderr.count(f"\n{part} ") == 1, "parameters of each part, once"


def test_the_run_folder_holds_checkpoints_a_last_save_and_the_settings(run, bases, data):
    folder = run[0]
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    assert weights_differ(folder, folder / "checkpoint-6") == 0
    note = json.loads((folder / "multimodal_config.json").read_text())
    assert [note["base_language_model"], note["base_value_model"]] == [bases[1], bases[3]]
    assert (note["vision_tower"], note["num_image_tokens"], note["dtype"]) == ("clip", 4, "float32")
    settings = json.loads((folder / "train_config.json").read_text())
    assert settings["model"]["lora_rank"] == 4
    assert settings["data"]["captions_file"] == data[3]
    assert settings["training"]["feature_proj_lr"] == 3e-2
    assert settings["training"]["train_sampling_strategy"] == "random"
    assert {"torch", "transformers", "peft"} <= settings["package_versions"].keys()


def test_evaluation_gives_the_loss_of_the_first_alternatives(run, bases, data):
    model = VisionLanguageModel.from_pretrained(model_weights=run[0], device="cpu")
    tokenizer = QWenTokenizer.from_pretrained(bases[1])
    samples = ImageCaptionDataset(
        data[1], data[3], tokenizer, model.vision_tower.image_transform, model.num_image_tokens, training=False
    )
    with torch.no_grad():
        loss = model(**VLMCollator(tokenizer.pad_token_id)([samples[i] for i in range(12)])).loss
    printed = [float(value) for value in re.findall(r"'eval_loss': '([\d.]+)'", run[1])]
    assert len(printed) == 2
    assert printed[1] == pytest.approx(loss.item(), rel=5e-4)  # it is printed with four digits
    assert printed[1] < printed[0]


def shown_help(capsys, flag: str) -> str:
    with pytest.raises(SystemExit) as stop:
        train.main([flag])
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_help_is_short_and_help_all_is_not(capsys):
    short, everything = shown_help(capsys, "--help"), shown_help(capsys, "--help_all")
    published = [word for word in PUBLISHED[3:] if word.startswith("--")]
    for name in (*published, "--previous_lora_weights", "--global_batch_size", "--optim", "--help_all"):
        assert f"\n  {name}" in short
        assert f"\n  {name}" in everything
    assert len(short.splitlines()) < 200 < len(everything.splitlines())
    assert "\n  --adam_beta1" in everything
    assert "--adam_beta1" not in short
    assert short.index("--image_map") < short.index("--lora_rank") < short.index("--learning_rate")


def test_the_language_model_is_built_once(bases, data, tmp_path, monkeypatch):
    built = []
    init = MultimodalQWenLMHeadModel.__init__
    monkeypatch.setattr(
        MultimodalQWenLMHeadModel, "__init__", lambda self, *a, **k: (built.append(1), init(self, *a, **k))[1]
    )
    build_trainer([*bases, *data, *QUICK, "--output_dir", str(tmp_path / "run")])
    assert len(built) == 1


# ---- train.sh


@pytest.mark.parametrize(
    ("env", "extra", "words"),
    [
        ({}, [], ["0", *PUBLISHED]),
        (
            {"CUDA_VISIBLE_DEVICES": "2,3", "NPROC_PER_NODE": "2", "MASTER_PORT": "1234"},
            EXTRA,
            ["2,3", "--nproc_per_node=2", "--master_port=1234", *PUBLISHED[2:], *EXTRA],
        ),
        ({"CUDA_VISIBLE_DEVICES": ""}, [], ["", *PUBLISHED]),
    ],
)
def test_train_sh_runs_the_published_command(tmp_path, env, extra, words):
    """From any folder."""
    fake = tmp_path / "torchrun"
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$CUDA_VISIBLE_DEVICES" "$@"\n')
    fake.chmod(0o755)
    own = {name: value for name, value in os.environ.items() if name not in ("CUDA_VISIBLE_DEVICES", "MASTER_PORT")}
    own["PATH"] = f"{tmp_path}:{own['PATH']}"
    command = ["sh", str(ROOT / "train.sh"), *extra]
    done = subprocess.run(command, cwd=tmp_path, env={**own, **env}, text=True, capture_output=True)
    got = done.stdout.removesuffix("\n").split("\n")
    assert Path(got[3]).resolve() == ROOT / "train.py"
    assert [*got[:3], "train.py", *got[4:]] == words


@pytest.mark.slow
def test_train_sh_trains_with_its_own_values(bases, photos, tmp_path):
    """Rank 128, dropout 0.10 and all else that is published; only base models and the CPU are named."""
    data = write_data(tmp_path / "data", MIXED_CAPTIONS, photos)
    Path(data[1]).rename(tmp_path / "data/image_map_b.json")
    Path(data[3]).rename(tmp_path / "data/captions_b.json")
    done = start("sh", ROOT / "train.sh", *bases, "--use_cpu", "true", cwd=tmp_path, MASTER_PORT=str(free_port()))
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "weights/train_V1_5"
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["lora_dropout"]) == (128, 32, 0.1)
    assert sorted(settings["target_modules"]) == ["c_attn", "w1", "w2"]
    state = json.loads((folder / "checkpoint-6/trainer_state.json").read_text())  # 12 samples by 4, twice
    assert state["global_step"] == state["max_steps"] == 6
    assert trained_weights(folder)["0.weight"].abs().sum() > 0


@pytest.mark.slow
def test_two_processes_train_as_one_and_write_once(run, bases, data, tmp_path):
    """Two processes with a quarter of the batch each: the same losses, the same weights, from another folder."""
    flags = [*QUICK, "--per_device_train_batch_size", "1", "--global_batch_size", "4", "--output_dir", "weights"]
    ports = {"NPROC_PER_NODE": "2", "MASTER_PORT": str(free_port())}
    done = start("sh", ROOT / "train.sh", *bases, *data, *flags, cwd=tmp_path, **ports)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "weights"
    assert losses(folder / "checkpoint-6") == pytest.approx(losses(run[0] / "checkpoint-6"), rel=1e-5)
    assert weights_differ(folder, run[0]) <= 1e-5
    assert len(printed_steps(done.stdout)) == 6, "only the first process speaks"
    assert done.stderr.count("done; ask the model") == 1
    assert "[1]" not in done.stderr
    assert len(list(folder.rglob("events.out.tfevents.*"))) == 1
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


@pytest.mark.slow
def test_what_is_wrong_is_the_last_line_under_torchrun(tmp_path):
    """After torchrun's own report, which names it too; once, though both processes fail."""
    ports = {"NPROC_PER_NODE": "2", "MASTER_PORT": str(free_port())}
    done = start("sh", ROOT / "train.sh", "--use_cpu", "true", cwd=tmp_path, **ports)
    assert done.returncode == 1
    report, last = done.stderr[done.stderr.index("ChildFailedError") :].rstrip().rsplit("\n", 1)
    for text in (report, last):
        assert text.count("train.py: --image_map data/image_map_b.json: there is no such file") == 1 + (text is report)
        assert "dataprocess/process_image.py" in text


# ---- Starting from earlier weights, towers, projectors, numbers of samples


STILL = ["--learning_rate", "0", "--feature_proj_lr", "0", "--max_steps", "1"]
"""What is saved is what was loaded."""


@pytest.mark.parametrize("kind", ["run folder", "checkpoint", "original"])
def test_previous_weights_are_where_training_starts(run, bases, data, tmp_path, kind):
    previous = run[0] / "checkpoint-6" if kind == "checkpoint" else run[0]
    if kind == "original":
        previous = write_as_the_original(run[0], tmp_path / "original")
    flags = [*bases, *data, *STILL, "--previous_lora_weights", previous, "--output_dir", tmp_path / "out"]
    assert quick_run(*flags) == 0
    assert weights_differ(tmp_path / "out", run[0]) == 0
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["r"] == 4


def test_another_tower_and_a_single_layer(bases, tiny_siglip, data, tmp_path):
    flags = [*bases[:2], "--base_value_model", tiny_siglip, *data, "--projector_layers", "1", "--max_steps", "2"]
    assert quick_run(*flags, "--output_dir", tmp_path / "run") == 0
    assert sorted(trained_weights(tmp_path / "run"))[:2] == ["0.bias", "0.weight"]
    assert "2.weight" not in trained_weights(tmp_path / "run")
    note = json.loads((tmp_path / "run/multimodal_config.json").read_text())
    assert (note["vision_tower"], note["projector_layers"], note["drop_first_patch"]) == ("siglip", 1, False)
    assert len(VisionLanguageModel.from_pretrained(model_weights=tmp_path / "run", device="cpu").projector) == 1


def test_the_order_has_a_seed_of_its_own(bases, data, tmp_path):
    def order(*flags: str) -> list[int]:
        argv = [*bases, *data, *QUICK, "--report_to", "none", "--output_dir", str(tmp_path), *flags]
        train_set = build_trainer(argv).train_dataset
        return [train_set[i]["id"] for i in range(len(train_set))]

    assert order("--seed", "1") == order("--seed", "2", "--data_seed", "1") != order("--seed", "1", "--data_seed", "2")


@pytest.mark.parametrize("strategy", ["random", "sequential", "group_by_length"])
def test_the_order_is_the_strategys_and_the_flag_stays(bases, data, tmp_path, strategy):
    argv = [*bases, *data, *QUICK, "--report_to", "none", "--output_dir", str(tmp_path)]
    trainer = build_trainer([*argv, "--train_sampling_strategy", strategy, "--per_device_train_batch_size", "1"])
    assert trainer.args.train_sampling_strategy == strategy
    assert trainer.identity["order"] == strategy
    own = [trainer.train_dataset[i]["id"] for i in range(12)]
    assert (own == list(range(12))) == (strategy == "sequential")
    assert [batch["ids"] for batch in trainer.get_train_dataloader()] == [[number] for number in own]


# ---- --global_batch_size


@pytest.mark.parametrize(
    ("flags", "processes", "accumulation"),
    [
        (["--global_batch_size", "8"], 1, 2),
        (["--global_batch_size", "24"], 2, 3),
        (["--global_batch_size", "24", "--gradient_accumulation_steps", "3"], 2, 3),
        (["--global_batch_size", "24", "--gradient_accumulation_steps", "1"], 2, 3),  # as train.sh gives it
        (["--gradient_accumulation_steps", "5"], 2, 5),
    ],
)
def test_the_accumulation_follows_from_the_global_batch(data, monkeypatch, flags, processes, accumulation):
    monkeypatch.setattr(TrainingArguments, "world_size", processes)
    args = parse_arguments([*data, "--per_device_train_batch_size", "4", *flags])[2]
    assert args.gradient_accumulation_steps == accumulation


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--global_batch_size", "12"], ["12", "4 rows", "2 processes", "8"]),
        (["--global_batch_size", "4"], ["4 rows", "2 processes", "8"]),
        (
            ["--global_batch_size", "16", "--gradient_accumulation_steps", "3"],
            ["--global_batch_size 16", "--gradient_accumulation_steps 2", "got 3"],
        ),
    ],
)
def test_a_global_batch_that_can_not_be_is_refused(data, monkeypatch, flags, named):
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    with pytest.raises(ValueError, match="--global_batch_size") as refused:
        parse_arguments([*data, "--per_device_train_batch_size", "4", *flags])
    assert all(text in str(refused.value) for text in named)


@pytest.mark.parametrize(
    ("flags", "fp16"), [([], True), (["--fp16-full-eval", "true"], True), (["--fp16=false"], False)]
)
def test_half_precision_is_the_default_on_a_gpu_unless_it_is_chosen(data, monkeypatch, flags, fp16):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(arguments, "pick_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(arguments, "pick_dtype", lambda device: torch.float16)
    assert parse_arguments([*data, *flags])[2].fp16 is fp16


# ---- What users get wrong


@pytest.fixture(scope="module")
def wrong(tmp_path_factory, bases) -> Path:
    """A folder with what the mistakes below name."""
    folder = tmp_path_factory.mktemp("wrong")
    shutil.copytree(bases[1], folder / "no_vocabulary", ignore=lambda *_: ["qwen.tiktoken"])
    (folder / "a_file").touch()
    return folder


MISTAKES = {
    "image map": ("--image_map nowhere.json", "nowhere.json"),
    "language model": ("--base_language_model no/such/folder", "no/such/folder"),
    "bases swapped": ("--base_language_model {tower}", "model_type 'clip'"),
    "no tower": ("--base_value_model {language}", "model_type 'qwen'"),
    "no vocabulary": ("--base_language_model {wrong}/no_vocabulary", "qwen.tiktoken"),
    "targets": ("--target_modules c_attn|q_proj", "is called q_proj; the language model has c_attn"),
    "misspelt": ("--lora_rnak 4", "--lora_rnak"),
    "ranges": ("--lora_rank 0 --lora_dropout 1 --feature_proj_lr -1", "--lora_dropout 1.0: must be"),
    "epochs": ("--num_train_epochs 0", "--num_train_epochs 0.0"),
    "no evaluation set": ("--eval_strategy steps", "--eval_strategy steps needs --eval_image_map"),
    "steps": ("--max_steps 0", "--max_steps 0"),
    "sharding": ("--fsdp full_shard", "--fsdp"),
    "hub upload": ("--push_to_hub true", "--push_to_hub True is not supported"),
    "dispatching": ('--accelerator_config {{"dispatch_batches":true}}', "--accelerator_config"),
    "order": ("--train_sampling_strategy batch_rebalance", "--train_sampling_strategy"),
    "GaLore": ("--optim galore_adamw --optim_target_modules c_attn", "--optim galore_adamw is not supported"),
    "optimizer that is not installed": ("--optim schedule_free_adamw", "schedulefree"),
    "smoothing": ("--label_smoothing_factor 0.1", "--label_smoothing_factor 0.1 is not supported"),
    "output": ("--output_dir {wrong}/a_file", "a_file is a file"),
    "no checkpoint": ("--resume_from_checkpoint nowhere", "nowhere"),
}


@pytest.mark.parametrize(("flags", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_one_line(bases, data, wrong, tmp_path, capsys, flags, message):
    flags = flags.format(wrong=wrong, language=bases[1], tower=bases[3])
    right = ["--output_dir", tmp_path / "out", "--max_steps", "1", "--save_strategy", "no"]
    assert quick_run(*bases, *data, *right, *flags.split(" ")) == 2
    said = one_line_error(capsys.readouterr().err, "train.py")
    assert message in said
    assert len(said) < 700


@pytest.mark.parametrize("flag", ["--dry_run", "--use-cpu"])
def test_a_word_that_is_neither_yes_nor_no_is_one_line(bases, data, tmp_path, capsys, flag):
    """Also of the flags that are read before the others."""
    assert quick_run(*bases, *data, "--output_dir", tmp_path / "out", flag, "maybe") == 2
    err = capsys.readouterr().err
    said = one_line_error(err, "train.py")
    assert flag in said
    assert "maybe" in said
    assert "usage:" not in err


def test_a_mistake_ends_plain_python_with_2(data, tmp_path):
    done = start(sys.executable, ROOT / "train.py", *data, "--base_language_model", "Qwen/Qwen-7B-Chat", cwd=tmp_path)
    assert done.returncode == 2
    assert "Qwen/Qwen-7B-Chat" in one_line_error(done.stderr, "train.py")
    assert "bitsandbytes" not in done.stderr, done.stderr
    assert "gemm_4bit" not in done.stderr, "no other package says anything while it is imported"
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["forward", "from_pretrained"])
def test_out_of_memory_gives_advice(bases, data, tmp_path, monkeypatch, capsys, where):
    def fail(*args, **kwargs):
        raise too_much_memory()

    monkeypatch.setattr(VisionLanguageModel, where, fail)
    assert quick_run(*bases, *data, "--output_dir", tmp_path / "run", "--disable_tqdm", "true") == 1
    said = one_line_error(capsys.readouterr().err, "train.py")
    for advice in ("out of memory (", "--per_device_train_batch_size", "--gradient_accumulation_steps"):
        assert advice in said
