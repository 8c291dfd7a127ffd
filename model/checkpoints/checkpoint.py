"""Checkpoint folders: what is trained (LoRA and projector), and a note of what it was trained on.

    adapter_config.json, adapter_model.safetensors   as PEFT writes them; names start at the language model
    projector.safetensors                            0.weight 0.bias [2.weight 2.bias]
    multimodal_config.json                           both base models, token counts, dtype, package versions
    checksums.json                                   SHA-256 of each file that loading reads; written last

Folders of the original project hold `adapter_model.bin` (or `.safetensors`) and `other_params.bin` instead, and neither
`multimodal_config.json` nor checksums; they are read too. No pickle is executed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from copy import copy
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..lora import make_lean
from .configs import ADAPTER_CONFIG, MULTIMODAL_CONFIG, MultimodalConfig, read_lora_config, read_multimodal_config
from .tensor_files import (
    CHECKSUMS,
    CheckpointError,
    check_checksums,
    check_weights,
    flush_to_disk,
    read_tensors,
    write_checksums,
)

ADAPTER_WEIGHTS = "adapter_model.safetensors"
PROJECTOR_WEIGHTS = "projector.safetensors"
WEIGHTS = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, PROJECTOR_WEIGHTS, MULTIMODAL_CONFIG)
"""The files that asking reads, beside `checksums.json`."""
ORIGINAL_ADAPTER_WEIGHTS = "adapter_model.bin"
ORIGINAL_PROJECTOR_WEIGHTS = "other_params.bin"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder, its configuration files read."""

    folder: Path
    """Its path."""
    config: MultimodalConfig | None
    """None for folders of the original project."""
    lora_config: LoraConfig
    """Rank, alpha, dropout and target modules."""


# ---- Find and read


def resolve_checkpoint(folder: str | os.PathLike[str]) -> Path:
    """Find the checkpoint that a path means: the folder itself, or the newest complete one of a run folder.

    Raises:
        CheckpointError: if there is none.
    """
    path = Path(folder)
    if not path.is_dir():
        raise CheckpointError(f"checkpoint {path}: no such folder; give a checkpoint or a run folder")
    numbered = numbered_checkpoints(path)
    for candidate in (*numbered, path):
        missing = _missing(candidate)
        if not missing:
            return candidate
    inside = f" and none of its {len(numbered)} checkpoint-* folders is complete" if numbered else ""
    raise CheckpointError(f"checkpoint {path}: {' and '.join(missing)} missing{inside}")


def numbered_checkpoints(run: Path) -> list[Path]:
    """Return the `checkpoint-N` folders of a run folder, complete or not, the newest first."""
    found = [path for path in run.iterdir() if re.fullmatch(r"checkpoint-\d+", path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]), reverse=True)


def _missing(folder: Path) -> list[str]:
    adapter = (ADAPTER_WEIGHTS, ORIGINAL_ADAPTER_WEIGHTS)
    projector = (PROJECTOR_WEIGHTS, ORIGINAL_PROJECTOR_WEIGHTS)
    wanted = ((ADAPTER_CONFIG,), adapter, projector)
    missing = [" or ".join(names) for names in wanted if not any((folder / name).exists() for name in names)]
    if (folder / PROJECTOR_WEIGHTS).exists() and not (folder / MULTIMODAL_CONFIG).exists():
        missing.append(MULTIMODAL_CONFIG)
    return missing


def read_checkpoint(folder: str | os.PathLike[str]) -> Checkpoint:
    """Check a checkpoint's files and read its configuration; a run folder means its newest complete checkpoint.

    Raises:
        CheckpointError: if files are missing, damaged, or can't be read.
    """
    path = resolve_checkpoint(folder)
    if not (path / MULTIMODAL_CONFIG).exists():  # of the original project
        return Checkpoint(path, None, read_lora_config(path))
    check_checksums(path, WEIGHTS)
    return Checkpoint(path, read_multimodal_config(path), read_lora_config(path))


# ---- Save


