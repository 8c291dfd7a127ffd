"""A run that was killed goes on as if it had not been: the same losses and weights, to the last bit."""

from __future__ import annotations

import logging
import shutil

import pytest
from stopped_runs import (
    Answers,
    KillAt,
    Killed,
    assert_same_end,
    checkpoints,
    go_on,
    logged,
    new_trainer,
    position,
)

from dataset.epoch_order import EpochOrder
from model.checkpoints.checkpoint import resolve_checkpoint
from model.runs.run_folder import newest_resumable

# ---- To the last bit. An epoch of 11 samples is 3 steps of 4, 4 and 3 samples, in batches of 2; dropout is 0.3.


@pytest.fixture(scope="module")
def uncut(tiny_bases, tmp_path_factory):
    """A run that nobody stopped."""
    trainer = new_trainer(tiny_bases, tmp_path_factory.mktemp("uncut"), save_strategy="no")
    trainer.train()
    assert trainer.state.global_step == 9
    assert [step for step, *_ in logged(trainer)] == [4, 8]
    return trainer


@pytest.mark.parametrize(
    ("event", "call", "save_steps", "left", "workers"),
    [
        ("on_step_begin", 1, 1, None, 0),  # before anything was saved
        ("on_substep_end", 2, 1, 1, 0),  # within accumulation
        ("on_pre_optimizer_step", 5, 1, 4, 0),
        ("on_step_end", 5, 2, 4, 2),  # in mid-epoch, behind a logged step
        ("on_step_end", 7, 2, 6, 0),  # the newest checkpoint is of the end of an epoch
        ("on_epoch_end", 1, 3, 3, 2),  # at the edge, before the epoch is declared over
        ("on_epoch_begin", 2, 3, 3, 0),
        ("on_step_begin", 7, 5, 5, 2),  # the newest checkpoint lies an epoch back
        ("on_log", 2, 3, 6, 0),
        ("on_save", 9, 1, 9, 0),  # nothing is left to be done
    ],
)
def test_a_killed_run_ends_as_one_that_was_not(uncut, tiny_bases, tmp_path, event, call, save_steps, left, workers):
    changes = {"save_steps": save_steps, "dataloader_num_workers": workers}
    killed = new_trainer(tiny_bases, tmp_path, callbacks=[KillAt(event, call)], **changes)
    with pytest.raises(Killed):
        killed.train()
    found = newest_resumable(tmp_path)
    assert (found and found.name) == (f"checkpoint-{left}" if left else None)
    if left is None:
        resumed = new_trainer(tiny_bases, tmp_path, **changes)
        resumed.train()
    else:
        resumed = go_on(tiny_bases, tmp_path, **changes)
    assert_same_end(resumed, uncut)
    assert (killed.seen[:left] if left else []) + resumed.seen == uncut.seen
    assert checkpoints(tmp_path)[-1].startswith("checkpoint-"), "unfinished work is cleared away"


def test_killed_again_and_again(uncut, tiny_bases, tmp_path):
    with pytest.raises(Killed):
        new_trainer(tiny_bases, tmp_path, callbacks=[KillAt("on_step_end", 2)]).train()
    for _ in range(6):
        with pytest.raises(Killed):
            go_on(tiny_bases, tmp_path, callbacks=[KillAt("on_step_end", 2)])
    assert newest_resumable(tmp_path).name == "checkpoint-7"
    assert_same_end(go_on(tiny_bases, tmp_path), uncut)


def test_persistent_workers_see_the_epoch_that_a_run_goes_on_in(uncut, tiny_bases, tmp_path):
    changes = {"dataloader_num_workers": 2, "dataloader_persistent_workers": True, "save_steps": 4}
    with pytest.raises(Killed):
        new_trainer(tiny_bases, tmp_path, callbacks=[KillAt("on_step_end", 5)], **changes).train()
    resumed = go_on(tiny_bases, tmp_path, **changes)
    assert_same_end(resumed, uncut)
    assert resumed.seen == uncut.seen[4:]


@pytest.mark.parametrize("strategy", ["epoch", "best"])
def test_logs_and_checkpoints_by_epoch(tiny_bases, tmp_path, strategy):
    changes = {
        "logging_strategy": "epoch",
        "save_strategy": strategy,
        "eval_strategy": "epoch",
        "metric_for_best_model": "loss",
        "load_best_model_at_end": True,
    }
    whole = new_trainer(tiny_bases, tmp_path / "whole", **changes)
    whole.train()
    with pytest.raises(Killed):
        new_trainer(tiny_bases, tmp_path / "run", callbacks=[KillAt("on_step_begin", 8)], **changes).train()
    resumed = go_on(tiny_bases, tmp_path / "run", **changes)
    assert_same_end(resumed, whole)
    evaluated = [
        [entry["eval_loss"] for entry in t.state.log_history if "eval_loss" in entry] for t in (whole, resumed)
    ]
    assert evaluated[0] == evaluated[1]
    assert len(evaluated[0]) == 3


