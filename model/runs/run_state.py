"""What a run must know to go on as if it had not been stopped, beside what Trainer saves itself.

`run_state.json` in a checkpoint says what the run trains on and with what (so that a resume on something else is
refused), how many samples of the epoch were given (so that batch size and process count may change), and the losses
since the last logged step (so that the next logged loss is that of an uninterrupted run).
"""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerState

from dataprocess.messages import format_count

from ..checkpoints.checkpoint import RUN_STATE
from ..checkpoints.folders import read_json
from ..checkpoints.tensor_files import CheckpointError

logger = logging.getLogger(__name__)

TRAINER_STATE = "trainer_state.json"
SCHEDULER = "scheduler.pt"


@dataclass(frozen=True)
class Geometry:
    """How an epoch is cut into steps."""

    num_samples: int
    """Samples of an epoch."""
    batch_size: int
    """Samples that a process takes at once."""
    accumulation: int
    """Batches of a process in one optimizer step."""
    num_processes: int
    """Processes."""

    @property
    def samples_per_step(self) -> int:
        """Samples that one optimizer step takes, over accumulation and processes."""
        return self.batch_size * self.accumulation * self.num_processes

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch; the last may be smaller."""
        return -(-self.num_samples // self.samples_per_step)


@dataclass(frozen=True)
class RunState:
    """Content of `run_state.json`."""

    identity: dict[str, Any]
    """What is trained on and with what; a resumed run must agree."""
    geometry: Geometry
    """How the run that saved it cut its epochs."""
    epoch: int
    """Epoch, counted from 0."""
    position: int
    """Samples of that epoch that were given already."""
    loss_sums: list[float]
    """Sum of the losses since the last logged step, for each process."""
    steps_since_log: int
    """Steps since the last logged one."""
    bad: list[int] = field(default_factory=list)
    """Places in the data set of samples that turned out bad."""

    def write(self, folder: Path) -> None:
        """Write `run_state.json` into a checkpoint folder."""
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False)
        (folder / RUN_STATE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> RunState:
        """Read `run_state.json`.

        Raises:
            CheckpointError: if it is missing or can't be read.
        """
        try:
            values = read_json(folder / RUN_STATE)
            state = cls(**{**values, "geometry": Geometry(**values["geometry"])})
            state._check()
            return state
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise CheckpointError(
                f"{folder / RUN_STATE}: can't be read ({error}), so training can't go on from this checkpoint; start "
                "anew from its weights with --previous_lora_weights"
            ) from error

    def _check(self) -> None:
        whole = {**asdict(self.geometry), "epoch": self.epoch, "position": self.position}
        whole["steps_since_log"] = self.steps_since_log
        for name, value in whole.items():
            if type(value) is not int or value < (name in asdict(self.geometry)):
                raise ValueError(f"{name} is {value!r}")
        if not isinstance(self.identity, dict) or not isinstance(self.loss_sums, list) or not self.loss_sums:
            raise ValueError("identity or loss_sums are not of their type")
        if not all(isinstance(value, (int, float)) for value in self.loss_sums):
            raise ValueError("a loss is no number")
        if not isinstance(self.bad, list):
            raise ValueError("bad is no list")
        if not all(type(index) is int and 0 <= index < self.geometry.num_samples for index in self.bad):
            raise ValueError("bad holds something else than places in the data set")


def check_identity(state: RunState, identity: dict[str, Any], folder: Path) -> None:
    """Refuse to go on with something else than the run was begun with.

    Raises:
        CheckpointError: naming every difference.
    """
    differences = [
        f"{name} was {state.identity.get(name)!r} and is now {identity.get(name)!r}"
        for name in {**state.identity, **identity}
        if state.identity.get(name) != identity.get(name)
    ]
    if differences:
        raise CheckpointError(
            f"--resume_from_checkpoint {folder}: {'; '.join(differences)}; go on with what the run was begun with, or "
            "start a new run from its weights with --previous_lora_weights"
        )


def place_in_run(folder: Path, state: RunState, geometry: Geometry, staging: Path, *, write: bool) -> tuple[Path, int]:
    """Say where a checkpoint stands in a run that may cut its epochs differently.

    Args:
        folder: the checkpoint.
        state: its run state.
        geometry: how epochs are cut now.
        staging: a folder that may be (re)made for a copy of the checkpoint.
        write: whether this process is the one to make it.

    Returns:
        The checkpoint to resume from, and how many samples the epoch's order is to leave out in front. Where steps
        are what they were, that is the folder itself. Otherwise it is a copy whose step number and schedule are what
        they would be had the run been cut like this from its start.
    """
    steps, skipped = divmod(state.position, geometry.samples_per_step)
    new_step = state.epoch * geometry.steps_per_epoch + steps
    trainer_state = TrainerState.load_from_json(str(folder / TRAINER_STATE))
    old_step = trainer_state.global_step
    if new_step == old_step and (skipped == 0 or geometry == state.geometry):
        return folder, skipped
    logger.warning(
        "steps are of %s now, they were of %d: the run goes on behind sample %d of epoch %d, in the same "
        "order; step %d counts as step %d, and the learning rates go on from there in a schedule of %s an epoch",
        *(
            format_count(geometry.samples_per_step, "sample"),
            state.geometry.samples_per_step,
            state.position,
            state.epoch,
        ),
        *(old_step, new_step, format_count(geometry.steps_per_epoch, "step")),
    )
    if not write:
        return staging, skipped
    shutil.rmtree(staging, ignore_errors=True)
    shutil.copytree(folder, staging)
    trainer_state.global_step = new_step
    trainer_state.epoch = state.epoch + state.position / geometry.num_samples
    trainer_state.save_to_json(str(staging / TRAINER_STATE))
    schedule = torch.load(folder / SCHEDULER, weights_only=True)
    schedule["last_epoch"] = new_step
    torch.save(schedule, staging / SCHEDULER)
    return staging, skipped
