"""The same mathematics in one process and in two; and steps that are not finite."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from stopped_runs import (
    Answers,
    checkpoints,
    is_resumable,
    new_trainer,
    resume,
    weights,
)
from tiny_run import ROOT, exit_status, one_line_error, start
from tiny_vlm import trainable_parameters
from transformers import TrainerCallback
from two_processes import POISON

from dataset.epoch_order import EpochOrder
from model import CheckpointError
from model.runs.failures import MOST_SKIPPED
from model.runs.resuming import newest_resumable

SAME = {"dropout": 0.0, "size": 10, "num_train_epochs": 4, "logging_steps": 1}


@pytest.fixture(scope="module")
def two(tiny_bases, tmp_path_factory) -> tuple[Path, list[dict]]:
    """The folder in which two processes did it all, and what each of them saw."""
    out = tmp_path_factory.mktemp("two")
    script = Path(__file__).parents[2] / "two_processes.py"
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = start("torchrun", "--standalone", "--nproc_per_node=2", script, out, *tiny_bases, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    return out, [torch.load(out / f"rank-{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def as_one(tiny_bases, tmp_path_factory):
    """What the same run is in one process, its batches not split."""
    cut = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "save_strategy": "no"}
    trainer = new_trainer(tiny_bases, tmp_path_factory.mktemp("one"), **SAME, **cut)
    trainer.train()
    return trainer


@pytest.mark.slow
def test_every_sample_of_an_epoch_is_seen_once_but_for_the_padding(two):
    """11 samples on 2 processes: the last step is filled up with the epoch's first sample."""
    ranks = [found["whole"]["seen"] for found in two[1]]
    order = EpochOrder(Answers(11), 3)
    for epoch in range(3):
        order.set_epoch(epoch)
        wanted = [order[i]["id"] for i in range(11)]
        seen = [number for rank in ranks for step in rank[3 * epoch : 3 * epoch + 3] for number in step]
        assert sorted(seen) == sorted([*wanted, wanted[0]])


@pytest.mark.slow
def test_two_processes_killed_and_resumed(two):
    for found in two[1]:
        whole, resumed = found["whole"], found["resumed"]
        assert resumed["log"] == whole["log"]
        assert resumed["seen"] == whole["seen"][4:]
        for name, tensor in whole["weights"].items():
            assert torch.equal(resumed["weights"][name], tensor), name
    assert checkpoints(two[0] / "run") == [
        "checkpoint-2",
        "checkpoint-4",
        "checkpoint-6",
        "checkpoint-8",
        "checkpoint-9",
    ]
    files = {path.name for path in (two[0] / "run/checkpoint-4").iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= files


@pytest.mark.slow
def test_one_process_resumes_what_two_began(as_one, two, tiny_bases):
    """Steps are of the same size, so it sees the same samples and comes to the same weights."""
    folder = two[0] / "for one"
    assert newest_resumable(folder).name == "checkpoint-4"
    rest = resume(tiny_bases, folder, **SAME)
    assert rest.seen == as_one.seen[4:]
    ours, theirs = weights(rest), weights(as_one)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=5e-5)
    with pytest.raises(CheckpointError, match=r"give --gradient_accumulation_steps 2"):
        resume(tiny_bases, folder, **SAME, gradient_accumulation_steps=1)


@pytest.mark.slow
def test_the_evaluation_loss_of_two_processes_is_that_of_one(as_one, two):
    """Though samples are repeated so that both have full batches."""
    for size in (5, 7, 8):
        as_one.eval_dataset = Answers(size)
        alone = as_one.evaluate()["eval_loss"]
        assert [found["eval_loss"][size] for found in two[1]] == pytest.approx([alone] * 2, rel=1e-5), size


@pytest.mark.slow
def test_one_process_that_is_told_to_stop_stops_all(two):
    for found in two[1]:
        assert found["signal"]["received"] == signal.SIGTERM
        assert found["signal"]["step"] == 5
        assert found["after signal"]["log"] == found["whole"]["log"]
        for name, tensor in found["whole"]["weights"].items():
            assert torch.equal(found["after signal"]["weights"][name], tensor), name


@pytest.mark.slow
def test_one_process_that_can_not_write_keeps_the_checkpoint_from_appearing(two):
    for found in two[1]:
        assert "No space left on device" in found["full"]["failure"]
        assert found["full"]["there"] == []


