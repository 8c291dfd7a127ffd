"""Read a checkpoint's files as a stranger's: nothing in them is run, leads elsewhere, blocks, or fills the memory.

Whatever can't be read or is something else is one `CheckpointError` that names the file.

PEFT's configuration can name modules to import, models to download and patterns that take forever to match. Four keys
of `adapter_config.json` are read; a key that would change what they mean is refused.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle
import re
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor

from dataprocess.messages import shorten

from .folder import (
    ADAPTER_CONFIG,
    CHECKSUMS,
    LANGUAGE_MODEL,
    MULTIMODAL_CONFIG,
    PROJECTOR_WEIGHTS,
    TRAINED,
    CheckpointError,
    sha256,
    with_contents,
)

logger = logging.getLogger(__name__)

_MAX_JSON_BYTES = 64 << 20
"""Larger JSON files are refused unread: a checkpoint's own have some kilobytes, a long run's log some megabytes."""
_CHANGES_NO_NUMBER = {
    *("task_type", "inference_mode", "init_lora_weights", "base_model_name_or_path", "auto_mapping"),
    *("revision", "peft_version"),
}


@dataclass(frozen=True)
class MultimodalConfig:
    """What a checkpoint was trained on: enough to build the model again and to see what does not fit."""

    base_language_model: str  # hub name or absolute path
    base_value_model: str  # hub name or absolute path of the vision tower
    vision_tower: str  # the tower's `model_type`
    num_image_tokens: int  # tokens that one image takes in the prompt
    vision_hidden_size: int  # channels of a patch feature
    language_hidden_size: int  # channels of the language model's embedding
    vocab_size: int  # rows of the language model's embedding
    projector_layers: int  # 1 or 2
    vision_tower_fingerprint: str  # of its weights and of how it prepares images; empty: not known
    language_model_fingerprint: str  # of its weights and settings; empty: not known
    drop_first_patch: bool  # whether SigLIP's first patch is left out, as the original project did
    dtype: str  # of the frozen weights while training, as in `bfloat16`
    package_versions: dict[str, str]  # of the packages that trained it
    pixel_shuffle: int = 1  # side of the block of patches that is one token
    vision_feature_layer: int = -1  # the tower's hidden state that features are, counted from the end
    train_only: str = "lora"  # lora (and the projector), projector, or all


OPTIONAL = {"pixel_shuffle": 1, "vision_feature_layer": -1, "train_only": "lora"}
"""What `multimodal_config.json` leaves out where it has this value: files stay as they were before it existed."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder, its configuration files read."""

    folder: Path
    config: MultimodalConfig | None  # None for folders of the original project
    lora_config: LoraConfig | None  # rank, alpha, dropout and target modules; None where no LoRA was trained
    projector_layers: int  # 1 or 2
    pixel_shuffle: int = 1
    train_only: str = "lora"  # what was trained: lora (and the projector), projector, or all

    @property
    def language_model(self) -> str:
        """Return the path of the language model, which only a checkpoint of `--train_only all` has."""
        return str(self.folder / LANGUAGE_MODEL)


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


def check_file(path: Path, folder: Path | None = None) -> None:
    """Refuse what is missing, or could block or fill the memory of whoever reads it, or a link out of its folder.

    `folder` is the checkpoint that the file is somewhere in, if that is not the folder that it is in.
    """
    with reading(path):
        if not path.resolve().is_relative_to((folder or path.parent).resolve()):
            raise ValueError(f"a link that leads out of its folder, to {path.resolve()}; copy the folder with `cp -rL`")
        if not path.is_file():
            raise ValueError("not a regular file" if path.exists() else "missing")
        if path.suffix in (".pt", ".pth", ".bin") and zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:  # PyTorch's own are never compressed
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                    raise ValueError("a compressed archive, which may unpack to more than fits the memory")


def check_checksums(folder: Path, names: Iterable[str], *, everything: bool = False) -> None:
    """Check files that are about to be read against `checksums.json`; `everything` adds all that it lists.

    Folders written before it existed are read unchecked, with a warning; none of them has a `train_only`.
    """
    has_sums = os.path.lexists(folder / CHECKSUMS)
    if not has_sums and "train_only" in read_json(folder / MULTIMODAL_CONFIG):
        raise CheckpointError(f"{folder / CHECKSUMS}: missing, --train_only writes it; copy the checkpoint again")
    sums = read_json(folder / CHECKSUMS) if has_sums else {}
    listed = {name for name in sums if everything or name.partition("/")[0] in names}
    with reading(folder):
        names = listed | with_contents(folder, names)  # whatever is in a language model's folder may be read
    for name in sorted(names):
        check_file(folder / name, folder)
    if not has_sums:
        logger.warning("%s has no %s, as older versions wrote it: it is read unchecked", folder, CHECKSUMS)
        return
    with reading(folder):
        wrong = [name for name in sorted(names) if sums.get(name) != sha256(folder / name)]
    if wrong:
        raise CheckpointError(
            f"checkpoint {folder}: not what was written, by {CHECKSUMS}: {', '.join(wrong)} (damaged, or from another "
            "checkpoint); copy the checkpoint again, or use another one"
        )


