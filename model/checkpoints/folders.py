"""Checkpoint folders that somebody else may have written: no path leads out of them, and small files are small."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from .tensor_files import CheckpointError

MAX_JSON_BYTES = 64 << 20
"""Larger JSON files (in bytes) are refused unread: a checkpoint's own have some kilobytes, a long run's log some MB."""


def check_inside(folder: Path) -> None:
    """See to it that all of a checkpoint folder lies in it. Checkpoints inside a run folder are left to their own turn.

    Args:
        folder: a checkpoint or a run folder; it may itself be a link.

    Raises:
        CheckpointError: a link in it leads out of it, or it holds a pipe, a socket or a device.
    """
    root = folder.resolve()
    for parent, folders, files in os.walk(root):
        if Path(parent) == root:
            folders[:] = [name for name in folders if not re.fullmatch(r"(tmp-)?checkpoint-\d+", name)]
        for name in [*folders, *files]:
            path = Path(parent, name)
            real = path.resolve()
            if path.is_symlink() and not real.is_relative_to(root):
                raise CheckpointError(
                    f"checkpoint {folder}: {path.relative_to(root)} is a link that leads out of it, to {real}; such "
                    "links are not followed: if you trust it, make a copy with `cp -rL` and use that"
                )
            if path.exists() and not path.is_file() and not path.is_dir():
                raise CheckpointError(f"checkpoint {folder}: {path.relative_to(root)} is not a regular file; remove it")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: if it can't be read, is none, or is larger than `MAX_JSON_BYTES`.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"it has {path.stat().st_size:,} bytes, expected at most {MAX_JSON_BYTES:,}")
        values = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise CheckpointError(f"{path}: can't be read as JSON: it is nested too deeply") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: can't be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: a JSON object is expected, got {type(values).__name__}")
    return values
