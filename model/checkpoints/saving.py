"""Save what is trained (LoRA and projector, say), and a note of what it was trained on; `folder.py` lists the files."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from .folder import (
    ADAPTER_WEIGHTS,
    CHECKSUMS,
    LANGUAGE_MODEL,
    MULTIMODAL_CONFIG,
    PROJECTOR_WEIGHTS,
    TRAINED,
    WEIGHTS,
    sha256,
    with_contents,
)
from .readers import OPTIONAL, MultimodalConfig
from .whole_model import write_language_model

PACKAGE_VERSIONS = {name: version(name) for name in ("torch", "transformers", "peft", "accelerate")}


def multimodal_config(model: Any) -> MultimodalConfig:
    """Describe the base models and the projector of a `VisionLanguageModel`."""
    tower, config = model.vision_tower, model.qwen.config
    language, vision = (
        str(Path(name).absolute()) if Path(name).is_dir() else name
        for name in (model.base_language_model, tower.name_or_path)
    )
    return MultimodalConfig(
        base_language_model=language,
        base_value_model=vision,
        vision_tower=tower.kind,
        num_image_tokens=model.num_image_tokens,
        vision_hidden_size=tower.hidden_size,
        language_hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        projector_layers=model.projector_layers,
        **model.fingerprints,
        drop_first_patch=tower.drop_first_patch,
        dtype=str(next(tower.parameters()).dtype).removeprefix("torch."),
        package_versions=PACKAGE_VERSIONS,
        pixel_shuffle=model.pixel_shuffle,
        vision_feature_layer=tower.feature_layer,
        train_only=model.train_only,
    )


def save_checkpoint(
    folder: str | os.PathLike[str], language_model: Any, projector: nn.Module, config: MultimodalConfig
) -> None:
    """Write a checkpoint's weights and configuration into a folder, which is created if need be.

    Raises:
        ValueError: if LoRA is trained, and the language model has no LoRA layers.
        OSError: if they can't be written; files that were there before are then unchanged.
    """
    if config.train_only == "lora" and not isinstance(language_model, PeftModel):
        raise ValueError("there are no LoRA layers to save; call add_lora first")
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    values = {name: value for name, value in asdict(config).items() if name not in OPTIONAL or value != OPTIONAL[name]}
    # All is written to a new folder first: if that fails, the old files are whole.
    new = path / "tmp-weights"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    try:
        try:
            _save_tensors(projector.state_dict(), new / PROJECTOR_WEIGHTS)
            if config.train_only == "lora":
                _save_lora(language_model, config.base_language_model, new)
            elif config.train_only == "all":
                write_language_model(language_model, config.base_language_model, new / LANGUAGE_MODEL)
        except SafetensorError as error:  # a full disk, too
            raise OSError(f"{new}: {error}") from error
        text = json.dumps(values, indent=2, ensure_ascii=False)
        (new / MULTIMODAL_CONFIG).write_text(text + "\n", encoding="utf-8")
        names = TRAINED[config.train_only]
        files = with_contents(new, names)
        write_checksums(new, files)
        for name in (*files, CHECKSUMS, *names):
            flush_to_disk(new / name)
        # The folder is no checkpoint until the last of them is in its place.
        for name in (MULTIMODAL_CONFIG, CHECKSUMS, LANGUAGE_MODEL, *(set(WEIGHTS) - set(names))):
            if os.path.lexists(path / name):
                _remove(path / name)
        for name in (*names[:-1], CHECKSUMS, MULTIMODAL_CONFIG):
            (new / name).replace(path / name)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    flush_to_disk(path)


def _save_lora(language_model: PeftModel, base: str, folder: Path) -> None:
    config = language_model.peft_config["default"]
    config.base_model_name_or_path = base
    config.save_pretrained(str(folder))
    # By default PEFT asks the model hub whether the vocabulary has grown; here it never does.
    _save_tensors(get_peft_model_state_dict(language_model, save_embedding_layers=False), folder / ADAPTER_WEIGHTS)


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def write_checksums(folder: Path, names: Iterable[str]) -> None:
    """Add files to the `checksums.json` of a folder that this process writes."""
    path = folder / CHECKSUMS
    sums = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    sums |= {name: sha256(folder / name) for name in names}
    path.write_text(json.dumps(sums, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def flush_to_disk(path: Path) -> None:
    """Return when a file, or a folder's list of names, is on the disk and not only on its way there."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