@pytest.mark.slow
def test_a_loss_of_one_process_that_is_not_finite_stops_all(two):
    messages = {found["poisoned"]["message"] for found in two[1]}
    assert len(messages) == 1
    steps = {found["poisoned"]["step"] for found in two[1]}
    (step,) = steps
    had_it = [POISON in found["poisoned"]["seen"][-1] for found in two[1]]
    assert sorted(had_it) == [False, True], "one of them had it"
    ids = sorted({number for found in two[1] for number in found["poisoned"]["seen"][-1]})
    (message,) = messages
    assert f"the loss of step {step + 1} is not finite; the step was not taken" in message
    assert f"IDs {', '.join(map(str, ids))}." in message
    assert is_resumable(two[0] / "poisoned" / f"checkpoint-{step}")


# ---- In one process


class Spoil(TrainerCallback):
    """Makes a trained weight or a gradient not finite before the third step."""

    def __init__(self, what: str) -> None:
        self.what = what

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2 and self.what == "weight":
            next(p for p in model.parameters() if p.requires_grad).data[0, 0] = float("nan")
        if state.global_step == 2 and self.what != "weight":
            factor = {"infinite gradient": float("inf"), "huge gradient": 1e30}[self.what]
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.register_hook(lambda gradient: torch.full_like(gradient, factor))


@pytest.mark.parametrize("clip", [1.0, 0.0])
@pytest.mark.parametrize(
    ("what", "called"),
    [("weight", "loss"), ("infinite gradient", "gradient"), ("huge gradient", "gradient")],
)
def test_a_step_that_is_not_finite_is_not_taken(tiny_bases, tmp_path, monkeypatch, capsys, what, called, clip):
    """Also where every number of the gradient is finite, but its norm is too large for fp32: clipping would zero it."""
    trainer = new_trainer(tiny_bases, tmp_path, callbacks=[Spoil(what)], max_grad_norm=clip, size=12)
    assert exit_status(monkeypatch, trainer) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    ids = sorted(trainer.seen[2])
    assert len(ids) == 4
    assert said.startswith(f"train.py: the {called} of step 3 is not finite; the step was not taken.")
    assert f"IDs {', '.join(map(str, ids))}." in said
    assert trainer.state.global_step == 2
    assert newest_resumable(tmp_path).name == "checkpoint-2"
    assert not (tmp_path / "adapter_model.safetensors").exists()
    fresh = new_trainer(tiny_bases, tmp_path / "again", size=12)
    fresh.model.load_checkpoint(tmp_path / "checkpoint-2")
    assert all(tensor.isfinite().all() for tensor in weights(fresh).values())


def fp16_trainer(tiny_bases, folder, bad, **changes):
    """A trainer whose gradients go through a scaler, as fp16 has it on a GPU; those of the `bad` steps are infinite."""
    trainer = new_trainer(tiny_bases, folder, size=4, save_strategy="no", **changes)
    trainer.args.fp16 = True  # too late for accelerate, which would refuse it on a CPU
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    calls = [0]

    def spoil(gradient):
        calls[0] += 1
        return gradient * float("inf") if calls[0] - 1 in bad else gradient

    next(iter(trainable_parameters(trainer.model).values())).register_hook(spoil)
    return trainer


def test_fp16_that_overflows_for_ever_is_an_error(tiny_bases, tmp_path, monkeypatch, capsys):
    trainer = fp16_trainer(tiny_bases, tmp_path, range(10**9), num_train_epochs=200, gradient_accumulation_steps=1)
    before = weights(trainer)
    assert exit_status(monkeypatch, trainer) == 1
    said = one_line_error(capsys.readouterr().err, "train.py")
    assert f"the gradients of {MOST_SKIPPED} steps in a row, up to step {MOST_SKIPPED}, were not finite in fp16" in said
    assert "The last samples have the IDs " in said
    assert "checkpoints since step 0 hold the same weights" in said
    assert all(torch.equal(before[name], weight) for name, weight in weights(trainer).items())


def test_fp16_may_overflow_as_often_as_it_likes_but_not_in_a_row(tiny_bases, tmp_path):
    bad = {*range(MOST_SKIPPED - 1), *range(MOST_SKIPPED, 2 * MOST_SKIPPED - 1)}
    trainer = fp16_trainer(tiny_bases, tmp_path, bad, num_train_epochs=60, gradient_accumulation_steps=1)
    before = weights(trainer)
    trainer.train()
    assert trainer.state.global_step == 120
    assert not all(torch.equal(before[name], weight) for name, weight in weights(trainer).items())
