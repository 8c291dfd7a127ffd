"""Resuming, overwriting and sharing a run folder through the command line of train.py, with real kills and signals."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from stopped_runs import STATE, WEIGHTS, Killed, checkpoints
from tiny_run import (
    MIXED_CAPTIONS,
    ROOT,
    environment,
    free_port,
    losses,
    make_language_model,
    one_line_error,
    trained_weights,
    write_data,
)
from tiny_towers import make_clip_checkpoint
from transformers import TrainerCallback

import train
from dataprocess.file_lock import hold
from model.runs.resuming import newest_resumable

# 12 samples, some with alternative answers; 3 steps of 4 samples an epoch.
QUICK = [
    *("--lora_rank", "4", "--lora_alpha", "8", "--lora_dropout", "0.2", "--learning_rate", "1e-2"),
    *("--use_cpu", "true", "--report_to", "none", "--disable_tqdm", "true", "--logging_steps", "1"),
    *("--save_steps", "1", "--num_train_epochs", "3", "--per_device_train_batch_size", "2"),
    *("--gradient_accumulation_steps", "2"),
]
AUTO = ["--resume_from_checkpoint", "auto"]
OVERWRITE = ["--overwrite_output_dir", "true"]


@pytest.fixture(scope="module")
def photos(pictures) -> Path:
    return pictures["red"].parent


@pytest.fixture(scope="module")
def command(base_flags, mixed_data) -> list[str]:
    """All flags but the output folder."""
    return [*base_flags, *mixed_data, *QUICK]


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    """A run folder of the command, never stopped; not to be written to."""
    folder = tmp_path_factory.mktemp("whole")
    assert train.main([*command, "--output_dir", str(folder)]) == 0
    return folder


@pytest.fixture
def run(whole, tmp_path) -> Path:
    """A copy of it with two checkpoints, 2 and 4, and the final weights."""
    other = [f"checkpoint-{number}" for number in range(10) if number not in (2, 4)]
    return Path(shutil.copytree(whole, tmp_path / "run", ignore=lambda *_: other))


def assert_same_run(folder, whole) -> None:
    assert losses(folder / "checkpoint-9") == losses(whole / "checkpoint-9")
    assert len(losses(folder / "checkpoint-9")) == 9
    ours, theirs = trained_weights(folder), trained_weights(whole)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- Kills and signals


def stop_after(steps: int, kill, number: int, *argv: object) -> tuple[int, str]:
    """Run a program, signal it by `os.kill` or `os.killpg` after some logged steps, and return status and stderr."""
    process = subprocess.Popen(
        list(map(str, argv)),
        cwd=ROOT,
        env=environment(PYTHONUNBUFFERED="1", MASTER_PORT=str(free_port())),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        logged = (line for line in process.stdout if "'loss'" in line)
        for _ in range(steps):
            next(logged)
        kill(process.pid, number)
        _, err = process.communicate(timeout=300)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return process.returncode, err


@pytest.mark.slow
def test_sigkill_and_resume(command, tmp_path):
    flags = [*command, "--dataloader_num_workers", "2", "--save_total_limit", "2", "--num_train_epochs", "20"]
    assert train.main([*flags, "--output_dir", str(tmp_path / "whole")]) == 0
    run = tmp_path / "run"
    status, _ = stop_after(5, os.killpg, signal.SIGKILL, sys.executable, "train.py", *flags, "--output_dir", run)
    assert status == -signal.SIGKILL
    assert int(newest_resumable(run).name.split("-")[1]) < 60, "killed in the middle"
    assert train.main([*flags, "--output_dir", str(run), *AUTO]) == 0
    assert losses(run / "checkpoint-60") == losses(tmp_path / "whole/checkpoint-60")
    ours, theirs = trained_weights(run), trained_weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [[sys.executable, "train.py"], ["sh", "train.sh"]])
def test_sigterm_is_passed_on_and_leaves_a_checkpoint(command, tmp_path, launcher):
    """Sent to the process that was started alone, as `kill` does, in a run that would take long."""
    flags = [*command, "--output_dir", str(tmp_path), "--save_steps", "9999", "--num_train_epochs", "1000"]
    status, err = stop_after(4, os.kill, signal.SIGTERM, *launcher, *flags, "--dataloader_num_workers", "2")
    assert status == 128 + signal.SIGTERM or launcher[0] == "sh", err
    assert err.count("SIGTERM: finishing this step, then saving") == 1
    left = newest_resumable(tmp_path)
    step = int(left.name.split("-")[1])
    assert step >= 4
    assert len(losses(left)) == step
    assert f"stopped by SIGTERM after step {step}, which is saved" in err
    assert {path.name for path in left.iterdir()} >= WEIGHTS | STATE
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(("tmp-", ".lock"))]


# ---- Which checkpoint is meant


def test_auto_starts_where_there_is_no_checkpoint_at_all(command, whole, tmp_path):
    (tmp_path / "tmp-checkpoint-5").mkdir()
    assert train.main([*command, "--output_dir", str(tmp_path), *AUTO]) == 0
    assert_same_run(tmp_path, whole)
    assert not list(tmp_path.glob("tmp-*"))


def test_auto_stops_where_there_are_checkpoints_but_none_can_be_used(command, run, capsys):
    """A damaged one is no reason to start from scratch, which would delete it."""
    shutil.rmtree(run / "checkpoint-2")
    state = run / "checkpoint-4/run_state.json"
    state.write_bytes(state.read_bytes().replace(b"identity", b"identitz"))
    before = contents(run)
    assert train.main([*command, "--output_dir", str(run), *AUTO, "--save_total_limit", "1"]) == 2
    said = one_line_error(capsys.readouterr().err, "train.py")
    assert str(run) in said
    assert "run_state.json" in said
    assert "--previous_lora_weights" in said
    assert contents(run) == before


def test_a_checkpoint_or_a_run_folder_may_be_named(command, whole, run, tmp_path):
    for number, (named, first) in enumerate(((whole / "checkpoint-6", 7), (run, 5))):
        new = tmp_path / f"new {number}"
        assert train.main([*command, "--output_dir", str(new), "--resume_from_checkpoint", str(named)]) == 0
        assert_same_run(new, whole)
        assert checkpoints(new) == [f"checkpoint-{step}" for step in range(first, 10)]


def test_a_run_folder_is_the_same_by_whatever_name(command, whole, run, tmp_path, monkeypatch):
    """Relative, absolute, and through a link: the run is resumed and not in its own way."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(run)
    named = str(tmp_path / "link" / "checkpoint-4")
    assert train.main([*command, "--output_dir", "run", "--resume_from_checkpoint", named]) == 0
    assert_same_run(run, whole)


