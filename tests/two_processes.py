"""Two processes of tests/model/runs/test_split_steps.py: `torchrun --standalone --nproc_per_node=2 two_processes.py …`.

Arguments: OUT QWEN CLIP.

Each process writes what it saw to `OUT/rank-N.pt`.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
from stopped_runs import Answers, KillAt, Killed, checkpoints, logged, new_trainer, resume, weights
from transformers import TrainerCallback

from dataset.epoch_order import EpochOrder
from model.runs.failures import NotFiniteError

HALF = {"per_device_train_batch_size": 1, "dropout": 0.3}
"""With two processes and accumulation, steps of 4 samples."""


POISON = 10
"""A sample of the second step."""


class Poisoned(Answers):
    """One sample has an image of NaN."""

    def __getitem__(self, index):
        made = super().__getitem__(index)
        if index == POISON:
            made["pixel_values"] = torch.full_like(made["pixel_values"], float("nan"))
        return made


def record(trainer) -> dict:
    return {
        "log": logged(trainer),
        "weights": weights(trainer),
        "seen": trainer.seen,
        "step": trainer.state.global_step,
    }


def killed(trainer) -> None:
    try:
        trainer.train()
    except Killed:
        return
    raise AssertionError("it was not killed")


def do_all(out: Path, bases: tuple[str, str], rank: int) -> dict:
    found = {"eval_loss": {}}
    plain = {**HALF, "dropout": 0.0, "size": 10, "num_train_epochs": 4, "logging_steps": 1, "save_strategy": "no"}
    trainer = new_trainer(bases, out / "split", **plain)
    trainer.train()
    for size in (5, 7, 8):  # 7: the last batch of one process is repeated samples; 5: all but one of both
        trainer.eval_dataset = Answers(size)
        trainer.args.per_device_eval_batch_size = 2
        found["eval_loss"][size] = trainer.evaluate()["eval_loss"]

    trainer = new_trainer(bases, out / "whole", save_steps=2, **HALF)
    trainer.train()
    found["whole"] = record(trainer)
    killed(new_trainer(bases, out / "run", callbacks=[KillAt("on_step_end", 6)], save_steps=2, **HALF))
    found["resumed"] = record(resume(bases, out / "run", save_steps=2, **HALF))

    killed(
        new_trainer(bases, out / "for one", callbacks=[KillAt("on_step_end", 5)], **{**plain, "save_strategy": "steps"})
    )

    class SendFromOne(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            if rank == 1 and state.global_step == 4:
                os.kill(os.getpid(), signal.SIGTERM)

    trainer = new_trainer(bases, out / "signal", callbacks=[SendFromOne()], save_steps=100, **HALF)
    trainer.train()
    found["signal"] = {**record(trainer), "received": trainer.stop_on_signal.received}
    found["after signal"] = record(resume(bases, out / "signal", save_steps=100, **HALF))

    trainer = new_trainer(bases, out / "poisoned", save_steps=1, **HALF)
    trainer.train_dataset = EpochOrder(Poisoned(11), 3)
    try:
        trainer.train()
    except NotFiniteError as error:
        found["poisoned"] = {**record(trainer), "message": str(error)}

    class FailOnOne(type(trainer)):
        def _save_rng_state(self, output_dir):
            if rank == 1:
                raise OSError(28, "No space left on device")
            super()._save_rng_state(output_dir)

    trainer = new_trainer(bases, out / "full", num_train_epochs=1, **HALF)
    trainer.__class__ = FailOnOne
    trainer.train()
    found["full"] = {"failure": trainer.save_failure, "there": checkpoints(out / "full")}
    return found


if __name__ == "__main__":
    own = int(os.environ["RANK"])
    torch.set_num_threads(1)
    torch.save(do_all(Path(sys.argv[1]), (sys.argv[2], sys.argv[3]), own), Path(sys.argv[1]) / f"rank-{own}.pt")
