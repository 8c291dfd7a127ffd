"""SIGTERM and SIGINT: the step is finished and saved, and the run resumes from there as if nothing had happened."""

from __future__ import annotations

import os
import signal

import pytest
from stopped_runs import Answers, KillAt, Killed, assert_same_end, checkpoints, new_trainer, position, resume
from tiny_run import exit_status, one_line_error
from torch.utils.data import DataLoader
from transformers import TrainerCallback

import model.runs.callbacks
import train
from model.runs.data_workers import with_calm_workers
from model.runs.resuming import newest_resumable


class Send(TrainerCallback):
    """Sends this process signals at the given call of an event."""

    def __init__(self, event: str, call: int, *signals: int) -> None:
        self.calls = 0

        def happen(args, state, control, **kwargs):
            self.calls += 1
            if self.calls == call:
                for number in signals:
                    os.kill(os.getpid(), number)

        setattr(self, event, happen)


@pytest.fixture(autouse=True)
def _as_it_was():
    """Handlers and log are what they were."""
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    yield
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers


@pytest.fixture(scope="module")
def uncut(tiny_bases, tmp_path_factory):
    trainer = new_trainer(tiny_bases, tmp_path_factory.mktemp("uncut"), save_strategy="no")
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    ("number", "event", "call", "step"),
    [
        (signal.SIGTERM, "on_step_begin", 1, 1),
        (signal.SIGINT, "on_substep_end", 2, 2),  # within accumulation
        (signal.SIGINT, "on_save", 1, 3),  # while a checkpoint is written: it is finished, and one step more
        (signal.SIGTERM, "on_step_begin", 6, 6),  # the last step of an epoch
    ],
)
def test_the_step_is_finished_and_saved(uncut, tiny_bases, tmp_path, monkeypatch, capfd, number, event, call, step):
    changes = {"save_steps": 2 if event == "on_save" else 100}
    stopped = new_trainer(tiny_bases, tmp_path, callbacks=[Send(event, call, number)], **changes)
    assert exit_status(monkeypatch, stopped) == 128 + number
    assert stopped.state.global_step == step
    assert newest_resumable(tmp_path).name == f"checkpoint-{step}"
    said = capfd.readouterr().err
    assert f"{number.name}: finishing this step, then saving" in said
    assert f"stopped by {number.name} after step {step}, which is saved" in said
    assert "Traceback" not in said
    resumed = resume(tiny_bases, tmp_path, **changes)
    assert_same_end(resumed, uncut)
    assert stopped.seen + resumed.seen == uncut.seen


def test_what_belongs_to_an_epochs_end_is_left_to_it(tiny_bases, tmp_path):
    """Stopped in its middle, neither log nor evaluation nor checkpoint of the epoch is written."""
    changes = {"logging_strategy": "epoch", "save_strategy": "epoch", "eval_strategy": "epoch"}
    whole = new_trainer(tiny_bases, tmp_path / "whole", **changes)
    whole.train()
    stopped = new_trainer(tiny_bases, tmp_path / "run", callbacks=[Send("on_step_begin", 5, signal.SIGTERM)], **changes)
    stopped.train()
    assert [entry["step"] for entry in stopped.state.log_history if "eval_loss" in entry] == [3]
    resumed = resume(tiny_bases, tmp_path / "run", **changes)
    assert_same_end(resumed, whole)
    assert [entry["step"] for entry in resumed.state.log_history if "eval_loss" in entry] == [3, 6, 9]
    assert checkpoints(tmp_path / "run") == ["checkpoint-3", "checkpoint-5", "checkpoint-6", "checkpoint-9"]
    assert position(tmp_path / "run/checkpoint-5") == (1, 8)


def test_a_run_without_checkpoints_is_saved_too(uncut, tiny_bases, tmp_path):
    changes = {"save_strategy": "no"}
    new_trainer(tiny_bases, tmp_path, callbacks=[Send("on_step_begin", 4, signal.SIGTERM)], **changes).train()
    assert checkpoints(tmp_path) == ["checkpoint-4"]
    assert_same_end(resume(tiny_bases, tmp_path, **changes), uncut)


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_quits_at_once(tiny_bases, tmp_path, monkeypatch, second):
    codes = []

    def leave(code):
        codes.append(code)
        raise Killed

    monkeypatch.setattr(model.runs.callbacks.os, "_exit", leave)
    stopped = new_trainer(tiny_bases, tmp_path, callbacks=[Send("on_substep_end", 2, signal.SIGTERM, second)])
    with pytest.raises(Killed):
        stopped.train()
    assert codes == [128 + second]
    assert stopped.state.global_step == 1


def test_a_signal_in_the_last_step_lets_the_run_end(tiny_bases, tmp_path, monkeypatch, capsys):
    trainer = new_trainer(
        tiny_bases, tmp_path, callbacks=[Send("on_step_begin", 3, signal.SIGTERM)], num_train_epochs=1
    )
    assert exit_status(monkeypatch, trainer) == 0
    assert "done; ask the model" in capsys.readouterr().err
    assert (tmp_path / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("where", ["load_tokenizer", "finish"])
def test_ctrl_c_outside_of_the_steps_is_one_line(monkeypatch, tmp_path, tiny_bases, capsys, where):
    def interrupted(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(train, where, interrupted)
    if where == "finish":
        trainer = new_trainer(tiny_bases, tmp_path, callbacks=[KillAt("on_step_begin", 1, OSError("never"))])
        trainer.train = lambda **kwargs: None
        monkeypatch.setattr(train, "build_trainer", lambda *_: trainer)
    (tmp_path / "data.json").write_text("{}")
    data = ["--image_map", str(tmp_path / "data.json"), "--captions_file", str(tmp_path / "data.json")]
    flags = [*data, "--output_dir", str(tmp_path), "--report_to", "none"]
    assert train.main(flags) == 130
    assert "stopped by SIGINT" in one_line_error(capsys.readouterr().err, "train.py")


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="who sent a signal can't be told here")
def test_data_workers_heed_none_but_their_parent():
    """They answer after signals from elsewhere, and end when the process they work for ends them."""
    loader = with_calm_workers(DataLoader(Answers(20), num_workers=1, collate_fn=lambda batch: batch[0]["id"]))
    answers = iter(loader)
    first = next(answers)
    (worker,) = answers._workers
    sender = os.fork()
    if sender == 0:
        os.kill(worker.pid, signal.SIGTERM)
        os.kill(worker.pid, signal.SIGINT)
        os._exit(0)
    os.waitpid(sender, 0)
    assert [first, *answers] == list(range(20))

    answers = iter(loader)
    next(answers)
    (worker,) = answers._workers
    signal_handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's would call this an error
    try:
        worker.terminate()
        worker.join(20)
        assert worker.exitcode == 128 + signal.SIGTERM
    finally:
        signal.signal(signal.SIGCHLD, signal_handler)