def test_an_evaluation_in_between_changes_nothing(uncut, tiny_bases, tmp_path):
    changes = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 5}
    with pytest.raises(Killed):
        new_trainer(tiny_bases, tmp_path, callbacks=[KillAt("on_step_end", 6)], **changes).train()
    resumed = go_on(tiny_bases, tmp_path, **changes)
    assert_same_end(resumed, uncut)
    assert resumed.evaluate()["eval_loss"] > 0


def test_a_finished_run_that_goes_on_has_nothing_to_do(uncut, tiny_bases, tmp_path):
    new_trainer(tiny_bases, tmp_path).train()
    resumed = go_on(tiny_bases, tmp_path)
    assert resumed.seen == []
    assert_same_end(resumed, uncut)


def test_true_means_the_newest_checkpoint(uncut, tiny_bases, tmp_path):
    with pytest.raises(Killed):
        new_trainer(tiny_bases, tmp_path, callbacks=[KillAt("on_step_end", 6)]).train()
    resumed = new_trainer(tiny_bases, tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert_same_end(resumed, uncut)
    assert resumed.seen == uncut.seen[5:]


def test_a_longer_run_goes_on_at_the_rates_of_its_own_schedule(uncut, tiny_bases, tmp_path):
    new_trainer(tiny_bases, tmp_path, num_train_epochs=1, logging_steps=1).train()
    rest = go_on(tiny_bases, tmp_path, num_train_epochs=3, logging_steps=1)
    rates = [rate for *_, rate in logged(rest)]
    assert rates[:3] == pytest.approx([1e-2 * share for share in (1, 2 / 3, 1 / 3)])
    assert rates[3:] == pytest.approx([1e-2 * share / 9 for share in (6, 5, 4, 3, 2, 1)])


# ---- Other batches


@pytest.mark.parametrize("size", [12, 13])
@pytest.mark.parametrize(
    ("before", "after", "steps"), [((1, 1), (2, 2), 5), ((1, 1), (4, 1), 7), ((2, 2), (1, 3), 1), ((3, 1), (2, 2), 3)]
)
def test_other_batches_go_on_behind_the_last_sample(tiny_bases, tmp_path, caplog, size, before, after, steps):
    """Every sample of both epochs is seen once, in the order of a run that was not cut, and the run ends in full."""
    cut = [{"per_device_train_batch_size": b, "gradient_accumulation_steps": a} for b, a in (before, after)]
    common = {"size": size, "num_train_epochs": 2, "dropout": 0.0}
    first = new_trainer(tiny_bases, tmp_path, callbacks=[KillAt("on_step_end", steps + 1)], **common, **cut[0])
    with pytest.raises(Killed):
        first.train()
    assert newest_resumable(tmp_path).name == f"checkpoint-{steps}"
    with caplog.at_level(logging.WARNING):
        rest = go_on(tiny_bases, tmp_path, **common, **cut[1])
    told = [record.getMessage() for record in caplog.records if "samples now" in record.getMessage()]
    assert len(told) == 1
    samples_per_step = after[0] * after[1]
    assert f"steps are of {samples_per_step} samples now" in told[0]
    assert f"behind sample {steps * before[0] * before[1]} of epoch 0" in told[0]
    assert "learning rates" in told[0]

    order = EpochOrder(Answers(size), 3)
    expected = []
    for epoch in range(2):
        order.set_epoch(epoch)
        expected += [order[i]["id"] for i in range(size)]
    seen = [number for step in first.seen[:steps] + rest.seen for number in step]
    assert seen == expected
    per_epoch = -(-size // samples_per_step)
    assert rest.state.global_step == rest.state.max_steps == 2 * per_epoch
    last = newest_resumable(tmp_path)
    assert position(last) == (2, 0)
    assert resolve_checkpoint(tmp_path) == last, "the one that has come furthest, not that of the highest number"
    assert len(rest.seen[-per_epoch:]) == per_epoch
    assert rest.lr_scheduler.last_epoch == 2 * per_epoch


def test_a_run_with_other_batches_can_be_killed_and_go_on(tiny_bases, tmp_path):
    """Also where its first epoch has a step less than others: samples 7 to 10 and 11 to 13, of 13."""
    common = {"size": 13, "logging_steps": 1, "save_total_limit": 2}
    singles = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
    with pytest.raises(Killed):
        new_trainer(tiny_bases, tmp_path / "start", callbacks=[KillAt("on_step_end", 7)], **common, **singles).train()
    shutil.copytree(tmp_path / "start", tmp_path / "whole")
    whole = go_on(tiny_bases, tmp_path / "whole", **common)
    assert [step for step, *_ in logged(whole)[6:]] == [2, 4, 5, 6, 7, 8, 9, 10, 11, 12]
    assert checkpoints(tmp_path / "whole") == ["checkpoint-11", "checkpoint-12"]
    for calls in (2, 3, 4):
        run = tmp_path / f"run {calls}"
        shutil.copytree(tmp_path / "start", run)
        with pytest.raises(Killed):
            go_on(tiny_bases, run, callbacks=[KillAt("on_step_end", calls)], **common)
        assert_same_end(go_on(tiny_bases, run, **common), whole)
        assert newest_resumable(run).name == "checkpoint-12"
