"""Read a checkpoint's files: what was written, and nothing that could run.

`checksums.json` holds the SHA-256 of every file that loading reads. It is written last and checked first, so that a
flipped bit or a file of another checkpoint is one error here and not other weights later.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import pickle
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

logger = logging.getLogger(__name__)

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
    sums |= {name: _sha256(folder / name) for name in names}
    path.write_text(json.dumps(sums, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def check_checksums(folder: Path, names: Iterable[str], *, everything: bool = False) -> None:
    """Check files against `checksums.json`. Folders written before it existed are read unchecked, with a warning.

    Args:
        folder: the checkpoint.
        names: the files that are about to be read.
        everything: whether all that `checksums.json` lists is read too.

    Raises:
        CheckpointError: if a file is missing, is none, or is not the one that was written.
    """
    names = set(names)
    has_sums = os.path.lexists(folder / CHECKSUMS)
    sums = read_json(folder / CHECKSUMS) if has_sums else {}
    if everything:
        names |= sums.keys()
    for name in sorted(names):
        check_file(folder / name)
    if not has_sums:
        logger.warning("%s has no %s, as older versions wrote it: it is read unchecked", folder, CHECKSUMS)
        return
    with reading(folder):
        wrong = [name for name in sorted(names) if sums.get(name) != _sha256(folder / name)]
    if wrong:
        raise CheckpointError(
            f"checkpoint {folder}: not what was written, by {CHECKSUMS}: {', '.join(wrong)} (damaged, or from another "
            "checkpoint); copy the checkpoint again, or use another one"
        )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# ---- Tensors


def check_weights(expected: dict[str, Tensor], found: dict[str, Tensor], what: str, likely: str) -> None:
    """Compare the tensors of a file with the names and shapes that a model needs.

    Args:
        expected: the model's own tensors.
        found: those of the file; they must be finite.
        what: what they are called in the message.
        likely: what most likely differs, if they do not fit.

    Raises:
        CheckpointError: with the first few differences.
    """
    problems = [f"missing {name}" for name in expected.keys() - found.keys()]
    problems += [f"unexpected {name}" for name in found.keys() - expected.keys()]
    for name in expected.keys() & found.keys():
        if expected[name].shape != found[name].shape:
            problems.append(f"{name} is {tuple(found[name].shape)}, expected {tuple(expected[name].shape)}")
        elif not found[name].is_floating_point():
            problems.append(f"{name} is {found[name].dtype}, expected floating point")
        elif not found[name].isfinite().all():
            problems.append(f"{name} holds values that are not finite")
    if problems:
        shown = "; ".join(sorted(problems)[:4])
        more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise CheckpointError(f"{what} does not fit (was it trained for {likely}?): {shown}{more}")


def flush_to_disk(path: Path) -> None:
    """Return when a file, or a folder's list of names, is on the disk and not only on its way there."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
