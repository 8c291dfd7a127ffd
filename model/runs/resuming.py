"""Find what a run resumes from, check that it is the same run, and restore what Trainer does not."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dataprocess.messages import shorten

from ..arguments import VLMTrainingArguments
from ..checkpoints.base_models import comparable
from ..checkpoints.folder import CheckpointError, numbered_checkpoints, reading
from ..checkpoints.readers import OPTIONAL, check_checksums, read_json, weights_in
from .callbacks import RUN_CONFIG
from .run_state import RUN_STATE, TRAINER_STATE, Geometry, RunState, bad_samples

logger = logging.getLogger(__name__)

_STATE = (TRAINER_STATE, RUN_STATE, "optimizer.pt", "scheduler.pt")
_FROM_WEIGHTS = "start a new run from its weights with --previous_lora_weights"
_OF_FLAGS = ("lr", "initial_lr", "weight_decay", "betas", "eps")
"""Options of an optimizer's groups that flags decide."""
_SHAPED_AS_PARAMETER = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")
_OF_LORA = ("lora_rank", "lora_alpha", "target_modules")
_NOT_COMPARED = {"output_dir", "resume_from_checkpoint", "overwrite_output_dir"}


def checkpoint_to_resume(args: VLMTrainingArguments) -> str | None:
    """Return the checkpoint that `--resume_from_checkpoint` means: a checkpoint, or the newest of a run folder.

    `auto` is the newest one of `--output_dir`, or None if there is none yet; `true`, as transformers has it, insists.
    One that is damaged is passed over with a warning, as long as there is an older one.

    Raises:
        CheckpointError: if there is none, or training can't be resumed from any.
    """
    wanted = args.resume_from_checkpoint
    if wanted is None:
        return None
    if args.overwrite_output_dir:
        raise CheckpointError(
            f"--resume_from_checkpoint {wanted} continues a run and --overwrite_output_dir deletes it; give one of them"
        )
    automatic = wanted.lower() in ("auto", "true")
    folder = Path(str(args.output_dir if automatic else wanted))
    if not folder.is_dir():
        if wanted.lower() == "auto":
            return None
        raise CheckpointError(f"--resume_from_checkpoint {folder}: no such folder; give a checkpoint or a run folder")
    found = newest_resumable(folder)
    if len(set(gather_object([found and found.name]))) > 1:
        raise CheckpointError(f"the processes see different checkpoints in {folder}; it must be a folder they share")
    if found is None and wanted.lower() == "auto":
        return None
    if found is None:
        found = folder
        check_resumable(folder)
    check_same_steps(read_run_state(found), args, found)
    return str(found)


def newest_resumable(run: Path) -> Path | None:
    """Return the newest checkpoint of a run folder that training can be resumed from; None if it holds none at all.

    Raises:
        CheckpointError: if there are checkpoints, but none that can be used.
    """
    problems = []
    for folder in numbered_checkpoints(run):
        try:
            check_resumable(folder)
        except CheckpointError as error:
            logger.warning("passed over: %s", error)
            problems.append(str(error))
        else:
            return folder
    if problems:
        raise CheckpointError(
            f"{run}: training can't be resumed from any of its checkpoints ({problems[0]}); if they hold weights, "
            "start a new run from them with --previous_lora_weights, or give another --output_dir"
        )
    return None


def check_resumable(folder: Path) -> None:
    """Check that a checkpoint holds all that resuming reads, as it was written.

    Raises:
        CheckpointError: if a file is missing or damaged.
    """
    weights = weights_in(folder)
    missing = [name for name in (*weights, *_STATE) if not (folder / name).exists()]
    if missing:
        raise CheckpointError(
            f"--resume_from_checkpoint {folder}: {', '.join(missing)} missing, so training can't be resumed from it; "
            f"if it holds weights, {_FROM_WEIGHTS}"
        )
    optional = [path.name for pattern in ("scaler.pt", "rng_state*.pth") for path in folder.glob(pattern)]
    check_checksums(folder, (*weights, *_STATE, *optional), everything=True)
    read_run_state(folder)
    with reading(folder / TRAINER_STATE):
        state = TrainerState(**read_json(folder / TRAINER_STATE))
        if not isinstance(state.log_history, list) or not isinstance(state.stateful_callbacks, dict):
            raise ValueError("log_history or stateful_callbacks are not of their type")


