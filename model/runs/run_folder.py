"""A run's folder: one run at a time, checkpoints that appear whole, and nothing of an overwritten run.

Whatever is not (yet) a checkpoint is called `tmp-…`, which nobody takes for one. New files and folders are created
under names that did not exist, so that no link can lead out of the folder.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dataprocess.file_lock import FileLockError, hold

from ..arguments import DataArguments, ModelArguments, VLMTrainingArguments
from ..checkpoints.folder import CHECKSUMS, WEIGHTS, CheckpointError, numbered_checkpoints
from ..checkpoints.saving import PACKAGE_VERSIONS, flush_to_disk
from .callbacks import BAD_EVAL_SAMPLES, BAD_SAMPLES, first_problem

logger = logging.getLogger(__name__)

RUN_CONFIG = "train_config.json"
_REPLACED = "tmp-replaced-"
_OVERWRITTEN = "tmp-overwritten"
_LEFTOVER = re.compile(
    r"tmp-(weights|resume|((replaced|deleted)-)?checkpoint-\d+(-\w{8})?|train_config\.json(-\w{8})?)"
)


@contextlib.contextmanager
def hold_run_folder(args: VLMTrainingArguments) -> Iterator[None]:
    """Keep other runs out of `--output_dir` while the block runs, and clear away what a killed run left there.

    The first process holds the lock for all. After the launcher alone is killed, it goes on training and holding it.

    Raises:
        FileLockError: on every process, if another run holds it.
    """
    folder = Path(str(args.output_dir))
    with contextlib.ExitStack() as lock:

        def take() -> None:
            lock.callback(_remove_empty, [path for path in (folder, *folder.parents) if not path.exists()])
            folder.mkdir(parents=True, exist_ok=True)
            try:
                lock.enter_context(hold(folder))
            except FileLockError as error:
                raise OSError(str(error)) from error
            clear_leftovers(folder)

        problem = first_problem(take if args.process_index == 0 else list)
        if problem:
            raise FileLockError(f"--output_dir {problem}")
        yield


def _remove_empty(folders: list[Path]) -> None:
    """Remove the folders that were created for a run which was refused."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


# ---- Checkpoints


def put_in_place(staging: Path, target: Path) -> None:
    """Give a finished folder its name, once all of it is on the disk.

    An older folder of that name (of the same step, saved twice or by an earlier try) stays until the new one has
    it. If the process is killed in between, `clear_leftovers` gives it its name back.
    """
    for path in [*staging.iterdir(), staging]:
        flush_to_disk(path)
    replaced = target.with_name(_REPLACED + target.name)
    if target.exists() or target.is_symlink():
        remove(replaced)
        target.rename(replaced)
    try:
        staging.rename(target)
    except OSError:
        if replaced.exists():
            replaced.rename(target)
        raise
    flush_to_disk(target.parent)
    remove(replaced)


def clear_leftovers(run: Path) -> None:
    """Restore the checkpoint that a run was replacing when it was killed, and delete its other unfinished work."""
    for replaced in run.glob(f"{_REPLACED}checkpoint-*"):
        target = run / replaced.name.removeprefix(_REPLACED)
        if not target.exists():
            replaced.rename(target)
    for path in run.glob("tmp-*"):
        if _LEFTOVER.fullmatch(path.name):
            remove(path)


def delete_old_checkpoints(run: Path, limit: int | None, keep: set[Path]) -> None:
    """Delete the oldest checkpoints of a run, so that at most `limit` remain.

    Args:
        run: the run's folder.
        limit: how many may remain; None or 0: all of them.
        keep: the newest one and the best one, which remain in any case.
    """
    if not limit or limit < 0:
        return
    kept = {path.resolve() for path in keep}
    folders = numbered_checkpoints(run)[::-1]
    others = sorted((path for path in folders if path.resolve() not in kept), key=lambda path: path.stat().st_mtime_ns)
    for path in others[: max(len(folders) - limit, 0)]:
        doomed = run / f"tmp-deleted-{path.name}"  # or a kill in here would leave part of a checkpoint
        remove(doomed)
        try:
            path.rename(doomed)
        except OSError as error:
            logger.warning("%s could not be deleted: %s", path, error)
        remove(doomed)


def remove(path: Path) -> None:
    """Delete a file, a link or a folder as far as that is possible."""
    if path.is_symlink() or path.is_file():
        with contextlib.suppress(OSError):
            path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


# ---- The run as a whole


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
    weights = (folder / name for name in WEIGHTS if (folder / name).is_file())
    old = [*numbered_checkpoints(folder), *weights] if folder.is_dir() else []
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


def run_config(model_args: ModelArguments, data_args: DataArguments, args: VLMTrainingArguments) -> dict[str, Any]:
    """Return every flag as it was understood, for `train_config.json`."""
    resolved = {
        "model": asdict(model_args),
        "data": asdict(data_args),
        "training": args.to_dict(),
        "package_versions": PACKAGE_VERSIONS,
    }
    values: dict[str, Any] = json.loads(json.dumps(resolved, default=str))
    return values


class RunFiles(TrainerCallback):
    """Writes `train_config.json` when a run begins, and takes an overwritten run's files away once it has begun.

    They are set aside before the first step and deleted after it; if the run fails before, they are put back.

    Args:
        folder: the output folder.
        config: every flag as it was understood; None: nothing is written.
        overwritten: the files of the run that is overwritten.
    """

    def __init__(self, folder: Path, config: dict[str, Any] | None, overwritten: Sequence[Path]) -> None:
        self.folder = folder
        self.config = config
        self.overwritten = overwritten
        self._aside = folder / _OVERWRITTEN
        self._has_begun = False

    def begin(self) -> None:
        """Set the old run aside, and write the configuration.

        Raises:
            OSError: if that is not possible.
        """
        if self.overwritten:
            remove(self._aside)
            self._aside.mkdir()
            for path in self.overwritten:
                path.rename(self._aside / path.name)
        elif self._aside.exists():
            logger.warning("%s holds a run that was to be overwritten; it is deleted after the first step", self._aside)
        if self.config is not None:
            text = json.dumps(self.config, indent=2, ensure_ascii=False) + "\n"
            whole = self.folder / f"tmp-{RUN_CONFIG}-{secrets.token_hex(4)}"
            self.folder.mkdir(parents=True, exist_ok=True)
            with whole.open("x", encoding="utf-8") as file:
                file.write(text)
            whole.replace(self.folder / RUN_CONFIG)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Delete the old run after the first step."""
        if not self._has_begun and args.process_index == 0:
            remove(self._aside)
        self._has_begun = True

    def end(self) -> None:
        """Put the old run back if the new one has not taken a step."""
        for path in self.overwritten if not self._has_begun else ():
            if (self._aside / path.name).exists():
                remove(path)
                (self._aside / path.name).rename(path)
        with contextlib.suppress(OSError):
            self._aside.rmdir()
