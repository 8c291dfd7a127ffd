"""Two formats in the base's own layout: the language model with LoRA merged, and LoRA alone as PEFT reads it."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from ..checkpoints.base_models import load_tokenizer
from ..checkpoints.folder import ADAPTER_WEIGHTS, MULTIMODAL_CONFIG, PROJECTOR_WEIGHTS
from ..checkpoints.readers import MultimodalConfig
from ..checkpoints.saving import PACKAGE_VERSIONS, flush_to_disk
from ..checkpoints.whole_model import copy_small_files
from .shards import ShardWriter
from .sources import Sources, base_file, language_weights


def write_merged(sources: Sources, folder: Path, max_bytes: int) -> None:
    """Write the base as published, with LoRA in its weights, and next to it the projector and what belongs to it.

    Raises:
        ValueError: if the base models' files are incomplete.
        OSError: if files can't be written.
    """
    config = sources.language.to_dict()
    config |= {
        "architectures": [sources.names.architecture],
        "tie_word_embeddings": sources.is_tied,
        "dtype": str(sources.dtype).removeprefix("torch."),
    }
    config.pop("_name_or_path", None)
    _write_json(folder / "config.json", config)
    base_file(sources.language_name, "generation_config.json")  # downloads it, as the next line does the tokenizer
    load_tokenizer(sources.language_name)
    if (config_file := base_file(sources.language_name, "config.json")) is not None:
        copy_small_files(config_file, folder)
    save_file({name: value.contiguous() for name, value in sources.projector.items()}, folder / PROJECTOR_WEIGHTS)
    _write_json(folder / MULTIMODAL_CONFIG, asdict(_multimodal_config(sources)))
    ShardWriter(folder, max_bytes).write(language_weights(sources))


def _multimodal_config(sources: Sources) -> MultimodalConfig:
    """Say what the projector was trained with; the merged weights have no fingerprint yet."""
    tower, language = sources.tower, sources.language
    here = MultimodalConfig(
        base_language_model=sources.language_name,
        base_value_model=sources.vision_name,
        vision_tower=tower.kind,
        num_image_tokens=tower.num_image_tokens // sources.checkpoint.pixel_shuffle**2,
        vision_hidden_size=tower.hidden_size,
        language_hidden_size=language.hidden_size,
        vocab_size=language.vocab_size,
        projector_layers=sources.checkpoint.projector_layers,
        vision_tower_fingerprint="",
        language_model_fingerprint="",
        drop_first_patch=sources.drop_first_patch,
        dtype=str(sources.dtype).removeprefix("torch."),
        package_versions=PACKAGE_VERSIONS,
        pixel_shuffle=sources.checkpoint.pixel_shuffle,
        vision_feature_layer=tower.feature_layer,
    )
    trained = sources.checkpoint.config
    return here if trained is None else replace(here, vision_tower_fingerprint=trained.vision_tower_fingerprint)


def check_peft(sources: Sources) -> None:
    """Refuse a checkpoint without LoRA.

    Raises:
        ValueError: if it is one.
    """
    if sources.checkpoint.lora_config is None:
        raise ValueError(
            f"--format peft: {sources.checkpoint.folder} is of --train_only {sources.checkpoint.train_only} and has no "
            "LoRA; --format llava and merged write its language model"
        )


def write_peft(sources: Sources, folder: Path) -> None:
    """Write what `PeftModel.from_pretrained` loads onto the base language model; the projector is not part of it.

    Raises:
        OSError: if files can't be written.
    """
    config: Any = sources.checkpoint.lora_config
    config.inference_mode = True
    config.base_model_name_or_path = sources.language_name
    config.save_pretrained(str(folder))
    tensors = {}
    for name, (A, B, _) in sources.lora.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = A.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = B.contiguous()
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    flush_to_disk(folder / ADAPTER_WEIGHTS)


def _write_json(path: Path, values: dict[str, object]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
