"""A checkpoint appears whole or not at all, whatever happens while it is written."""

from __future__ import annotations

import errno
import logging
import os
import re
import resource
import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers
from stopped_runs import (
    STATE,
    WEIGHTS,
    KillAt,
    Killed,
    checkpoints,
    is_resumable,
    new_trainer,
)
from tiny_run import (
    one_line_error,
    trained_weights,
)
from tiny_vlm import new_model

import model.checkpoints.saving
import model.runs.run_state
import model.trainer
import train
from model import CheckpointError, VisionLanguageModel, read_checkpoint
from model.checkpoints.readers import read_tensors
from model.runs.deleting import clear_leftovers, delete_old_checkpoints
from model.runs.resuming import check_resumable, newest_resumable
from model.runs.run_folder import put_in_place


class Faults:
    """Lets the n-th step of writing fail, of those that touch the disk; `after` it was done, or in place of it.

    A RuntimeError is PyTorch's, for a file that it could not write.
    """

    WRITERS = (
        (model.checkpoints.saving, "save_file"),
        (peft.LoraConfig, "save_pretrained"),
        (torch, "save"),
        (transformers.TrainerState, "save_to_json"),
        (os, "fsync"),
        (Path, "write_text"),
        (Path, "mkdir"),
        (Path, "rename"),
        (Path, "replace"),
        (Path, "unlink"),
        (shutil, "rmtree"),
        (shutil, "copyfile"),
        (transformers.PreTrainedModel, "save_pretrained"),
    )

    def __init__(self, monkeypatch) -> None:
        self.count, self.fail_at, self.after = 0, 0, False
        self.error: BaseException = Killed()
        for owner, name in self.WRITERS:
            monkeypatch.setattr(owner, name, self._wrapped(getattr(owner, name), name))

    def _wrapped(self, function, name):
        def write(*args, **kwargs):
            self.count += 1
            due = self.count == self.fail_at and (name == "save" or not isinstance(self.error, RuntimeError))
            due = due and not (isinstance(self.error, OSError) and kwargs.get("ignore_errors"))
            if due and not self.after:
                raise self.error
            result = function(*args, **kwargs)
            if due and self.after:
                raise self.error
            return result

        return write

    def arm(self, fail_at: int, error: BaseException, after: bool) -> None:
        self.count, self.fail_at, self.error, self.after = 0, fail_at, error, after


def whole_model(bases):
    return VisionLanguageModel.from_pretrained(*bases, device="cpu", trainable=True, train_only="all")


@pytest.fixture
def trained(request, tiny_bases, tmp_path):
    """A trainer after two steps, with a checkpoint of the first; of LoRA unless a test asks for all."""
    kind = getattr(request, "param", "lora")
    model = whole_model(tiny_bases) if kind == "all" else None
    kill = [KillAt("on_step_end", 2)]
    trainer = new_trainer(tiny_bases, tmp_path / "run", model=model, callbacks=kill, save_total_limit=1)
    with pytest.raises(Killed):
        trainer.train()
    assert checkpoints(tmp_path / "run") == ["checkpoint-1"]
    return trainer


def all_points(trainer, monkeypatch, run: Path):
    """Faults that are armed for each step of writing a checkpoint in turn, before and after it is done.

    The run folder is each time as it was at the beginning.
    """
    faults, backup = Faults(monkeypatch), run.with_name("backup")
    shutil.copytree(run, backup)
    faults.arm(0, Killed(), False)  # copying counts, too
    trainer._save_checkpoint(trainer.model, None)
    number = faults.count
    assert number > 20
    for point in range(1, number + 1):
        for after in (False, True):
            faults.arm(0, Killed(), False)
            shutil.rmtree(run)
            shutil.copytree(backup, run)
            yield faults, point, after
    faults.arm(0, Killed(), False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trained", "same_step"), [("lora", False), ("lora", True), ("all", True)], indirect=["trained"]
)
def test_a_kill_at_any_point_of_saving_loses_nothing(trained, tmp_path, monkeypatch, same_step):
    """With `same_step`, the only checkpoint is of the step that is saved, and `save_total_limit` is 1."""
    run, found = tmp_path / "run", set()
    if same_step:
        trained._save_checkpoint(trained.model, None)
        assert checkpoints(run) == ["checkpoint-2"]
    for faults, point, after in all_points(trained, monkeypatch, run):
        faults.arm(point, Killed(), after)
        with pytest.raises(Killed):
            trained._save_checkpoint(trained.model, None)
        faults.arm(0, Killed(), False)
        clear_leftovers(run)
        assert not list(run.glob("tmp-*"))
        newest = newest_resumable(run)
        assert newest is not None, (point, after)
        trained.model.load_checkpoint(newest)
        found.add(newest.name)
        assert all(is_resumable(run / name) for name in checkpoints(run))
    assert found == ({"checkpoint-2"} if same_step else {"checkpoint-1", "checkpoint-2"})