# ---- Resuming on something else, and with other flags


def test_resuming_on_something_else_is_refused(command, run, photos, qwen_tiktoken, tmp_path, capsys):
    other_data = write_data(tmp_path / "data", [*MIXED_CAPTIONS[:-1], (None, ("🙂", "🙁"))], photos)
    language = make_language_model(tmp_path / "qwen", qwen_tiktoken, seed=1)
    tower = ["--base_value_model", make_clip_checkpoint(tmp_path / "clip", seed=1)]
    cases = [
        (("training data",), other_data),
        (("seed was 42 and is now 7", "lora_rank was 4 and is now 8"), ["--seed", "7", "--lora_rank", "8"]),
        (
            ("language_model was ", "vision_tower was "),
            ["--base_language_model", language, *tower],
        ),
        (("4 samples", "--gradient_accumulation_steps 4"), ["--per_device_train_batch_size", "1"]),
    ]
    before = contents(run)
    for differences, flags in cases:
        assert train.main([*command, "--output_dir", str(run), *AUTO, *flags]) == 2, flags
        said = one_line_error(capsys.readouterr().err, "train.py")
        assert all(difference in said for difference in (*differences, str(run / "checkpoint-4"))), said
    assert contents(run) == before


def test_what_differs_from_the_runs_own_flags_takes_effect_and_is_said(command, run, capsys):
    flags = ["--output_dir", str(run), *AUTO, "--learning_rate", "1e-4", "--num_train_epochs", "2"]
    assert train.main([*command, *flags]) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "learning_rate" in line]
    assert "learning_rate was 0.01 and is now 0.0001" in line
    assert "num_train_epochs was 3.0 and is now 2.0" in line
    assert "feature_proj_lr" not in line
    assert "output_dir" not in line
    steps = json.loads((run / "checkpoint-6/trainer_state.json").read_text())["log_history"]
    rates = [entry["learning_rate"] for entry in steps if "loss" in entry]
    assert rates[4:] == pytest.approx([1e-4 * 2 / 6, 1e-4 * 1 / 6])
    assert json.loads((run / "train_config.json").read_text())["training"]["learning_rate"] == 1e-4
    assert train.main([*command, *flags]) == 0  # nothing has changed since
    assert "was 0.01" not in capsys.readouterr().err


