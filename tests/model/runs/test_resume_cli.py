"""Going on and starting anew through the command line of train.py, real kills and signals included."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from stopped_runs import STATE, WEIGHTS, checkpoints
from tiny_run import (
    MIXED_CAPTIONS,
    ROOT,
    environment,
    losses,
    make_bases,
    make_language_model,
    make_pictures,
    one_line_error,
    trained_weights,
    write_data,
)
from tiny_towers import make_clip_checkpoint

import train
from model.runs.run_folder import newest_resumable

# 12 samples, some with alternative answers; 3 steps of 4 samples an epoch.
QUICK = [
    *("--lora_rank", "4", "--lora_alpha", "8", "--lora_dropout", "0.2", "--learning_rate", "1e-2"),
    *("--use_cpu", "true", "--report_to", "none", "--disable_tqdm", "true", "--logging_steps", "1"),
    *("--save_steps", "1", "--num_train_epochs", "3", "--per_device_train_batch_size", "2"),
    *("--gradient_accumulation_steps", "2"),
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    make_pictures(folder / "pictures")
    return folder


@pytest.fixture(scope="module")
def command(inputs, qwen_tiktoken) -> list[str]:
    """All flags but the output folder."""
    data = write_data(inputs / "data", MIXED_CAPTIONS, inputs / "pictures")
    return [*make_bases(inputs, qwen_tiktoken), *data, *QUICK]


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    """A run folder of the command, never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    assert train.main([*command, "--output_dir", str(folder)]) == 0
    return folder