@pytest.mark.slow
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("file write failed")])
def test_an_error_at_any_point_of_saving_is_told_and_survived(trained, tmp_path, monkeypatch, caplog, error):
    run, failed = tmp_path / "run", 0
    for faults, point, after in all_points(trained, monkeypatch, run):
        caplog.clear()
        faults.arm(point, error, after)
        trained._save_checkpoint(trained.model, None)
        faults.arm(0, Killed(), False)
        clear_leftovers(run)
        there = [name for name in checkpoints(run) if name.startswith("checkpoint")]
        if trained.save_failure:
            failed += 1
            # Where only the folder's entry may not be on the disk yet, the new one is there as well.
            assert there[:1] == ["checkpoint-1"], (point, after)
            (told,) = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
            assert "checkpoint-2 could not be written: " in told
        else:
            assert "checkpoint-2" in there, (point, after)
        assert all(is_resumable(run / name) for name in there)
    assert failed >= (6 if isinstance(error, RuntimeError) else 40)


@pytest.mark.parametrize("before", ["lora", "all"])
def test_a_kill_while_the_weights_of_a_run_are_replaced_leaves_no_mixture(tiny_bases, tmp_path, monkeypatch, before):
    """What is there afterwards is the old weights or the new ones, whole, or no checkpoint."""
    old = whole_model(tiny_bases) if before == "all" else new_model(tiny_bases)
    old.save_checkpoint(tmp_path / "old")
    model = whole_model(tiny_bases)
    with torch.no_grad():
        model.projector[0].bias.add_(1)
        model.qwen.transformer.ln_f.weight.add_(1)
    faults, found = Faults(monkeypatch), set()
    shutil.copytree(tmp_path / "old", tmp_path / "run")
    faults.arm(0, Killed(), False)  # copying counts, too
    model.save_checkpoint(tmp_path / "run")
    for point in range(1, faults.count + 1):
        faults.arm(0, Killed(), False)
        shutil.rmtree(tmp_path / "run")
        shutil.copytree(tmp_path / "old", tmp_path / "run")
        faults.arm(point, Killed(), False)
        with pytest.raises(Killed):
            model.save_checkpoint(tmp_path / "run")
        faults.arm(0, Killed(), False)
        try:
            checkpoint = read_checkpoint(tmp_path / "run")
        except CheckpointError:
            found.add("none")
            continue
        is_new = bool((read_tensors(checkpoint.folder / "projector.safetensors")["0.bias"] > 0.5).all())
        if checkpoint.train_only == "all":
            norm = read_tensors(checkpoint.folder / "language_model/model.safetensors")["transformer.ln_f.weight"]
            assert bool((norm == model.qwen.transformer.ln_f.weight).all()) == is_new
        found.add(f"{checkpoint.train_only} {'new' if is_new else 'old'}")
    assert found == {f"{before} old", "none", "all new"}


@pytest.fixture(scope="module")
def two_checkpoints(tiny_bases, tmp_path_factory) -> Path:
    """A run folder with checkpoints 1 and 2; not to be written to."""
    folder = tmp_path_factory.mktemp("two")
    new_trainer(tiny_bases, folder, max_steps=2).train()
    assert checkpoints(folder) == ["checkpoint-1", "checkpoint-2"]
    names = {path.name for path in (folder / "checkpoint-2").iterdir()}
    assert names - {"README.md", "training_args.bin"} == WEIGHTS | STATE
    return folder


@pytest.mark.parametrize("name", sorted(WEIGHTS | STATE))
@pytest.mark.parametrize("damage", ["missing", "empty", "cut short", "of the step before", "one bit"])
def test_a_broken_checkpoint_is_passed_over(two_checkpoints, tmp_path, caplog, name, damage):
    run = Path(shutil.copytree(two_checkpoints, tmp_path / "run"))
    file = run / "checkpoint-2" / name
    content = file.read_bytes()
    middle = len(content) // 2
    damaged = {
        "empty": b"",
        "cut short": content[: len(content) * 2 // 3],
        "of the step before": (run / "checkpoint-1" / name).read_bytes(),
        "one bit": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
    }
    file.unlink()
    if damage in damaged:
        file.write_bytes(damaged[damage])
    is_harmless = damaged.get(damage) == content or (name, damage) == ("checksums.json", "missing")  # older versions
    assert newest_resumable(run) == run / f"checkpoint-{2 if is_harmless else 1}"
    if not is_harmless:
        assert f"{run / 'checkpoint-2'}" in caplog.text
        assert name in caplog.text or name == "checksums.json"
        shutil.rmtree(run / "checkpoint-1")
        with pytest.raises(CheckpointError, match="can't be resumed from any"):
            newest_resumable(run)


def test_deleting_old_checkpoints(tmp_path):
    for number in (1, 2, 3, 10, 20):
        (tmp_path / f"checkpoint-{number}").mkdir()
        os.utime(tmp_path / f"checkpoint-{number}", (1000 + number, 1000 + number))
    (tmp_path / "checkpoint-notes").mkdir()
    for limit in (5, 6):
        delete_old_checkpoints(tmp_path, limit, {tmp_path / "checkpoint-10"})
        assert len(checkpoints(tmp_path)) == 6
    delete_old_checkpoints(tmp_path, 3, {tmp_path / "checkpoint-10", tmp_path / "checkpoint-1"})
    assert checkpoints(tmp_path) == ["checkpoint-1", "checkpoint-10", "checkpoint-20", "checkpoint-notes"]
    delete_old_checkpoints(tmp_path, 1, {tmp_path / "checkpoint-10", tmp_path / "checkpoint-1"})
    assert checkpoints(tmp_path) == ["checkpoint-1", "checkpoint-10", "checkpoint-notes"]


def test_what_a_rename_that_fails_replaced_is_put_back(tmp_path, monkeypatch):
    staging, target = tmp_path / "tmp-checkpoint-4", tmp_path / "checkpoint-4"
    for folder in (staging, target):
        folder.mkdir()
        (folder / "name").write_text(folder.name)
    real = Path.rename

    def rename(path, to):
        if path == staging:
            raise OSError(errno.EIO, "Input/output error")
        return real(path, to)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="Input/output"):
        put_in_place(staging, target)
    assert (target / "name").read_text() == "checkpoint-4"


