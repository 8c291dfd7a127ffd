"""A run's folder: checkpoints appear in it whole, are found again, and go one by one.

Whatever is not (yet) a checkpoint is called `tmp-…`, which nobody takes for one.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import zipfile
from pathlib import Path

from ..checkpoints.adapter_config import ADAPTER_CONFIG
from ..checkpoints.checkpoint import ADAPTER_WEIGHTS, PROJECTOR_WEIGHTS, RUN_STATE, flush_to_disk, numbered_checkpoints
from ..checkpoints.folders import MAX_JSON_BYTES, read_json
from ..checkpoints.multimodal_config import MULTIMODAL_CONFIG
from ..checkpoints.tensor_files import CheckpointError
from .run_state import SCHEDULER, TRAINER_STATE, RunState

logger = logging.getLogger(__name__)

_WEIGHTS = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, PROJECTOR_WEIGHTS, MULTIMODAL_CONFIG)
_STATE = (TRAINER_STATE, RUN_STATE, "optimizer.pt", SCHEDULER)
_REPLACED = "tmp-replaced-"
RESUME_COPY = "tmp-resume"
"""Copy of a checkpoint that stands for another step number, while a run goes on from it."""
_LEFTOVER = re.compile(r"tmp-(resume|weights|((replaced|deleted)-)?checkpoint-\d+)")


def lacks_to_resume(folder: Path) -> list[str]:
    """Names of the files without which training can't go on from a checkpoint, missing ones and damaged ones."""
    lacking = [name for name in (*_WEIGHTS, *_STATE) if not _is_whole(folder / name)]
    if RUN_STATE in lacking:
        return lacking
    try:
        processes = RunState.read(folder).geometry.num_processes
    except CheckpointError:
        return [*lacking, RUN_STATE]
    random = ["rng_state.pth"] if processes == 1 else [f"rng_state_{rank}.pth" for rank in range(processes)]
    return lacking + [name for name in random if not _is_whole(folder / name)]


def newest_resumable(run: Path) -> Path | None:
    """The checkpoint of a run folder that has come furthest, of those that training can go on from.

    Checkpoints that are passed over are logged.
    """
    for folder in numbered_checkpoints(run) if run.is_dir() else []:
        lacking = lacks_to_resume(folder)
        if not lacking:
            return folder
        logger.warning("%s is passed over: %s missing or damaged", folder, ", ".join(lacking))
    return None


def _is_whole(path: Path) -> bool:
    """Whether a file is there and not cut short, as far as that shows without reading all of it."""
    try:
        if not path.is_file():
            return False
        if path.suffix == ".json":
            read_json(path)
            return True
        if path.suffix == ".safetensors":
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if length > min(path.stat().st_size, MAX_JSON_BYTES):
                    return False
                header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            return path.stat().st_size == 8 + length + max(ends, default=0)
        return zipfile.is_zipfile(path)  # PyTorch's; the directory of a zip file stands at its end
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return False


def put_in_place(staging: Path, target: Path) -> None:
    """Give a finished folder its name, once all of it is on the disk.

    What had the name (a checkpoint of the same step, saved twice or by an earlier try) stays until the new one has
    it. If the process is killed in between, `restore_replaced` gives it its name back.
    """
    for path in [*staging.iterdir(), staging]:
        flush_to_disk(path)
    replaced = target.with_name(_REPLACED + target.name)
    if target.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        target.rename(replaced)
    try:
        staging.rename(target)
    except OSError:
        if replaced.exists():
            replaced.rename(target)
        raise
    flush_to_disk(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def restore_replaced(run: Path) -> None:
    """Mend what a kill in `put_in_place` left; every process may call it."""
    for replaced in run.glob(f"{_REPLACED}checkpoint-*"):
        target = run / replaced.name.removeprefix(_REPLACED)
        if not target.exists():
            try:
                replaced.rename(target)
            except OSError as error:  # another process was faster, or the file system is at fault
                if not target.exists():
                    logger.warning("%s could not be renamed to %s: %s", replaced, target.name, error)


def leftovers(run: Path) -> list[Path]:
    """What a run that was killed has left of unfinished work; nothing that `restore_replaced` still has to mend."""
    found = [path for path in run.glob("tmp-*") if _LEFTOVER.fullmatch(path.name)]
    return [
        path
        for path in found
        if not path.name.startswith(_REPLACED) or (run / path.name.removeprefix(_REPLACED)).exists()
    ]


def delete_old_checkpoints(run: Path, limit: int | None, keep: set[Path]) -> None:
    """Delete the oldest checkpoints of a run, so that at most `limit` stay; those to keep do in any case.

    Args:
        run: the run's folder.
        limit: how many may stay; None or 0: all of them.
        keep: the one that was just written, and the best one.
    """
    if not limit or limit < 0:
        return
    kept = {path.resolve() for path in keep}
    folders = numbered_checkpoints(run)
    others = [path for path in folders if path.resolve() not in kept]
    # Those that training can't go on from are the first to go, whatever their age.
    others.sort(key=lambda path: (not lacks_to_resume(path), path.stat().st_mtime_ns, -folders.index(path)))
    for path in others[: max(len(folders) - limit, 0)]:
        doomed = run / f"tmp-deleted-{path.name}"  # or a kill in here would leave part of a checkpoint
        shutil.rmtree(doomed, ignore_errors=True)
        try:
            path.rename(doomed)
        except OSError as error:
            logger.warning("%s could not be deleted: %s", path, error)
        shutil.rmtree(doomed, ignore_errors=True)


def files_of_a_run(folder: Path) -> list[Path]:
    """Checkpoints and final weights that a run has written into a folder."""
    if not folder.is_dir():
        return []
    return [*numbered_checkpoints(folder), *(folder / name for name in _WEIGHTS if (folder / name).is_file())]
