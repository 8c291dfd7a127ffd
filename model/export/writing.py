"""An export's folder: written under another name, and given its own when all is in it."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from dataprocess.file_lock import hold

from ..checkpoints.saving import flush_to_disk

UNFINISHED = ".unfinished-export"


@contextlib.contextmanager
def new_folder(output: Path, keep_on: type[Exception]) -> Iterator[Path]:
    """Give the block an empty folder, which gets its name when the block is done.

    A process that is killed leaves `NAME.unfinished-export`, which the next export to the same place removes.

    Args:
        output: the name; there may be an empty folder.
        keep_on: an error after which the folder stays under its other name, to be looked at.

    Raises:
        ValueError: if there are files already, or another process is writing there.
        OSError: if the folder can't be made.
    """
    check_output(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    part = output.with_name(f"{output.name}{UNFINISHED}")
    with hold(part.with_name(f"{output.name}.export")):  # the lock is a file next to it
        if part.is_symlink() or part.is_file():
            raise ValueError(f"{part}: no folder, but the export is written there first; delete it")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        try:
            yield part
        except BaseException as error:
            if not isinstance(error, keep_on):
                shutil.rmtree(part, ignore_errors=True)
            raise
        check_output(output)
        part.replace(output)
        flush_to_disk(output.parent)


def check_output(output: Path) -> None:
    """Refuse to overwrite.

    Raises:
        ValueError: if the folder's name is taken.
    """
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise ValueError(
            f"--output {output}: there is a file or a link of this name; give a folder that is not there yet"
        )
    if output.is_dir() and any(output.iterdir()):
        raise ValueError(
            f"--output {output}: the folder has files already; give one that is not there yet, or delete it"
        )