def assert_same_run(folder, whole) -> None:
    assert losses(folder / "checkpoint-9") == losses(whole / "checkpoint-9")
    assert len(losses(folder / "checkpoint-9")) == 9
    ours, theirs = trained_weights(folder), trained_weights(whole)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def stop_after(number: int, signals: list[int], *argv: object) -> subprocess.CompletedProcess[str]:
    """Run train.py and send signals to all of its process group, data workers too, after so many logged steps."""
    process = subprocess.Popen(
        [sys.executable, "train.py", *map(str, argv)],
        cwd=ROOT,
        env=environment(PYTHONUNBUFFERED="1"),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    for line in process.stdout:
        number -= "'loss'" in line
        if number == 0:
            for which in signals:
                os.killpg(process.pid, which)
            break
    out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def test_sigkill_and_go_on(command, whole, tmp_path):
    flags = [*command, "--output_dir", str(tmp_path), "--dataloader_num_workers", "2", "--save_total_limit", "2"]
    done = stop_after(5, [signal.SIGKILL], *flags)
    assert done.returncode == -signal.SIGKILL
    left = newest_resumable(tmp_path)
    assert left.name in ("checkpoint-4", "checkpoint-5", "checkpoint-6")
    assert train.main([*flags, "--resume_from_checkpoint", "auto"]) == 0
    assert_same_run(tmp_path, whole)


def test_sigterm_to_the_process_group_and_go_on(command, whole, tmp_path):
    """As torchrun, Slurm and terminals send signals: data workers get them too."""
    flags = [*command, "--output_dir", str(tmp_path), "--dataloader_num_workers", "2", "--save_steps", "100"]
    done = stop_after(4, [signal.SIGTERM], *flags)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("SIGTERM: finishing this step, then saving; a second signal quits at once") == 1
    left = newest_resumable(tmp_path)
    step = int(left.name.split("-")[1])
    assert 4 <= step < 9
    told = f"stopped by SIGTERM after step {step}, which is saved; resume with the same command and"
    assert f"{told} --resume_from_checkpoint auto" in done.stderr
    assert train.main([*flags, "--resume_from_checkpoint", "auto"]) == 0
    assert_same_run(tmp_path, whole)


def test_train_sh_passes_sigterm_on_and_leaves_a_checkpoint(command, tmp_path):
    """Sent to the shell's own process alone, as `kill` does, in a run that would take long."""
    flags = [*command, "--output_dir", str(tmp_path), "--save_steps", "9999", "--num_train_epochs", "1000"]
    process = subprocess.Popen(
        ["sh", str(ROOT / "train.sh"), *flags],
        env=environment(PYTHONUNBUFFERED="1", MASTER_PORT="25753"),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        steps = (line for line in process.stdout if "'loss'" in line)
        for _ in range(4):
            next(steps)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=300)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert process.returncode != 0
    assert err.count("SIGTERM: finishing this step, then saving") == 1
    left = newest_resumable(tmp_path)
    step = int(left.name.split("-")[1])
    assert step >= 4
    assert len(losses(left)) == step
    assert f"stopped by SIGTERM after step {step}, which is saved" in err
    assert {path.name for path in left.iterdir()} >= WEIGHTS | STATE
    assert not list(tmp_path.glob("tmp-*"))


def test_auto_starts_where_nothing_is_there(command, whole, tmp_path, capsys):
    """Nor where there is only part of a checkpoint, which is said."""
    broken = tmp_path / "checkpoint-4"
    shutil.copytree(whole / "checkpoint-4", broken)
    (broken / "trainer_state.json").unlink()
    (tmp_path / "tmp-checkpoint-5").mkdir()
    assert train.main([*command, "--output_dir", str(tmp_path), "--resume_from_checkpoint", "auto"]) == 0
    assert "checkpoint-4 is passed over: trainer_state.json missing or damaged" in capsys.readouterr().err
    assert_same_run(tmp_path, whole)
    assert not list(tmp_path.glob("tmp-*"))


def test_a_checkpoint_or_a_run_folder_may_be_named(command, whole, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(whole, other)
    for name in ("checkpoint-8", "checkpoint-9"):
        (other / name / "optimizer.pt").unlink()
    for number, named in enumerate((whole / "checkpoint-6", other)):
        run = tmp_path / f"run {number}"
        assert train.main([*command, "--output_dir", str(run), "--resume_from_checkpoint", str(named)]) == 0
        assert_same_run(run, whole)
        assert len(checkpoints(run)) == (3, 2)[number]


def test_going_on_with_something_else_is_refused(command, whole, inputs, qwen_tiktoken, tmp_path, capsys):
    other_data = write_data(tmp_path / "data", [*MIXED_CAPTIONS[:-1], (None, ("🙂", "🙁"))], inputs / "pictures")
    fewer = write_data(tmp_path / "fewer", MIXED_CAPTIONS[:-1], inputs / "pictures")
    language = make_language_model(tmp_path / "qwen", qwen_tiktoken, seed=1)
    cases = {
        "training data": other_data,
        "number of samples was 12 and is now 11": fewer,
        "seed was 42 and is now 7": ["--seed", "7"],
        "data_seed was None and is now 7": ["--data_seed", "7"],
        "lora_rank was 4 and is now 8": ["--lora_rank", "8"],
        "lora_alpha was 8 and is now 16": ["--lora_alpha", "16"],
        "target_modules was 'c_attn|w1|w2' and is now 'c_attn|w1'": ["--target_modules", "c_attn|w1"],
        "projector_layers was 2 and is now 1": ["--projector_layers", "1"],
        "max_length was 2048 and is now 1024": ["--max_length", "1024"],
        "language_model was ": ["--base_language_model", language],
        "vision_tower was ": ["--base_value_model", make_clip_checkpoint(tmp_path / "clip", seed=1)],
    }
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    for difference, flags in cases.items():
        capsys.readouterr()
        asked = [*command, "--output_dir", str(run), "--resume_from_checkpoint", "auto", *flags]
        assert train.main(asked) == 2, difference
        said = one_line_error(capsys.readouterr().err, "train.py")
        assert difference in said
        assert str(run / "checkpoint-9") in said
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


# ---- Output folders that hold a run


def test_a_folder_that_holds_a_run_is_not_mixed_with_another(command, whole, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    for notes in ("checkpoint-notes", "tmp-mine", "runs"):
        (run / notes).mkdir()
    (run / "README.txt").write_text("mine")
    elsewhere = ["--resume_from_checkpoint", str(whole / "checkpoint-3")]
    for flags in ([], elsewhere):
        capsys.readouterr()
        assert train.main([*command, "--output_dir", str(run), *flags]) == 2
        said = one_line_error(capsys.readouterr().err, "train.py")
        assert "holds a run" in said
        assert "--overwrite_output_dir" in said
    both = ["--overwrite_output_dir", "true", "--resume_from_checkpoint", "auto"]
    assert train.main([*command, "--output_dir", str(run), *both]) == 2
    assert len(checkpoints(run)) == 9 + 2

    # What can't begin takes nothing away, whether it shows at once or when the first sample is read.
    absent = write_data(tmp_path / "absent", [("nowhere.png", ("<|extra_0|>", "a"))], tmp_path)
    mistakes = [
        ["--lora_rnak", "4"],
        ["--base_value_model", "no/such/folder"],
        ["--target_modules", "q_proj"],
        ["--eval_strategy", "steps"],
        ["--optim", "adamw_bnb_8bit"],
        [*absent, "--on_bad_sample", "error"],
    ]
    for flags in mistakes:
        asked = [*command, "--output_dir", str(run), "--overwrite_output_dir", "true", *flags]
        assert train.main(asked) == 2, flags
        assert len(checkpoints(run)) == 9 + 2, flags
        assert trained_weights(run).keys()

    over = [*command, "--output_dir", str(run), "--overwrite_output_dir", "true", "--num_train_epochs", "1"]
    assert train.main(over) == 0
    assert [n for n in checkpoints(run) if n[-1].isdigit()] == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert {"checkpoint-notes", "tmp-mine", "runs", "README.txt"} <= {path.name for path in run.iterdir()}


def test_a_run_that_failed_before_its_first_step_is_in_nobodys_way(command, inputs, tmp_path, capsys):
    bad = write_data(tmp_path / "bad", [("nowhere.png", ("<|extra_0|>", "a"))] * 4, inputs / "pictures")
    run = ["--output_dir", str(tmp_path / "run"), "--max_steps", "1"]
    assert train.main([*command, *bad, *run]) == 2
    assert train.main([*command, *run]) == 0


def test_flags_that_would_lose_the_place_are_refused(command, tmp_path, capsys):
    for flag in ("--dataloader_drop_last", "--ignore_data_skip", "--auto_find_batch_size"):
        capsys.readouterr()
        assert train.main([*command, "--output_dir", str(tmp_path / "run"), flag, "true"]) == 2
        assert f"{flag} True is not supported: " in one_line_error(capsys.readouterr().err, "train.py")
    assert not (tmp_path / "run").exists()


def test_a_disk_with_no_room_for_the_copy_is_one_line(command, whole, tmp_path, capsys, monkeypatch):
    """With other batches, a run goes on from a copy of the checkpoint."""

    def copytree(*args, **kwargs):
        raise OSError(28, "No space left on device")

    run = tmp_path / "run"
    shutil.copytree(whole, run, ignore=lambda _, names: ["checkpoint-9"])
    monkeypatch.setattr(shutil, "copytree", copytree)
    smaller = ["--gradient_accumulation_steps", "1", "--resume_from_checkpoint", "auto"]
    assert train.main([*command, "--output_dir", str(run), *smaller]) == 2
    assert "No space left on device" in one_line_error(capsys.readouterr().err, "train.py")
    assert newest_resumable(run).name == "checkpoint-8"


def test_a_checkpoint_without_its_state_names_what_is_missing(command, whole, tmp_path, capsys):
    folder = tmp_path / "checkpoint-4"
    shutil.copytree(whole / "checkpoint-4", folder)
    for name in ("optimizer.pt", "run_state.json"):
        (folder / name).unlink()
        assert train.main([*command, "--output_dir", str(tmp_path), "--resume_from_checkpoint", str(folder)]) == 2
        assert name in one_line_error(capsys.readouterr().err, "train.py")
    assert STATE - {path.name for path in folder.iterdir()} == {"optimizer.pt", "run_state.json"}
    assert {path.name for path in folder.iterdir()} >= WEIGHTS
