"""A run's folder: one run at a time, checkpoints that appear whole, and the flags that the run was started with.

Whatever is not (yet) a checkpoint is called `tmp-…`, which nobody takes for one. New files and folders are created
under names that did not exist, so that no link can lead out of the folder.
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object

from dataprocess.file_lock import FileLockError, hold

from ..arguments import DataArguments, ModelArguments, VLMTrainingArguments
from ..checkpoints.folder import TRAINED, CheckpointError, numbered_checkpoints
from ..checkpoints.saving import PACKAGE_VERSIONS, flush_to_disk
from .callbacks import RUN_CONFIG
from .deleting import OVERWRITTEN, remove, set_aside

_REPLACED = "tmp-replaced-"
_LEFTOVER = re.compile(
    r"tmp-(weights|deleted-run|(train_config\.json|loss\.png|MODEL_CARD\.md).*"
    r"|((replaced|deleted)-)?checkpoint-\d+(-\w{8})?)"
)


@contextlib.contextmanager
def hold_run_folder(args: VLMTrainingArguments) -> Iterator[None]:
    """Keep other runs out of `--output_dir` while the block runs, and clear away what a killed run left there.

    The first process holds the lock for all. After the launcher alone is killed, it goes on training and holding it.

    Raises:
        FileLockError: on every process, if another run holds it.
    """
    folder = Path(str(args.output_dir))
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        with contextlib.ExitStack() as lock:
            problem = ""
            if args.process_index == 0:
                try:
                    folder.mkdir(parents=True, exist_ok=True)
                    lock.enter_context(hold(folder))
                    clear_leftovers(folder)
                except (OSError, FileLockError) as error:
                    problem = f"--output_dir {error}"
            if problem := gather_object([problem])[0]:
                raise FileLockError(problem)
            yield
    finally:
        with contextlib.suppress(OSError):  # a run that was refused leaves no empty folder
            for path in new:
                path.rmdir()


def clear_leftovers(run: Path) -> None:
    """Finish what a run was renaming when it was killed, and delete its other unfinished work."""
    for replaced in run.glob(f"{_REPLACED}checkpoint-*"):
        target = run / replaced.name.removeprefix(_REPLACED)
        if not target.exists():
            replaced.rename(target)
    for path in run.glob("tmp-*"):
        if _LEFTOVER.fullmatch(path.name):
            remove(path)
    if (run / OVERWRITTEN).exists():
        set_aside(run)


def put_in_place(staging: Path, target: Path) -> None:
    """Give a finished folder its name, once all of it is on the disk.

    An older folder of that name (of the same step, saved twice or by an earlier try) stays until the new one has
    it. If the process is killed in between, `clear_leftovers` gives it its name back.
    """
    for path in [*staging.iterdir(), staging]:
        flush_to_disk(path)
    replaced = target.with_name(_REPLACED + target.name)
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


def is_overwriting(args: VLMTrainingArguments, resume: str | None) -> bool:
    """Return whether `--output_dir` holds another run, which is to be overwritten.

    Raises:
        CheckpointError: if there is a run that is neither resumed nor to be overwritten.
    """
    folder = Path(str(args.output_dir))
    if args.resume_from_checkpoint is not None and args.overwrite_output_dir:
        raise CheckpointError(
            f"--resume_from_checkpoint {args.resume_from_checkpoint} continues a run and --overwrite_output_dir "
            "deletes it; give one of them"
        )
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


def replace_file(path: Path, content: bytes) -> None:
    """Write a file of a run, which may be a link, under another name and rename it."""
    whole = path.with_name(f"tmp-{path.name}-{secrets.token_hex(4)}")
    with whole.open("xb") as file:
        file.write(content)
    whole.replace(path)