def save_checkpoint(
    folder: str | os.PathLike[str], language_model: PeftModel, projector: nn.Module, config: MultimodalConfig
) -> None:
    """Write a checkpoint's weights and configuration.

    Args:
        folder: created if need be.
        language_model: the language model with its LoRA layers.
        projector: the projector.
        config: what they were trained on.

    Raises:
        OSError: if they can't be written; files that were there before are then unchanged.
    """
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    lora_config = language_model.peft_config["default"]
    lora_config.base_model_name_or_path = config.base_language_model
    text = json.dumps(asdict(config), indent=2, ensure_ascii=False)
    # All is written to a new folder first: if that fails, the old files are whole.
    new = path / "tmp-weights"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    try:
        _save_tensors(_lora_weights(language_model), new / ADAPTER_WEIGHTS)
        _save_tensors(projector.state_dict(), new / PROJECTOR_WEIGHTS)
        lora_config.save_pretrained(str(new))
        (new / MULTIMODAL_CONFIG).write_text(text + "\n", encoding="utf-8")
        write_checksums(new, WEIGHTS)
        for name in (*WEIGHTS, CHECKSUMS):
            flush_to_disk(new / name)
        # The folder is no checkpoint until the last of them is in its place.
        for name in (MULTIMODAL_CONFIG, CHECKSUMS):
            (path / name).unlink(missing_ok=True)
        for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS, PROJECTOR_WEIGHTS, CHECKSUMS, MULTIMODAL_CONFIG):
            (new / name).replace(path / name)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    flush_to_disk(path)


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:  # a full disk, too
        raise OSError(f"{path}: {error}") from error


def _lora_weights(language_model: PeftModel) -> dict[str, Tensor]:
    # By default PEFT asks the model hub whether the vocabulary has grown; here it never does.
    return get_peft_model_state_dict(language_model, save_embedding_layers=False)


# ---- Load


def load_lora(
    language_model: PreTrainedModel, checkpoint: Checkpoint, *, trainable: bool, dropout: float | None = None
) -> PeftModel:
    """Wrap the language model with the LoRA layers of a checkpoint, in fp32.

    Args:
        language_model: the base model.
        checkpoint: where the layers come from.
        trainable: whether they are to be trained further.
        dropout: dropout to train with, instead of the checkpoint's.

    Raises:
        CheckpointError: if names or shapes are not exactly those that the base model and the rank call for.
    """
    config = copy(checkpoint.lora_config)
    config.inference_mode = not trainable
    config.base_model_name_or_path = language_model.name_or_path  # or PEFT warns that it is another
    if dropout is not None:
        config.lora_dropout = dropout
    weights = _normalised_adapter_names(_read_adapter(checkpoint.folder))
    try:
        wrapped = get_peft_model(language_model, config, low_cpu_mem_usage=True)  # layers of shapes, without values
        make_lean(wrapped)
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.folder / ADAPTER_CONFIG}: {error}") from error
    expected = _lora_weights(wrapped)
    check_weights(expected, weights, f"adapter in {checkpoint.folder}", "another base language model or rank")
    # By torch, not PEFT, which would round them to the base model's dtype. What is trained is a copy: it must not
    # depend on a mapped file, which may be overwritten.
    named = {
        re.sub(r"(lora_[AB])\.", r"\1.default.", name): tensor.to(torch.float32, copy=trainable)
        for name, tensor in weights.items()
    }
    wrapped.load_state_dict(named, strict=False, assign=True)
    return wrapped


def load_adapter_weights(language_model: PeftModel, folder: str | os.PathLike[str]) -> None:
    """Load a checkpoint's LoRA weights into a model that has its LoRA layers already.

    Raises:
        CheckpointError: if names or shapes differ.
    """
    weights = _normalised_adapter_names(_read_adapter(Path(folder)))
    expected = _lora_weights(language_model)
    check_weights(expected, weights, f"adapter in {folder}", "another base language model or rank")
    set_peft_model_state_dict(language_model, weights)


def load_projector(projector: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Load a checkpoint's weights into the projector.

    Raises:
        CheckpointError: if names or shapes differ.
    """
    weights = read_projector(folder)
    expected = projector.state_dict()
    check_weights(expected, weights, f"projector in {folder}", "another vision tower or language model")
    projector.load_state_dict(weights)


def read_projector(folder: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a checkpoint's projector weights, the original project's `other_params.bin` included."""
    path = Path(folder)
    if (path / PROJECTOR_WEIGHTS).exists():
        return read_tensors(path / PROJECTOR_WEIGHTS)
    weights = read_tensors(path / ORIGINAL_PROJECTOR_WEIGHTS)
    # Some of the original's files name the tensors from the whole model's root, as in `feature_proj.0.weight`.
    return {re.sub(r"^.*?(\d+\.(?:weight|bias))$", r"\1", name): tensor for name, tensor in weights.items()}


def _read_adapter(folder: Path) -> dict[str, Tensor]:
    if (folder / ADAPTER_WEIGHTS).exists():
        return read_tensors(folder / ADAPTER_WEIGHTS)
    return read_tensors(folder / ORIGINAL_ADAPTER_WEIGHTS)


def _normalised_adapter_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return names as PEFT writes them: without the adapter's name, from the language model on."""
    names = {re.sub(r"(lora_[AB])\.default\.", r"\1.", name): tensor for name, tensor in weights.items()}
    return {re.sub(r"^.*?(?=base_model\.model\.)", "", name): tensor for name, tensor in names.items()}
