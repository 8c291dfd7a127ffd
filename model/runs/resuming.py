"""Find what a run resumes from, and what is in the way of a new one."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerState

from ..arguments import VLMTrainingArguments
from ..checkpoints.checkpoint import WEIGHTS, numbered_checkpoints
from ..checkpoints.tensor_files import CHECKSUMS, CheckpointError, check_checksums, read_json, reading
from .callbacks import BAD_EVAL_SAMPLES, BAD_SAMPLES
from .collectives import gather_objects
from .run_folder import RUN_CONFIG, files_of_a_run
from .run_state import FROM_WEIGHTS, RUN_STATE, TRAINER_STATE, RunState, check_same_steps

logger = logging.getLogger(__name__)

_STATE = (TRAINER_STATE, RUN_STATE, "optimizer.pt", "scheduler.pt")
_OF_FLAGS = ("lr", "initial_lr", "weight_decay", "betas", "eps")
"""Options of an optimizer's groups that flags decide."""
_SHAPED_AS_PARAMETER = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")


def files_in_the_way(args: VLMTrainingArguments, resume: str | None) -> list[Path]:
    """Return the files of another run in `--output_dir`, which are to be overwritten.

    Raises:
        CheckpointError: if there is a run that is neither resumed nor to be overwritten.
    """
    folder = Path(str(args.output_dir))
    if args.resume_from_checkpoint is not None and args.overwrite_output_dir:
        raise CheckpointError(
            f"--resume_from_checkpoint {args.resume_from_checkpoint} continues a run and --overwrite_output_dir "
            "deletes it; give one of them"
        )
    old = files_of_a_run(folder)
    if resume is None:
        continues = args.resume_from_checkpoint is not None  # `auto`, and no checkpoint yet
    else:
        continues = Path(resume).resolve().parent == folder.resolve()
    if not old or continues:
        return []
    if not args.overwrite_output_dir:
        raise CheckpointError(
            f"--output_dir {folder} holds a run ({old[0].name}, …); resume it with --resume_from_checkpoint auto, "
            "delete it with --overwrite_output_dir, or give another folder"
        )
    others = (CHECKSUMS, RUN_CONFIG, BAD_SAMPLES, BAD_EVAL_SAMPLES, "runs")
    return [*old, *(path for name in others if (path := folder / name).exists())]


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
    automatic = wanted.lower() in ("auto", "true")
    folder = Path(str(args.output_dir if automatic else wanted))
    if not folder.is_dir():
        if wanted.lower() == "auto":
            return None
        raise CheckpointError(f"--resume_from_checkpoint {folder}: no such folder; give a checkpoint or a run folder")
    found = newest_resumable(folder)
    if len(set(gather_objects(None if found is None else found.name))) > 1:
        raise CheckpointError(f"the processes see different checkpoints in {folder}; it must be a folder they share")
    if found is None and wanted.lower() == "auto":
        return None
    if found is None:
        found = folder
        check_resumable(folder)
    check_same_steps(RunState.read(found), args, found)
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
    missing = [name for name in (*WEIGHTS, *_STATE) if not (folder / name).exists()]
    if missing:
        raise CheckpointError(
            f"--resume_from_checkpoint {folder}: {', '.join(missing)} missing, so training can't be resumed from it; "
            f"if it holds weights, {FROM_WEIGHTS}"
        )
    optional = [path.name for pattern in ("scaler.pt", "rng_state*.pth") for path in folder.glob(pattern)]
    check_checksums(folder, (*WEIGHTS, *_STATE, *optional), everything=True)
    RunState.read(folder)
    with reading(folder / TRAINER_STATE):
        state = TrainerState(**read_json(folder / TRAINER_STATE))
        if not isinstance(state.log_history, list) or not isinstance(state.stateful_callbacks, dict):
            raise ValueError("log_history or stateful_callbacks are not of their type")


# ---- Flags that take effect on resuming


def use_settings(optimizer: Any, schedule: Any, own: list[dict[str, Any]]) -> None:
    """Let this run's learning rates, weight decay and the like replace those that a checkpoint's optimizer came with.

    Args:
        optimizer: with the checkpoint's state loaded.
        schedule: likewise.
        own: the options of the optimizer's groups before that, as the flags say.

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