# ---- Output folders that hold a run


class Event(TrainerCallback):
    """Does something at an event of the run that train.py is about to build."""

    def __init__(self, monkeypatch, event: str, action) -> None:
        setattr(self, event, lambda *args, **kwargs: action())
        build = train.build_trainer

        def build_with_event(*args):
            trainer = build(*args)
            trainer.add_callback(self)
            return trainer

        monkeypatch.setattr(train, "build_trainer", build_with_event)


def test_a_folder_that_holds_a_run_is_not_mixed_with_another(command, whole, run, capsys):
    for notes in ("checkpoint-notes", "tmp-mine", "notes"):
        (run / notes).mkdir()
    (run / "README.txt").write_text("mine")
    before = contents(run)
    elsewhere = ["--resume_from_checkpoint", str(whole / "checkpoint-3")]
    for flags in ([], elsewhere):
        assert train.main([*command, "--output_dir", str(run), *flags]) == 2
        said = one_line_error(capsys.readouterr().err, "train.py")
        assert str(run) in said
        assert "--overwrite_output_dir" in said
    assert train.main([*command, "--output_dir", str(run), *OVERWRITE, *AUTO]) == 2
    assert contents(run) == before


@pytest.mark.parametrize("mistake", ["flag", "tower", "optimizer", "first sample"])
def test_a_run_that_can_not_begin_takes_nothing_away(command, run, tmp_path, mistake):
    """Whether it shows at once or when the first sample is read."""
    absent = write_data(tmp_path / "absent", [("nowhere.png", ("<|extra_0|>", "a"))], tmp_path)
    (run / "runs").mkdir()
    (run / "runs/events").write_text("old")
    flags = {
        "flag": ["--lora_rnak", "4"],
        "tower": ["--base_value_model", "no/such/folder"],
        "optimizer": ["--optim", "schedule_free_adamw"],
        "first sample": [*absent, "--on_bad_sample", "error"],
    }
    before = contents(run)
    assert train.main([*command, "--output_dir", str(run), *OVERWRITE, *flags[mistake]]) == 2
    assert contents(run) == before


def test_nothing_of_an_overwritten_run_is_left(command, run, capsys):
    (run / "notes.txt").write_text("mine")
    (run / "MODEL_CARD.md").write_text("edited")
    (run / "loss.png").write_text("old")
    (run / "runs").mkdir()
    (run / "runs/events.out.tfevents.1").write_text("old")
    (run / "bad_samples.jsonl").write_text("old")
    flags = ["--num_train_epochs", "1", "--save_steps", "3", "--report_to", "tensorboard"]
    assert train.main([*command, "--output_dir", str(run), *OVERWRITE, *flags]) == 0
    assert checkpoints(run) == ["checkpoint-3"]
    assert (run / "notes.txt").read_text() == "mine"
    assert not (run / "bad_samples.jsonl").exists()
    assert "Step 3 of 3" in (run / "MODEL_CARD.md").read_text()
    (kept,) = run.glob("*-MODEL_CARD.md")  # somebody's work
    assert kept.read_text() == "edited"
    assert str(kept) in capsys.readouterr().err
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    (events,) = (run / "runs").rglob("events.out.tfevents.*")
    assert events.stat().st_size > 10
    assert json.loads((run / "train_config.json").read_text())["training"]["num_train_epochs"] == 1


