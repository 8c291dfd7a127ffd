"""A run's folder: one run at a time, checkpoints that appear whole, and the flags that the run was started with.

Whatever is not (yet) a checkpoint is called `tmp-…`, which nobody takes for one. New files and folders are created
under names that did not exist, so that no link can lead out of the folder.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object

from dataprocess.file_lock import FileLockError, hold, replace_file

from ..arguments import DataArguments, ModelArguments, VLMTrainingArguments
from ..checkpoints.saving import PACKAGE_VERSIONS, flush_to_disk
from .callbacks import RUN_CONFIG
from .deleting import REPLACED, clear_leftovers, remove


@contextlib.contextmanager
def hold_run_folder(args: VLMTrainingArguments) -> Iterator[bool]:
    """Keep other runs out of `--output_dir` while the block runs, and clear away what a killed run left there.

    The first process holds the lock for all. After the launcher alone is killed, it goes on training and holding it.

    Yields:
        Whether there was nothing in the folder.

    Raises:
        FileLockError: on every process, if another run holds it.
    """
    folder = Path(str(args.output_dir))
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        with contextlib.ExitStack() as lock:
            problem, is_empty = "", True
            if args.process_index == 0:
                try:
                    folder.mkdir(parents=True, exist_ok=True)
                    lock.enter_context(hold(folder))
                    is_empty = {path.name for path in folder.iterdir()} == {".lock"}
                    if not is_empty:
                        clear_leftovers(folder)
                except (OSError, FileLockError) as error:
                    problem = f"--output_dir {error}"
            problem, is_empty = gather_object([(problem, is_empty)])[0]
            if problem:
                raise FileLockError(problem)
            yield is_empty
    finally:
        with contextlib.suppress(OSError):  # a run that was refused leaves no empty folder
            for path in new:
                path.rmdir()


def put_in_place(staging: Path, target: Path) -> None:
    """Give a finished folder its name, once all of it is on the disk.

    An older folder of that name (of the same step, saved twice or by an earlier try) stays until the new one has
    it. If the process is killed in between, `clear_leftovers` gives it its name back.
    """
    for path in [*staging.iterdir(), staging]:
        flush_to_disk(path)
    replaced = target.with_name(REPLACED + target.name)
    replaces = target.exists() or target.is_symlink()
    if replaces:
        remove(replaced)
        target.rename(replaced)
    try:
        staging.rename(target)
    except OSError:
        if replaces:
            replaced.rename(target)
        raise
    flush_to_disk(target.parent)
    if replaces:
        remove(replaced)


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


def write_run_config(run: Path, config: dict[str, Any]) -> None:
    """Write `train_config.json`."""
    run.mkdir(parents=True, exist_ok=True)
    replace_file(run / RUN_CONFIG, (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode())