# ---- Disks that are full, through the command line

QUICK = [
    *("--lora_rank", "4", "--lora_alpha", "8", "--learning_rate", "1e-2", "--logging_steps", "1", "--save_steps", "1"),
    *("--use_cpu", "true", "--report_to", "none", "--disable_tqdm", "true", "--num_train_epochs", "2"),
]


@pytest.fixture(scope="module")
def command(base_flags, mixed_data) -> list[str]:
    """All flags but the output folder; 6 steps of 4 samples."""
    return [*base_flags, *mixed_data, *QUICK, "--per_device_train_batch_size", "4"]


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    assert train.main([*command, "--output_dir", str(folder)]) == 0
    return folder


def test_a_file_size_limit(command, whole, tmp_path, capsys, monkeypatch):
    """From the third step on, no file may be larger than half of the largest one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    largest = max(path.stat().st_size for path in (whole / "checkpoint-6").iterdir())

    class Limit(train.WatchBadSamples):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                resource.setrlimit(resource.RLIMIT_FSIZE, (largest // 2, hard))

    monkeypatch.setattr(train, "WatchBadSamples", Limit)
    try:
        assert train.main([*command, "--output_dir", str(tmp_path), "--save_total_limit", "1"]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert said.count("older checkpoints are unchanged") == 4
    assert "train.py: the run ended at step 6; its last checkpoint could not be written: " in said
    assert checkpoints(tmp_path) == ["checkpoint-2"]
    check_resumable(tmp_path / "checkpoint-2")


def test_final_weights_that_can_not_be_written(command, whole, tmp_path, capsys, monkeypatch):
    """An older save in the run folder stays as it was."""
    run = tmp_path / "run"
    shutil.copytree(whole, run, ignore=lambda _, names: [n for n in names if n in [f"checkpoint-{i}" for i in (5, 6)]])
    before = trained_weights(run)
    real = model.checkpoints.saving.save_file

    def save(tensors, path):
        if path.parent.parent == run:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path)

    monkeypatch.setattr(model.checkpoints.saving, "save_file", save)
    assert train.main([*command, "--output_dir", str(run), "--resume_from_checkpoint", "auto"]) == 1
    said = one_line_error(capsys.readouterr().err, "train.py")
    assert "the final weights could not be written" in said
    assert "No space left on device" in said
    after = trained_weights(run)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not list(run.glob("tmp-*"))


def test_the_final_weights_are_written_where_the_last_checkpoint_could_not_be(
    command, whole, tmp_path, monkeypatch, capsys
):
    """They are far smaller: without the optimizer's state. If they do not fit either, both failures are named."""

    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(model.trainer.VLMTrainer, "_save_optimizer_and_scheduler", fail)
    assert train.main([*command, "--output_dir", str(tmp_path)]) == 1
    assert "final weights are in" in one_line_error(capsys.readouterr().err, "train.py")
    assert checkpoints(tmp_path) == []
    ours, theirs = trained_weights(tmp_path), trained_weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    monkeypatch.setattr(model.checkpoints.saving, "save_file", fail)
    assert train.main([*command, "--output_dir", str(tmp_path / "neither")]) == 1
    said = one_line_error(capsys.readouterr().err, "train.py")
    assert re.search("last checkpoint could not be written: .*; the final weights could not be written to ", said)


def test_weights_only(command, tmp_path, capsys):
    """They can be trained on from, but not gone on from."""
    flags = [*command, "--output_dir", str(tmp_path), "--max_steps", "2"]
    assert train.main([*flags, "--save_only_model", "true"]) == 0
    assert not is_resumable(tmp_path / "checkpoint-2")
    capsys.readouterr()
    assert train.main([*flags, "--resume_from_checkpoint", str(tmp_path / "checkpoint-2")]) == 2
    said = one_line_error(capsys.readouterr().err, "train.py")
    assert "optimizer.pt" in said
    assert "--previous_lora_weights" in said
