"""A run that was killed ends as if it had not been: the same losses and weights, to the last bit."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from stopped_runs import (
    KillAt,
    Killed,
    assert_same_end,
    checkpoints,
    logged,
    new_trainer,
    resume,
    weights,
)
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_callback import ExportableState

from model import CheckpointError
from model.runs.resuming import newest_resumable

# ---- To the last bit. An epoch of 11 samples is 3 steps of 4, 4 and 3 samples, in batches of 2; dropout is 0.3.


@pytest.fixture(scope="module")
def uncut(tiny_bases, tmp_path_factory):
    """A run that nobody stopped."""
    trainer = new_trainer(tiny_bases, tmp_path_factory.mktemp("uncut"), save_strategy="no")
    trainer.train()
    assert trainer.state.global_step == 9
    assert [step for step, *_ in logged(trainer)] == [1, 4, 8, 9]
    return trainer


@pytest.mark.parametrize(
    ("event", "call", "save_steps", "left", "workers"),
    [
        ("on_step_begin", 1, 1, None, 0),  # before anything was saved
        ("on_substep_end", 2, 1, 1, 0),  # within accumulation
        ("on_step_end", 5, 2, 4, 2),  # in the middle of an epoch, after a logged step
        ("on_step_end", 7, 2, 6, 0),  # the newest checkpoint is of the end of an epoch
        ("on_epoch_end", 1, 3, 3, 2),  # at the edge, before the epoch is declared over
        ("on_step_begin", 7, 5, 5, 2),  # the newest checkpoint is an epoch old
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
        resumed = resume(tiny_bases, tmp_path, **changes)
    assert_same_end(resumed, uncut)
    assert (killed.seen[:left] if left else []) + resumed.seen == uncut.seen
    assert checkpoints(tmp_path)[-1].startswith("checkpoint-"), "unfinished work is cleared away"


# ---- Steps that are split differently, and steps of another size


def test_the_same_steps_may_be_split_differently(tiny_bases, tmp_path):
    """The same samples in the same steps; only the rounding differs."""
    common = {"dropout": 0.0, "logging_steps": 1}
    whole = new_trainer(tiny_bases, tmp_path / "whole", save_strategy="no", **common)
    whole.train()
    with pytest.raises(Killed):
        new_trainer(tiny_bases, tmp_path / "run", callbacks=[KillAt("on_step_end", 6)], **common).train()
    for rows, accumulation in ((1, 4), (4, 1)):
        run = shutil.copytree(tmp_path / "run", tmp_path / f"run {rows}")
        cut = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulation}
        rest = resume(tiny_bases, run, **common, **cut)
        assert rest.seen == whole.seen[5:]
        assert [loss for _, _, loss, *_ in logged(rest)] == pytest.approx(
            [loss for _, _, loss, *_ in logged(whole)], abs=1e-5
        )
        for name, tensor in weights(whole).items():
            torch.testing.assert_close(weights(rest)[name], tensor, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("rows", "accumulation", "said"),
    [
        (1, 1, r"4 samples, 1 rows × 1 accumulated × 1 processes make 1; give --gradient_accumulation_steps 4"),
        (2, 4, r"make 8; give --gradient_accumulation_steps 2"),
        (3, 1, r"make 3; no --gradient_accumulation_steps fits.*--per_device_train_batch_size"),
    ],
)
def test_steps_of_another_size_are_refused_and_the_fitting_accumulation_is_named(
    tiny_bases, tmp_path, rows, accumulation, said
):
    new_trainer(tiny_bases, tmp_path, max_steps=1).train()
    cut = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulation}
    with pytest.raises(CheckpointError, match=said):
        resume(tiny_bases, tmp_path, **cut)
    assert checkpoints(tmp_path) == ["checkpoint-1"]


# ---- Flags that take effect on resuming


def test_a_longer_run_goes_on_at_the_rates_of_its_own_schedule(tiny_bases, tmp_path):
    new_trainer(tiny_bases, tmp_path, num_train_epochs=1, logging_steps=1).train()
    rest = resume(tiny_bases, tmp_path, num_train_epochs=3, logging_steps=1)
    rates = [rate for *_, rate in logged(rest)]
    assert rates[:3] == pytest.approx([1e-2 * share for share in (1, 2 / 3, 1 / 3)])
    assert rates[3:] == pytest.approx([1e-2 * share / 9 for share in (6, 5, 4, 3, 2, 1)])


@pytest.mark.parametrize("kind", ["linear", "reduce_lr_on_plateau"])
def test_other_rates_and_weight_decay_take_effect(tiny_bases, tmp_path, kind):
    changes = {"num_train_epochs": 3, "logging_steps": 1, "lr_scheduler_type": kind, "eval_strategy": "epoch"}
    with pytest.raises(Killed):
        new_trainer(tiny_bases, tmp_path, callbacks=[KillAt("on_step_end", 4)], **changes).train()
    rest = resume(tiny_bases, tmp_path, learning_rate=1e-4, feature_proj_lr=3e-4, weight_decay=0.5, **changes)
    steps = [entry for entry in rest.state.log_history if "loss" in entry]
    share = [1.0] * 9 if kind == "reduce_lr_on_plateau" else [1 - step / 9 for step in range(9)]
    assert [entry["learning_rate"] for entry in steps[3:]] == pytest.approx([1e-4 * part for part in share[3:]])
    assert [entry["feature_proj_lr"] for entry in steps[3:]] == pytest.approx([3e-4 * part for part in share[3:]])
    assert [group["weight_decay"] for group in rest.optimizer.param_groups] == [0.5, 0.5, 0.0]


# ---- The state of callbacks and of the gradient scaler


class Counter(TrainerCallback, ExportableState):
    def __init__(self, name: str, steps: int = 0) -> None:
        self.name, self.steps = name, steps

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1 if self.name == "one" else 10

    def state(self):
        return {"args": {"name": self.name}, "attributes": {"steps": self.steps}}


def test_callbacks_keep_their_state_also_two_of_one_class(tiny_bases, tmp_path):
    changes = {"restore_callback_states_from_checkpoint": True, "num_train_epochs": 1}
    new_trainer(tiny_bases, tmp_path, callbacks=[Counter("one"), Counter("ten")], **changes).train()
    assert newest_resumable(tmp_path).name == "checkpoint-3"
    rest = new_trainer(tiny_bases, tmp_path, callbacks=[Counter("one"), Counter("ten")], **{**changes, "max_steps": 5})
    rest.train(resume_from_checkpoint=True)
    counters = [callback for callback in rest.callback_handler.callbacks if isinstance(callback, Counter)]
    assert {counter.name: counter.steps for counter in counters} == {"one": 5, "ten": 50}


def test_early_stopping_keeps_its_patience(tiny_bases, tmp_path):
    changes = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "metric_for_best_model": "loss",
        "learning_rate": 0.0,
        "feature_proj_lr": 0.0,
        "restore_callback_states_from_checkpoint": True,
    }

    def patience():
        return EarlyStoppingCallback(early_stopping_patience=3)

    with pytest.raises(Killed):  # the first evaluation is the best, and two more are no better
        new_trainer(tiny_bases, tmp_path, callbacks=[patience(), KillAt("on_step_begin", 4)], **changes).train()
    rest = resume(tiny_bases, tmp_path, callbacks=[patience()], **changes)
    assert rest.state.global_step == 4


def test_the_gradient_scaler_is_saved_and_restored(tiny_bases, tmp_path):
    def scaled():
        trainer = new_trainer(tiny_bases, tmp_path, num_train_epochs=1)
        trainer.args.fp16 = True  # too late for accelerate, which would refuse it on a CPU
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**7)
        return trainer

    first = scaled()
    first.add_callback(KillAt("on_step_begin", 3))
    with pytest.raises(Killed):
        first.train()
    assert torch.load(tmp_path / "checkpoint-2/scaler.pt", weights_only=True)["scale"] == 2.0**7
    rest = scaled()
    rest.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**3)
    rest.train(resume_from_checkpoint=True)
    assert rest.accelerator.scaler.get_scale() == 2.0**7


# ---- Older checkpoints


def test_a_checkpoint_without_checksums_and_with_old_fingerprints_is_resumed_with_warnings(
    uncut, tiny_bases, tmp_path, caplog
):
    identity = {"seed": 3, "vision_tower": "0123456789abcdef"}
    killed = new_trainer(tiny_bases, tmp_path, callbacks=[KillAt("on_step_end", 6)], identity=identity)
    with pytest.raises(Killed):
        killed.train()
    old = newest_resumable(tmp_path)
    (old / "checksums.json").unlink()
    config = json.loads((old / "multimodal_config.json").read_text())
    config.update(vision_tower_fingerprint="0123456789abcdef", language_model_fingerprint="fp16-0123456789abcdef")
    (old / "multimodal_config.json").write_text(json.dumps(config))
    rest = resume(tiny_bases, tmp_path, identity={"seed": 3, "vision_tower": "v2-0000000000000000"})
    assert_same_end(rest, uncut)
    assert "no checksums.json" in caplog.text
    assert caplog.text.count("of an older kind") >= 3
    with pytest.raises(CheckpointError, match="seed was 3 and is now 4"):
        resume(tiny_bases, tmp_path, identity={"seed": 4, "vision_tower": "v2-0000000000000000"})
    with pytest.raises(CheckpointError, match="seed was 3 and is now None"):  # a field that is no longer there
        resume(tiny_bases, tmp_path, identity={"vision_tower": "v2-0000000000000000"})
    with pytest.raises(CheckpointError, match="order was None and is now 'random'"):  # one that was not there
        resume(tiny_bases, tmp_path, identity={**identity, "order": "random"})
