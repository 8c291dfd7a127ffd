"""Where a run stands before its first step: what it goes on from, and what is in its way."""

from __future__ import annotations

import logging
from pathlib import Path

from dataprocess.messages import format_count

from ..arguments import DataArguments, VLMTrainingArguments
from ..checkpoints.checkpoint import numbered_checkpoints
from ..checkpoints.folders import read_json
from ..checkpoints.tensor_files import CheckpointError
from .collectives import gather_objects
from .run_folder import files_of_a_run, lacks_to_resume, newest_resumable, restore_replaced

logger = logging.getLogger(__name__)


def files_in_the_way(args: VLMTrainingArguments, resume: str | None) -> list[Path]:
    """What is in the way of a new run: the files of another one in `--output_dir`, which are to be overwritten.

    Raises:
        CheckpointError: if there are any that are neither gone on from nor to be overwritten.
    """
    folder = Path(str(args.output_dir))
    if args.resume_from_checkpoint is not None and args.overwrite_output_dir:
        raise CheckpointError(
            f"--resume_from_checkpoint {args.resume_from_checkpoint} goes on with a run and --overwrite_output_dir "
            "deletes it; give one of them"
        )
    old = files_of_a_run(folder)
    if resume is None:
        goes_on = args.resume_from_checkpoint is not None  # `auto`, and nothing to go on from
    else:
        goes_on = Path(resume).resolve().parent == folder.resolve()
    if not old or goes_on:
        return []
    if not args.overwrite_output_dir:
        raise CheckpointError(
            f"--output_dir {folder} holds a run ({old[0].name}, …); go on with it by --resume_from_checkpoint auto, "
            "delete it by --overwrite_output_dir, or give another folder"
        )
    return old


def checkpoint_to_resume(args: VLMTrainingArguments) -> str | None:
    """The checkpoint that `--resume_from_checkpoint` means: a checkpoint, or the newest complete one of a run folder.

    `auto` is the newest one of `--output_dir`, or None if there is none yet; `true`, as transformers has it, insists.

    Raises:
        CheckpointError: if there is none, or training can't go on from it.
    """
    wanted = args.resume_from_checkpoint
    if wanted is None:
        return None
    automatic = wanted.lower() in ("auto", "true")
    folder = Path(str(args.output_dir if automatic else wanted))
    restore_replaced(folder)
    found = newest_resumable(folder)
    if len(set(gather_objects(None if found is None else found.name))) > 1:
        raise CheckpointError(f"the processes see different checkpoints in {folder}; it must be a folder they share")
    if found is not None or wanted.lower() == "auto":
        return None if found is None else str(found)
    if not folder.is_dir():
        raise CheckpointError(f"--resume_from_checkpoint {folder}: no such folder; give a checkpoint or a run folder")
    lacking = lacks_to_resume(folder)
    if lacking:
        inside = numbered_checkpoints(folder)
        what = (
            f"its {format_count(len(inside), 'checkpoint is', 'checkpoints are')} not complete"
            if inside
            else f"no {', no '.join(lacking)}"
        )
        raise CheckpointError(
            f"--resume_from_checkpoint {folder}: {what}, so training can't go on from it; if it holds weights, start "
            "anew from them with --previous_lora_weights"
        )
    return str(folder)


def say_how_features_differ(config: Path, asked: DataArguments) -> None:
    """Log where a run that goes on gets features of images that are rounded otherwise than before.

    Args:
        config: what the run was last begun with, as train.py writes it; nothing is said if it can't be read.
        asked: the flags now.
    """
    try:
        before = read_json(config)["data"]
        was = _stored_in(before["feature_cache"], before["feature_cache_dtype"])
    except (OSError, ValueError, KeyError, TypeError):
        return
    now = _stored_in(asked.feature_cache, asked.feature_cache_dtype)
    if was != now:
        logger.warning("features of images are %s now, they were %s: losses differ by that rounding", now, was)


def _stored_in(cache: str | None, dtype: str) -> str:
    return "as the tower gives them" if cache is None else f"stored in {dtype}"
