"""A checkpoint's folder: the names of its files, and their checksums.

    adapter_config.json, adapter_model.safetensors   as PEFT writes them; names start at the language model
    projector.safetensors                            0.weight 0.bias [2.weight 2.bias]
    multimodal_config.json                           both base models, token counts, dtype, package versions
    checksums.json                                   SHA-256 of each file that loading reads

With `--train_only` there are no adapter files; `--train_only all` adds a folder `language_model`, a base model in the
layout of the one that training started from.

`checksums.json` is written last and checked first, so that a flipped bit or a file of another checkpoint is one error
and not other weights.
"""

from __future__ import annotations

import contextlib
import hashlib
import pickle
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PROJECTOR_WEIGHTS = "projector.safetensors"
MULTIMODAL_CONFIG = "multimodal_config.json"
CHECKSUMS = "checksums.json"
LANGUAGE_MODEL = "language_model"
TRAINED = {
    "lora": (ADAPTER_CONFIG, ADAPTER_WEIGHTS, PROJECTOR_WEIGHTS, MULTIMODAL_CONFIG),
    "projector": (PROJECTOR_WEIGHTS, MULTIMODAL_CONFIG),
    "all": (LANGUAGE_MODEL, PROJECTOR_WEIGHTS, MULTIMODAL_CONFIG),
}
"""The files (and the folder) that asking reads in addition to `checksums.json`, by what was trained."""
WEIGHTS = (*TRAINED["lora"], LANGUAGE_MODEL)
"""All of these names."""


class CheckpointError(ValueError):
    """A checkpoint folder that is incomplete, damaged, or does not fit the base models; every reader raises it."""


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn whatever goes wrong while a file is read into one `CheckpointError` that names it."""
    try:
        yield
    except (CheckpointError, MemoryError, torch.OutOfMemoryError):
        raise
    except pickle.UnpicklingError as error:  # its own text tells how to switch the protection off
        reason = "only tensors and numbers are read; anything else could run code, or the file is damaged"
        raise CheckpointError(f"{path}: can't be read: {reason}") from error
    except Exception as error:  # damaged bytes make a reader raise nearly anything
        text = re.sub(r":\n\s*", ": ", str(error).strip())  # a first line that ends so has its reason in the next
        reason = text.splitlines()[0] if text else type(error).__name__
        raise CheckpointError(f"{path}: can't be read: {reason}") from error


def numbered_checkpoints(run: Path) -> list[Path]:
    """Return the `checkpoint-N` folders of a run folder, complete or not, the newest first."""
    found = [path for path in run.iterdir() if re.fullmatch(r"checkpoint-\d+", path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]), reverse=True)


def with_contents(folder: Path, names: Iterable[str]) -> set[str]:
    """Return the names, that of a folder replaced by those of what is in it."""
    found = set(names)
    if LANGUAGE_MODEL in found:
        found.remove(LANGUAGE_MODEL)
        found |= {f"{LANGUAGE_MODEL}/{path.name}" for path in (folder / LANGUAGE_MODEL).iterdir()}
    return found


def sha256(path: Path) -> str:
    """Hash a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