def weights_in(folder: Path) -> tuple[str, ...]:
    """Return the names of what asking reads of a checkpoint of ours, as its `multimodal_config.json` says, unchecked.

    Where that is missing or damaged, which reading will tell, they are those that any checkpoint has.
    """
    try:
        kind = str(read_json(folder / MULTIMODAL_CONFIG).get("train_only", "lora"))
    except CheckpointError:
        kind = ""
    return TRAINED.get(kind, (PROJECTOR_WEIGHTS, MULTIMODAL_CONFIG))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of at most 64 MiB."""
    check_file(path)
    with reading(path):
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ValueError(f"{path.stat().st_size:,} bytes, expected at most {_MAX_JSON_BYTES:,}")
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"expected a JSON object, got {type(values).__name__}")
    return values


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a `.safetensors` file, or a PyTorch file of which no pickle is executed; the tensors are mapped."""
    check_file(path)
    with reading(path):
        if path.suffix == ".safetensors":
            return load_file(path)
        values = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        if not isinstance(values, dict) or not all(
            isinstance(name, str) and isinstance(value, Tensor) for name, value in values.items()
        ):
            raise ValueError("expected names and tensors, got something else")
    return values


def read_lora_config(folder: Path) -> LoraConfig:
    """Read rank, alpha, dropout and target modules from a checkpoint's `adapter_config.json`."""
    path = folder / ADAPTER_CONFIG
    values = read_json(path)
    r: Any = values.get("r")
    alpha: Any = values.get("lora_alpha")
    dropout: Any = values.get("lora_dropout", 0.0)
    targets: Any = values.get("target_modules")
    are_names = isinstance(targets, list) and all(
        isinstance(name, str) and re.fullmatch(r"\w+(\.\w+)*", name) for name in targets
    )
    expected = {
        "peft_type": (values.get("peft_type"), "'LORA'", values.get("peft_type") == "LORA"),
        "r": (r, "a whole number from 1 to 65536", type(r) is int and 1 <= r <= 1 << 16),
        "lora_alpha": (alpha, "a number above 0", type(alpha) in (int, float) and 0 < alpha < 1e9),
        "lora_dropout": (dropout, "at least 0 and below 1", type(dropout) in (int, float) and 0 <= dropout < 1),
        "target_modules": (targets, "a list of names of modules", are_names and bool(targets)),
    }
    problems = [
        f"{name} must be {wanted}, got {shorten(value)}" for name, (value, wanted, fits) in expected.items() if not fits
    ]
    plain = LoraConfig().to_dict()
    problems += [
        f"{shorten(name)} is {shorten(values[name])}, which plain LoRA does not have"
        for name in sorted(values.keys() - expected.keys() - _CHANGES_NO_NUMBER)
        if values[name] and values[name] != plain.get(name)
    ]
    if problems:
        more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise CheckpointError(f"{path}: not a configuration of plain LoRA: {'; '.join(problems[:4])}{more}")
    return LoraConfig(task_type="CAUSAL_LM", r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets)


def read_multimodal_config(folder: Path) -> MultimodalConfig:
    """Read a checkpoint's `multimodal_config.json`."""
    path = folder / MULTIMODAL_CONFIG
    values = {**OPTIONAL, **read_json(path)}
    types = get_type_hints(MultimodalConfig)
    missing = [name for name in types if name not in values]
    if missing:
        raise CheckpointError(f"{path}: {', '.join(missing)} missing")
    for name, expected in types.items():
        expected = get_origin(expected) or expected
        if type(values[name]) is not expected:
            raise CheckpointError(f"{path}: {name} must be a {expected.__name__}, got {shorten(values[name])}")
    if values["projector_layers"] not in (1, 2):
        raise CheckpointError(f"{path}: projector_layers must be 1 or 2, got {values['projector_layers']}")
    if values["pixel_shuffle"] < 1:
        raise CheckpointError(f"{path}: pixel_shuffle must be at least 1, got {values['pixel_shuffle']}")
    if values["vision_feature_layer"] > -1:
        raise CheckpointError(f"{path}: vision_feature_layer must be -1 or less, got {values['vision_feature_layer']}")
    if values["train_only"] not in TRAINED:
        raise CheckpointError(f"{path}: train_only must be one of {', '.join(TRAINED)}, got {values['train_only']!r}")
    return MultimodalConfig(**{name: values[name] for name in types})
