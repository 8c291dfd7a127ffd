"""Write checkpoints that a run can be resumed from exactly; each appears whole or not at all.

`run_state.json` holds what Trainer does not save: what the run trains on and with (a resumed run must have the same),
how its epochs are cut into steps (a resumed run may split its steps differently, but not change their size), and the
losses since the last logged step (so that the next logged loss is that of an uninterrupted run).
"""

from __future__ import annotations

import json
import logging
import secrets
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from transformers.trainer_callback import ExportableState

from ..checkpoints.folder import CHECKSUMS, WEIGHTS
from ..checkpoints.saving import write_checksums
from .callbacks import first_problem
from .deleting import delete_old_checkpoints, remove
from .run_folder import put_in_place

logger = logging.getLogger(__name__)

RUN_STATE = "run_state.json"
TRAINER_STATE = "trainer_state.json"


@dataclass(frozen=True)
class Geometry:
    """How an epoch is cut into steps.

    Attributes:
        num_samples: samples of an epoch.
        batch_size: samples that a process takes at once.
        accumulation: batches of a process in one optimizer step.
        num_processes: processes.
    """

    num_samples: int
    batch_size: int
    accumulation: int
    num_processes: int

    @property
    def samples_per_step(self) -> int:
        """Samples of one optimizer step, over accumulation and processes."""
        return self.batch_size * self.accumulation * self.num_processes

    def position(self, step: int) -> tuple[int, int]:
        """Return the epoch after so many steps of a run, and how many of its samples were trained on."""
        steps_per_epoch = -(-self.num_samples // self.samples_per_step)  # the last step may be smaller
        epoch, steps = divmod(step, steps_per_epoch)
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


def bad_samples(trainer: Any) -> Any:
    """Return which samples of the training set turned out bad; None if the data set does not count them."""
    dataset = trainer.train_dataset
    return getattr(getattr(dataset, "dataset", dataset), "bad", None)


def run_state(trainer: Any) -> RunState:
    """Return what a checkpoint of this moment has to hold; every process must call it."""
    args, bad, step = trainer.args, bad_samples(trainer), trainer.state.global_step
    geometry = Geometry(
        num_samples=len(trainer.train_dataset),
        batch_size=args.train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        num_processes=args.world_size,
    )
    epoch, position = geometry.position(step)
    return RunState(
        identity=trainer.identity or {},
        geometry=geometry,
        epoch=epoch,
        position=position,
        loss_sums=gather_object([trainer._tr_loss.item()]),
        steps_since_log=step - trainer._globalstep_last_logged,
        bad=bad.indices if bad is not None else [],
    )


def write_checkpoint(trainer: Any) -> str:
    """Write a checkpoint under another name, and rename it when it is whole; every process must call it.

    Trainer writes in place, so that a kill or a full disk leaves a part of a checkpoint that looks like the newest
    one. If writing fails, older checkpoints stay, the failure is logged, and training continues.
    Return what went wrong, or an empty string.
    """
    state, saves, run_folder = trainer.state, trainer.args.should_save, trainer.run_folder
    target = run_folder / f"checkpoint-{state.global_step}"
    # No process of another run writes under this name, and no link can have it.
    staging = run_folder / f"tmp-{target.name}-{gather_object([secrets.token_hex(4)])[0]}"
    best_before = state.best_model_checkpoint
    best = run_folder / f"checkpoint-{state.best_global_step}"
    if state.best_global_step and (best == target or best.is_dir()):
        state.best_model_checkpoint = str(best)
    now = run_state(trainer)

    def write() -> None:
        trainer.save_model(str(staging), _internal_call=True)
        if not trainer.args.save_only_model:  # what Trainer itself needs to resume
            trainer._save_optimizer_and_scheduler(str(staging))
            trainer._save_scaler(str(staging))
            trainer._save_rng_state(str(staging))  # every process has its own

    def finish() -> None:
        parts = (*trainer.callback_handler.callbacks, trainer.control)
        with_state = [part for part in parts if isinstance(part, ExportableState)]
        replace(state, stateful_callbacks=with_state).save_to_json(str(staging / TRAINER_STATE))
        text = json.dumps(asdict(now), indent=2, ensure_ascii=False)
        (staging / RUN_STATE).write_text(text + "\n", encoding="utf-8")
        write_checksums(staging, {path.name for path in staging.iterdir()} - {CHECKSUMS, *WEIGHTS})  # those are there
        put_in_place(staging, target)

    problem = first_problem(write) or first_problem(finish, saves)
    if problem:
        state.best_model_checkpoint = best_before
        if saves:
            told = "checkpoint %s could not be written: %s; older checkpoints are unchanged, and training continues"
            logger.error(told, target, problem)
            remove(staging)
        return f"{target}: {problem}"
    limit = trainer.args.save_total_limit or 0
    if saves and limit > 0:
        delete_old_checkpoints(run_folder, limit, {target, Path(state.best_model_checkpoint or target)})
    return ""