def read_run_state(folder: Path) -> RunState:
    """Read `run_state.json` and check it against the checkpoint's step.

    Raises:
        CheckpointError: if it is missing, can't be read, or says what no run can have written.
    """
    values = read_json(folder / RUN_STATE)
    step: Any = read_json(folder / TRAINER_STATE).get("global_step")
    with reading(folder / RUN_STATE):
        state = RunState(**{**values, "geometry": Geometry(**values["geometry"])})
        at_least_1 = asdict(state.geometry)
        counts = {"epoch": state.epoch, "position": state.position, "steps_since_log": state.steps_since_log}
        for name, value in {"global_step": step, **counts, **at_least_1}.items():
            if type(value) is not int or not (name in at_least_1) <= value < 1 << 53:
                raise ValueError(f"{name} is {shorten(value)}")
        if (state.epoch, state.position) != state.geometry.position(step):
            raise ValueError(
                f"epoch {state.epoch} and position {state.position} of {state.geometry.num_samples} samples do not "
                f"belong to step {step}; {_FROM_WEIGHTS}"
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
    """Refuse steps of another size: step numbers, schedule and order of the samples would all mean something else."""
    before, rows, processes = state.geometry.samples_per_step, args.train_batch_size, args.world_size
    accumulation, fitting = args.gradient_accumulation_steps, before // (rows * processes)
    if before == rows * accumulation * processes:
        return
    advice = f"give --gradient_accumulation_steps {fitting}"
    if before != rows * fitting * processes:
        flag = "--per_device_train_batch_size"
        advice = f"no --gradient_accumulation_steps fits, so change {flag} or the number of processes"
    raise CheckpointError(
        f"--resume_from_checkpoint {folder}: its steps are of {before} samples, {rows} rows × {accumulation} "
        f"accumulated × {processes} processes make {rows * accumulation * processes}; {advice}"
    )


def check_identity(folder: str | Path, identity: dict[str, Any]) -> None:
    """Refuse to resume a run on other data or models than it was started with, naming every difference."""
    state = read_run_state(Path(folder))
    differences = []
    old, new = ({**OPTIONAL, **values} for values in (state.identity, identity))
    for name in {**old, **new}:
        before, now = old.get(name), new.get(name)
        if name in _OF_LORA and old["train_only"] != new["train_only"]:
            continue  # only one of the two trains LoRA, which is said already
        if name in ("vision_tower", "language_model") and before and not comparable(before, now):
            logger.warning("%s: its fingerprint of the %s is of an older kind and is not compared", folder, name)
        elif before != now:
            differences.append(f"{name} was {before!r} and is now {now!r}")
    if differences:
        raise CheckpointError(
            f"--resume_from_checkpoint {folder}: {'; '.join(differences)}; resume with what the run was started with, "
            f"or {_FROM_WEIGHTS}"
        )


def log_changes(old: Path, now: dict[str, Any] | None) -> None:
    """Log which flags differ from those in a run's `train_config.json`, if that can be read."""
    try:
        before: dict[str, Any] = read_json(old)
    except CheckpointError:
        return
    found = []
    for section, values in (now or {}).items():
        known = before.get(section)
        known = known if isinstance(known, dict) else {}
        for name, value in values.items():
            if name not in _NOT_COMPARED and known.get(name, value) != value:
                found.append(f"{name} was {known[name]} and is now {value}")
    if found:
        logger.warning("resuming with other settings than before: %s", "; ".join(found))


# ---- While a run resumes


class Resumed(TrainerCallback):
    """Gives a run that resumes what Trainer does not restore.

    Args:
        trainer: the `VLMTrainer` that resumes, which imports this file.
        folder: the checkpoint.

    Raises:
        CheckpointError: if it is of a run on something else, or with other steps.
    """

    def __init__(self, trainer: Any, folder: Path) -> None:
        check_resumable(folder)
        self.trainer = trainer
        self.saved = read_run_state(folder)
        self.loading: Path | None = folder  # until Trainer has loaded it
        check_same_steps(self.saved, trainer.args, folder)
        if trainer.identity is not None:
            check_identity(folder, trainer.identity)
        bad = bad_samples(trainer)
        for index in self.saved.bad if bad is not None else ():
            bad.mark(index)
        if trainer.args.should_save:
            log_changes(folder.parent / RUN_CONFIG, trainer.run_config)

    @contextlib.contextmanager
    def named_errors(self) -> Iterator[None]:
        """Name the checkpoint where loading its training state fails: files of a stranger may hold nearly anything."""
        try:
            self.trainer._load_rng_state(str(self.loading))  # Trainer does it later, when it could not be told any more
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
        state.compute_steps(args, state.max_steps)  # Trainer takes those of the checkpoint
        sums, trainer = self.saved.loss_sums, self.trainer
        mean = sum(sums) / len(sums)
        own = sums[args.process_index] if len(sums) == args.world_size else mean
        trainer._tr_loss = torch.tensor(own, device=args.device)
        trainer._globalstep_last_logged = state.global_step - self.saved.steps_since_log
        trainer._total_loss_scalar = -mean  # `train_loss` at the end is the mean of the steps of this call


def use_settings(optimizer: Any, schedule: Any, own: list[dict[str, Any]]) -> None:
    """Let this run's learning rates, weight decay and the like replace those that a checkpoint's optimizer came with.

    Optimizer and schedule have loaded the checkpoint; `own` are the options of the groups before that, as flags say.

    Raises:
        ValueError: if the state can't be one of these parameters.
    """
    if schedule.optimizer is not optimizer:  # a schedule takes any attribute from its file
        raise ValueError("the schedule's state holds an optimizer")
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if not isinstance(value, (Tensor, int, float)):
                raise ValueError(f"the optimizer's {name} is {type(value).__name__}")
            if name in _SHAPED_AS_PARAMETER and getattr(value, "shape", None) != parameter.shape:
                raise ValueError(f"the optimizer's {name} is not of its parameter's shape {tuple(parameter.shape)}")
    for group, options in zip(optimizer.param_groups, own, strict=True):
        rate = group["lr"] / group["initial_lr"] * options["initial_lr"] if group.get("initial_lr") else options["lr"]
        group.update({name: options[name] for name in _OF_FLAGS if name in options}, lr=rate)
    if isinstance(schedule, LambdaLR):  # exactly: the schedule may be longer now, too
        schedule.base_lrs = [options["initial_lr"] for options in own]
        parts = zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
        schedule._last_lr = [base * share(schedule.last_epoch) for base, share in parts]
        for group, rate in zip(optimizer.param_groups, schedule._last_lr, strict=True):
            group["lr"] = rate