def test_an_overwriting_run_that_was_killed_does_not_continue_the_old_one(command, run, monkeypatch, capsys):
    def kill():
        raise Killed

    flags = [*command, "--output_dir", str(run), "--seed", "7", "--num_train_epochs", "1"]
    with monkeypatch.context() as patched:
        Event(patched, "on_step_begin", kill)
        patched.setattr("model.runs.deleting.put_back", lambda _: None)  # a SIGKILL runs no `finally`
        with pytest.raises(Killed):
            train.main([*flags, *OVERWRITE])
    assert not (run / "checkpoint-2").is_dir()
    capsys.readouterr()
    assert train.main([*flags, *AUTO]) == 0
    assert "tmp-overwritten" in capsys.readouterr().err
    assert checkpoints(run) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert len(losses(run / "checkpoint-3")) == 3


def test_a_run_that_failed_before_its_first_step_is_in_nobodys_way(command, photos, tmp_path):
    bad = write_data(tmp_path / "bad", [("nowhere.png", ("<|extra_0|>", "a"))] * 4, photos)
    run = ["--output_dir", str(tmp_path / "run"), "--max_steps", "1"]
    assert train.main([*command, *bad, *run]) == 2
    assert train.main([*command, *run]) == 0


def test_flags_that_would_lose_the_place_are_refused(command, tmp_path, capsys):
    for flag in ("--dataloader_drop_last", "--ignore_data_skip", "--auto_find_batch_size"):
        assert train.main([*command, "--output_dir", str(tmp_path / "run"), flag, "true"]) == 2
        assert f"{flag} True" in one_line_error(capsys.readouterr().err, "train.py")
    assert not (tmp_path / "run").exists()


# ---- One run, one folder


def test_a_second_run_in_the_same_folder_is_refused(command, whole, run, capsys):
    (run / "tmp-checkpoint-5").mkdir()  # of the first run, which is writing it
    with hold(run):
        before = contents(run)
        for flags in ([], AUTO, OVERWRITE):
            assert train.main([*command, "--output_dir", str(run), *flags]) == 2
            said = one_line_error(capsys.readouterr().err, "train.py")
            assert f"--output_dir {run}" in said
            assert f"process {os.getpid()} " in said
        assert contents(run) == before
        assert (run / "tmp-checkpoint-5").is_dir()
    assert train.main([*command, "--output_dir", str(run), *AUTO]) == 0
    assert_same_run(run, whole)


def test_the_folder_is_held_from_the_first_step_to_the_last(command, tmp_path, monkeypatch):
    refused = []
    with monkeypatch.context() as patched:

        def start_another():
            with contextlib.suppress(ValueError), hold(tmp_path):
                refused.append(False)
            refused.append(True)

        Event(patched, "on_step_end", start_another)
        assert train.main([*command, "--output_dir", str(tmp_path), "--max_steps", "2"]) == 0
    assert refused == [True, True]
    with hold(tmp_path):
        pass


def test_links_in_a_run_folder_lead_nothing_out_of_it(command, run, tmp_path):
    """Staging folders, the configuration and the list of bad samples are never written through a link."""
    outside = tmp_path / "outside"
    outside.mkdir()
    victims = {name: outside / name for name in ("folder", "config", "list", "note", "weights")}
    for name in ("folder", "weights"):
        victims[name].mkdir()
        (victims[name] / "optimizer.pt").write_text("theirs")
    for name in ("config", "list", "note"):
        victims[name].write_text("theirs")
    (run / "tmp-checkpoint-6").symlink_to(victims["folder"])
    (run / "tmp-replaced-checkpoint-6").symlink_to(victims["folder"])
    (run / "tmp-overwritten").symlink_to(victims["folder"])
    (run / "tmp-train_config.json").symlink_to(victims["config"])
    (run / "train_config.json").unlink()
    (run / "train_config.json").symlink_to(victims["note"])
    (run / "bad_samples.jsonl").symlink_to(victims["list"])
    (run / "tmp-weights").symlink_to(victims["weights"])
    bad = write_data(tmp_path / "bad", [*MIXED_CAPTIONS[:-1], ("gone.png", ("<|extra_0|>", "a"))], tmp_path)
    flags = [*OVERWRITE, "--max_bad_fraction", "1", "--num_train_epochs", "1"]
    before = contents(outside)
    assert train.main([*command, *bad, "--output_dir", str(run), *flags]) == 0
    assert contents(outside) == before
    assert sorted(path.name for path in outside.iterdir()) == sorted(victims)
    assert not (run / "bad_samples.jsonl").is_symlink()
    assert not (run / "train_config.json").is_symlink()
