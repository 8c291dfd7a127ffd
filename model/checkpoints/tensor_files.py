"""Read a checkpoint's files: what was written, and nothing that could run.

`checksums.json` holds the SHA-256 of every file that loading reads. It is written last and checked first, so that a
flipped bit or a file of another checkpoint is one error here and not other weights later.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import re
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

CHECKSUMS = "checksums.json"
_MAX_JSON_BYTES = 64 << 20
"""Larger JSON files are refused unread: a checkpoint's own have some kilobytes, a long run's log some megabytes."""


class CheckpointError(ValueError):
    """A checkpoint folder that is incomplete, damaged, or does not fit the base models."""


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn whatever goes wrong while a file is read into one error that names it.

    Raises:
        CheckpointError: if the block fails, unless memory ran out.
    """
    try:
        yield
    except (CheckpointError, MemoryError, torch.OutOfMemoryError):
        raise
    except pickle.UnpicklingError as error:  # its own text tells how to switch the protection off
        reason = "only tensors and numbers are read; anything else could run code, or the file is damaged"
        raise CheckpointError(f"{path}: can't be read: {reason}") from error
    except Exception as error:  # damaged bytes make a reader raise nearly anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: can't be read: {reason}") from error


def check_file(path: Path) -> None:
    """Refuse what is missing, leads out of its folder, or could block or fill the memory of whoever reads it.

    Raises:
        CheckpointError: if it is no regular file inside its folder, or a compressed archive.
    """
    with reading(path):
        if path.is_symlink() and not path.resolve().is_relative_to(path.parent.resolve()):
            raise ValueError(f"a link that leads out of its folder, to {path.resolve()}; copy the folder with `cp -rL`")
        if not path.is_file():
            raise ValueError("not a regular file" if path.exists() else "missing")
        if path.suffix in (".pt", ".pth", ".bin") and zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:  # PyTorch's own are never compressed
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                    raise ValueError("a compressed archive, which may unpack to more than fits the memory")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: if it can't be read, is no object, or is larger than 64 MiB.
    """
    check_file(path)
    with reading(path):
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ValueError(f"{path.stat().st_size:,} bytes, expected at most {_MAX_JSON_BYTES:,}")
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"expected a JSON object, got {type(values).__name__}")
    return values


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a checkpoint's `.safetensors` file, or a PyTorch file of which no pickle is executed.

    Raises:
        CheckpointError: if it can't be read, or holds anything but tensors and their names.
    """
    check_file(path)
    return map_tensors(path)


def map_tensors(path: Path) -> dict[str, Tensor]:
    """Do so wherever the file is stored (the hub's cache consists of links); tensors are mapped where possible."""
    with reading(path):
        if path.suffix == ".safetensors":
            return load_file(path)
        values = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        if not isinstance(values, dict) or not all(
            isinstance(name, str) and isinstance(value, Tensor) for name, value in values.items()
        ):
            raise ValueError("expected names and tensors, got something else")
    return values


# ---- Checksums


def write_checksums(folder: Path, names: Iterable[str]) -> None:
    """Add files to a folder's `checksums.json`, which is written anew.

    Raises:
        OSError: if it can't be written.
    """
    path = folder / CHECKSUMS
    sums = read_json(path) if path.exists() else {}
    sums |= {name: sha256(folder / name) for name in names}
    path.write_text(json.dumps(sums, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def sha256(path: Path) -> str:
    """Hash a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def flush_to_disk(path: Path) -> None:
    """Return when a file, or a folder's list of names, is on the disk and not only on its way there."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def numbered_checkpoints(run: Path) -> list[Path]:
    """Return the `checkpoint-N` folders of a run folder, complete or not, the newest first."""
    found = [path for path in run.iterdir() if re.fullmatch(r"checkpoint-\d+", path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]), reverse=True)
