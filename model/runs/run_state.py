"""Extra state for an exact resume, in addition to what Trainer saves.

`run_state.json` in a checkpoint holds what the run trains on and with (a resumed run must have the same), how its
epochs are cut into steps (a resumed run may split its steps differently, but not change their size), and the losses
since the last logged step (so that the next logged loss is that of an uninterrupted run).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dataprocess.messages import shorten

from ..checkpoints.tensor_files import read_json, reading
from .collectives import gather_objects

RUN_STATE = "run_state.json"
TRAINER_STATE = "trainer_state.json"


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
        """Samples of one optimizer step, over accumulation and processes."""
        return self.batch_size * self.accumulation * self.num_processes

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch; the last may be smaller."""
        return -(-self.num_samples // self.samples_per_step)

    def position(self, step: int) -> tuple[int, int]:
        """Return the epoch after so many steps of a run, and how many of its samples were trained on."""
        epoch, steps = divmod(step, self.steps_per_epoch)
        return epoch, steps * self.samples_per_step


@dataclass(frozen=True)
class RunState:
    """Content of `run_state.json`."""

    identity: dict[str, Any]
    """What is trained on and with; a resumed run must agree."""
    geometry: Geometry
    """How the run that saved it cut its epochs."""
    epoch: int
    """Epoch, counted from 0."""
    position: int
    """Samples of that epoch that were trained on."""
    loss_sums: list[float]
    """Sum of the losses since the last logged step, for each process."""
    steps_since_log: int
    """Steps since the last logged one."""
    bad: list[int] = field(default_factory=list)
    """Positions of samples in the data set that turned out bad."""

    def write(self, folder: Path) -> None:
        """Write `run_state.json` into a checkpoint folder."""
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False)
        (folder / RUN_STATE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> RunState:
        """Read `run_state.json` and check it against the checkpoint's step.

        Raises:
            CheckpointError: if it is missing, can't be read, or says what no run can have written.
        """
        values = read_json(folder / RUN_STATE)
        step: Any = read_json(folder / TRAINER_STATE).get("global_step")
        with reading(folder / RUN_STATE):
            state = cls(**{**values, "geometry": Geometry(**values["geometry"])})
            at_least_1 = asdict(state.geometry)
            counts = {"epoch": state.epoch, "position": state.position, "steps_since_log": state.steps_since_log}
            for name, value in {"global_step": step, **counts, **at_least_1}.items():
                if type(value) is not int or not (name in at_least_1) <= value < 1 << 53:
                    raise ValueError(f"{name} is {shorten(value)}")
            if (state.epoch, state.position) != state.geometry.position(step):
                raise ValueError(
                    f"epoch {state.epoch} and position {state.position} of {state.geometry.num_samples} samples do not "
                    f"belong to step {step}; start a new run from its weights with --previous_lora_weights"
                )
            if not isinstance(state.identity, dict) or len(state.loss_sums) != state.geometry.num_processes:
                raise ValueError("identity is no object, or loss_sums are not one for each process")
            if not all(type(value) in (int, float) and abs(value) < 1e30 for value in state.loss_sums):
                raise ValueError("a loss is no number")
            if not all(type(index) is int and 0 <= index < state.geometry.num_samples for index in state.bad):
                raise ValueError("bad holds something else than positions of samples")
        return state


class ResumePoint(TrainerCallback):
    """Takes from a run what Trainer does not save of it, and gives it to the run that resumes.

    Attributes:
        loading: the checkpoint that Trainer is loading; None once that is done, and in a new run.
        saved: what it holds.
    """

    def __init__(self, trainer: Any) -> None:  # a VLMTrainer, which imports this file
        self.trainer = trainer
        self.loading: Path | None = None
        self.saved: RunState | None = None

    @contextlib.contextmanager
    def named_errors(self) -> Iterator[None]:
        """Name the checkpoint where loading its training state fails: files of a stranger may hold nearly anything.

        Raises:
            CheckpointError: likewise.
        """
        try:
            yield
        except Exception:
            if self.loading is None:
                raise
            with reading(self.loading):
                raise

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore the losses since the last logged step."""
        saved, self.saved = self.saved, None
        if saved is None:
            return
        sums, trainer = saved.loss_sums, self.trainer
        mean = sum(sums) / len(sums)
        own = sums[args.process_index] if len(sums) == args.world_size else mean
        trainer._tr_loss = torch.tensor(own, device=args.device)
        trainer._globalstep_last_logged = state.global_step - saved.steps_since_log
        trainer._total_loss_scalar = -mean  # `train_loss` at the end is the mean of the steps of this call

    def run_state(self) -> RunState:
        """Return what a checkpoint of this moment has to hold; every process must call it."""
        trainer, bad = self.trainer, self.trainer.bad_samples
        step, geometry = trainer.state.global_step, trainer.geometry()
        epoch, position = geometry.position(step)
        return RunState(
            identity=trainer.identity or {},
            geometry=geometry,
            epoch=epoch,
            position=position,
            loss_sums=gather_objects(trainer._tr_loss.item()),
            steps_since_log=step - trainer._globalstep_last_logged,
            bad=bad.indices if bad is not None else [],
        )
