"""Extra state for an exact resume, in addition to what Trainer saves.

`run_state.json` in a checkpoint holds what the run trains on and with (a resumed run must have the same), how its
epochs are cut into steps (a resumed run may split its steps differently, but not change their size), and the losses
since the last logged step (so that the next logged loss is that of an uninterrupted run).
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from dataprocess.messages import shorten

from ..checkpoints.base_models import comparable
from ..checkpoints.tensor_files import CheckpointError, read_json, reading
from .collectives import gather_objects

logger = logging.getLogger(__name__)

RUN_STATE = "run_state.json"
TRAINER_STATE = "trainer_state.json"
FROM_WEIGHTS = "start a new run from its weights with --previous_lora_weights"


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
                    f"belong to step {step}; {FROM_WEIGHTS}"
                )
            if not isinstance(state.identity, dict) or len(state.loss_sums) != state.geometry.num_processes:
                raise ValueError("identity is no object, or loss_sums are not one for each process")
            if not all(type(value) in (int, float) and abs(value) < 1e30 for value in state.loss_sums):
                raise ValueError("a loss is no number")
            if not all(type(index) is int and 0 <= index < state.geometry.num_samples for index in state.bad):
                raise ValueError("bad holds something else than positions of samples")
        return state


# ---- Is it the same run?


def check_same_steps(state: RunState, args: TrainingArguments, folder: Path) -> None:
    """Refuse steps of another size: step numbers, schedule and order of the samples would all mean something else.

    Raises:
        CheckpointError: naming the accumulation that fits, if there is one.
    """
    before = state.geometry.samples_per_step
    per_batch = args.train_batch_size * args.world_size
    if before == per_batch * args.gradient_accumulation_steps:
        return
    fits = (
        f"give --gradient_accumulation_steps {before // per_batch}"
        if before % per_batch == 0
        else "no --gradient_accumulation_steps fits, so change --per_device_train_batch_size or the number of processes"
    )
    raise CheckpointError(
        f"--resume_from_checkpoint {folder}: its steps are of {before} samples, {args.train_batch_size} rows × "
        f"{args.gradient_accumulation_steps} accumulated × {args.world_size} processes make "
        f"{per_batch * args.gradient_accumulation_steps}; {fits}"
    )


def check_identity(folder: str | Path, identity: dict[str, Any]) -> None:
    """Refuse to resume a run on other data or models than it was started with.

    Raises:
        CheckpointError: naming every difference.
    """
    state = RunState.read(Path(folder))
    differences = []
    for name in {**state.identity, **identity}:
        before, now = state.identity.get(name), identity.get(name)
        if name in ("vision_tower", "language_model") and before and not comparable(before, now):
            logger.warning("%s: its fingerprint of the %s is of an older kind and is not compared", folder, name)
        elif before != now:
            differences.append(f"{name} was {before!r} and is now {now!r}")
    if differences:
        raise CheckpointError(
            f"--resume_from_checkpoint {folder}: {'; '.join(differences)}; resume with what the run was started with, "
            f"or {FROM_WEIGHTS}"
        )


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

    def prepare(self, folder: Path) -> None:
        """Check that a checkpoint is of the run that is about to be resumed, and keep what is needed of it.

        Raises:
            CheckpointError: if it is of a run on something else, or with other steps.
        """
        self.saved, self.loading = RunState.read(folder), folder
        check_same_steps(self.saved, self.trainer.args, folder)
        if self.trainer.identity is not None:
            check_identity(folder, self.trainer.identity)
        for index in self.saved.bad if self._bad_samples() is not None else ():
            self._bad_samples().mark(index)

    def _bad_samples(self) -> Any:
        """Return which samples of the training set turned out bad; None if the data set does not count them."""
        dataset = self.trainer.train_dataset
        return getattr(getattr(dataset, "dataset", dataset), "bad", None)

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
        """Restore the losses since the last logged step; log, evaluate and save at the steps that the flags say."""
        saved, self.saved = self.saved, None
        if saved is None:
            return
        state.compute_steps(args, state.max_steps)  # Trainer takes those of the checkpoint
        sums, trainer = saved.loss_sums, self.trainer
        mean = sum(sums) / len(sums)
        own = sums[args.process_index] if len(sums) == args.world_size else mean
        trainer._tr_loss = torch.tensor(own, device=args.device)
        trainer._globalstep_last_logged = state.global_step - saved.steps_since_log
        trainer._total_loss_scalar = -mean  # `train_loss` at the end is the mean of the steps of this call

    def run_state(self) -> RunState:
        """Return what a checkpoint of this moment has to hold; every process must call it."""
        trainer, args, bad = self.trainer, self.trainer.args, self._bad_samples()
        geometry = Geometry(
            num_samples=len(trainer.train_dataset),
            batch_size=args.train_batch_size,
            accumulation=args.gradient_accumulation_steps,
            num_processes=args.world_size,
        )
        step = trainer.state.global_step
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


def callback_states(callbacks: Sequence[Any]) -> Any:
    """Return what `trainer_state.json` holds of callbacks that have a state; Trainer loses that of a second one."""
    states: dict[str, list[Any]] = {}
    for callback in callbacks:
        if isinstance(callback, ExportableState):
            states.setdefault(type(callback).__name__, []).append(callback.state())
    return {name: found if len(found) > 1 else found[0] for name, found in states.items()}
