"""Delete what is no longer wanted: old checkpoints, a killed run's unfinished work, and a run that is overwritten.

A folder is renamed before it is deleted, so that a kill leaves no part of it under a name that means something.
"""

from __future__ import annotations

import contextlib
import logging
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..arguments import VLMTrainingArguments
from ..checkpoints.folder import CHECKSUMS, TRAINED, CheckpointError, numbered_checkpoints
from ..checkpoints.readers import weights_in
from .callbacks import (
    BAD_EVAL_SAMPLES,
    BAD_SAMPLES,
    CARD_MARK,
    LOSS_FIGURE,
    MODEL_CARD,
    RUN_CONFIG,
    first_problem,
)

logger = logging.getLogger(__name__)

OVERWRITTEN = "tmp-overwritten"
"""Folder for the files of a run that is overwritten. While it exists, the new run has not taken a step, and whatever
belongs to a run counts as the old one's, even if a kill left it in its place."""
REPLACED = "tmp-replaced-"
"""How the name of a folder begins while a new one takes its place."""
_DELETED = "tmp-deleted-"
_LEFTOVER = re.compile(
    r"tmp-(weights|deleted-run|(train_config\.json|loss\.png|MODEL_CARD\.md).*"
    r"|((replaced|deleted)-)?checkpoint-\d+(-\w{8})?)"
)


def remove(path: Path) -> None:
    """Delete a file, a link or a folder as far as that is possible."""
    if path.is_symlink() or path.is_file():
        with contextlib.suppress(OSError):
            path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def delete_old_checkpoints(run: Path, limit: int, keep: set[Path]) -> None:
    """Delete the oldest checkpoints of a run, so that at most `limit` remain.

    Args:
        run: the run's folder.
        limit: how many may remain, at least 1.
        keep: the newest one and the best one, which remain in any case.
    """
    kept = {path.resolve() for path in keep}
    folders = numbered_checkpoints(run)[::-1]
    others = sorted((path for path in folders if path.resolve() not in kept), key=lambda path: path.stat().st_mtime_ns)
    for path in others[: max(len(folders) - limit, 0)]:
        doomed = run / f"{_DELETED}{path.name}"
        remove(doomed)
        try:
            path.rename(doomed)
        except OSError as error:
            logger.warning("%s could not be deleted: %s", path, error)
        remove(doomed)


def clear_leftovers(run: Path) -> None:
    """Finish what a run was renaming when it was killed, and delete its other unfinished work."""
    for replaced in run.glob(f"{REPLACED}checkpoint-*"):
        target = run / replaced.name.removeprefix(REPLACED)
        if not target.exists():
            replaced.rename(target)
    for path in run.glob("tmp-*"):
        if _LEFTOVER.fullmatch(path.name):
            remove(path)
    if (run / OVERWRITTEN).exists():
        set_aside(run)


# ---- Runs that are overwritten


def is_overwriting(args: VLMTrainingArguments, resume: str | None) -> bool:
    """Return whether `--output_dir` holds another run, which is to be overwritten.

    Raises:
        CheckpointError: if there is a run that is neither resumed nor to be overwritten.
    """
    folder = Path(str(args.output_dir))
    weights = [folder / name for name in TRAINED["lora"] if (folder / name).exists()]  # one of them is in every kind
    old = [*numbered_checkpoints(folder), *weights] if folder.is_dir() else []
    if resume is None:
        continues = args.resume_from_checkpoint is not None  # `auto`, and no checkpoint yet
    else:
        continues = Path(resume).resolve().parent == folder.resolve()
    if old and not continues and not args.overwrite_output_dir:
        raise CheckpointError(
            f"--output_dir {folder} holds a run ({old[0].name}, …); resume it with --resume_from_checkpoint auto, "
            "delete it with --overwrite_output_dir, or give another folder"
        )
    return (bool(old) and not continues) or (folder / OVERWRITTEN).exists()


def set_aside(run: Path) -> None:
    """Move the files of a run into `OVERWRITTEN`; what is there already belongs to the same run and stays.

    Raises:
        OSError: if that is not possible.
    """
    aside = run / OVERWRITTEN
    if aside.is_symlink():  # of a stranger
        aside.unlink()
    aside.mkdir(exist_ok=True)
    for path in _of_run(run):
        if (aside / path.name).exists():
            remove(path)
        elif path.exists():
            path.rename(aside / path.name)


def _of_run(run: Path) -> list[Path]:
    names = (*TRAINED["lora"], *weights_in(run), CHECKSUMS, RUN_CONFIG, BAD_SAMPLES, BAD_EVAL_SAMPLES, "runs")
    return [*numbered_checkpoints(run), *(run / name for name in (*names, LOSS_FIGURE, MODEL_CARD))]


@contextlib.contextmanager
def overwriting(trainer: Any) -> Iterator[None]:
    """Set the old run in a `VLMTrainer`'s folder aside, and delete it after the first step.

    If the block ends before that step, the old run is put back, unless it was set aside by an earlier process.

    Raises:
        CheckpointError: if the new run's language model is one that the old run trained.
        OSError: if that is not possible.
    """
    args, aside = trainer.args, trainer.run_folder / OVERWRITTEN
    base = Path(trainer.model.base_language_model).resolve()
    if any(base.is_relative_to(path.resolve()) for path in _of_run(trainer.run_folder)):
        raise CheckpointError(
            f"--output_dir {trainer.run_folder} can't be overwritten: it holds the language model of this run, {base}; "
            "give another folder"
        )
    old_run = DeleteOldRun(aside)
    if args.process_index == 0:
        trainer.add_callback(old_run)
    if not args.overwrite_output_dir:
        logger.warning("%s holds a run that was to be overwritten; it is deleted after the first step", aside)
    try:
        problem = first_problem(lambda: set_aside(trainer.run_folder), args.process_index == 0)
        if problem:  # on every process, or the others would wait for this one
            raise OSError(problem)
        yield
    finally:
        if args.process_index == 0 and args.overwrite_output_dir and not old_run.is_deleted:
            put_back(trainer.run_folder)


class DeleteOldRun(TrainerCallback):
    """Deletes the files that were set aside once the new run has taken a step."""

    def __init__(self, aside: Path) -> None:
        self.aside = aside
        self.is_deleted = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Delete them after the first step."""
        if not self.is_deleted:
            doomed, card = self.aside.with_name(f"{_DELETED}run"), self.aside / MODEL_CARD
            remove(doomed)
            if card.is_file() and CARD_MARK.encode() not in card.read_bytes():  # somebody's work
                kept = self.aside.parent / f"edited-{time.strftime('%Y%m%d-%H%M%S')}-{MODEL_CARD}"
                card.rename(kept)
                logger.warning("the card of the run that is overwritten was edited; it is kept as %s", kept)
            self.aside.rename(doomed)
            self.is_deleted = True
            remove(doomed)


def put_back(run: Path) -> None:
    """Give the files of a run that was set aside their places back."""
    aside = run / OVERWRITTEN
    for path in aside.iterdir() if aside.is_dir() else ():
        remove(run / path.name)
        path.rename(run / path.name)
    with contextlib.suppress(OSError):  # it may not have been made
        aside.rmdir()
