"""A checkpoint and its base models, tensor by tensor: what an export is made of. No model is built.

Shape legend: K inputs of a linear layer, N outputs, R LoRA's rank.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.utils import cached_file

from qwen import MultimodalQWenLMHeadModel, QWenConfig
from visual import TowerShape, read_tower_shape, tower_class_of
from visual.loading import load_config

from ..checkpoints.base_models import base_fingerprints, base_models, drops_first_patch, read_language_config
from ..checkpoints.checkpoint import (
    check_bases,
    check_weights,
    load_lora,
    num_projector_layers,
    read_checkpoint,
    read_projector,
)
from ..checkpoints.saving import Checkpoint
from ..checkpoints.tensor_files import map_tensors, reading
from ..device import parse_dtype
from ..projector import build_projector

HEAD, EMBEDDING = "lm_head.weight", "transformer.wte.weight"


@dataclass(frozen=True)
class Update:
    """What LoRA adds to one linear layer: scale · B A."""

    A: Tensor
    """(R, K)."""
    B: Tensor
    """(N, R)."""
    scale: float
    """alpha / R."""


@dataclass(frozen=True)
class Sources:
    """A checkpoint that was checked against its base models, and what is needed to read all of them."""

    checkpoint: Checkpoint
    """The folder that was trained."""
    language_name: str
    """Hub name or folder of the language model."""
    vision_name: str
    """Hub name or folder of the vision tower."""
    language: QWenConfig
    """The language model's configuration."""
    vision: PreTrainedConfig
    """The vision half's configuration."""
    tower: TowerShape
    """The tower's sizes."""
    drop_first_patch: bool
    """Whether SigLIP's first patch is left out."""
    lora: dict[str, Update]
    """By the name of the linear layer."""
    projector: dict[str, Tensor]
    """`0.weight 0.bias` and, with two layers, `2.weight 2.bias`."""
    dtype: torch.dtype
    """Of what is written."""
    language_shapes: dict[str, torch.Size]
    """The language model's tensors."""
    vision_shapes: dict[str, torch.Size]
    """The tower's tensors, without `vision_model.`."""


def read_sources(
    model_weights: str | os.PathLike[str], language: str | None, vision: str | None, dtype: torch.dtype | None
) -> Sources:
    """Read a checkpoint and check that it fits its base models, whose weights are not read yet.

    Args:
        model_weights: a checkpoint or a run folder; one of the original project too.
        language: hub name or folder of the language model; by default the one that the checkpoint names.
        vision: likewise of the vision tower.
        dtype: of the export; by default the one that the checkpoint was trained in.

    Raises:
        ValueError: if something is missing, damaged, or does not fit.
        OSError: if files are missing.
    """
    checkpoint = read_checkpoint(model_weights)
    language_name, vision_name = base_models(language, vision, checkpoint)
    config = read_language_config(language_name)
    drop = drops_first_patch(checkpoint, vision_name)
    shape, tower_class = read_tower_shape(vision_name, drop_first_patch=drop), tower_class_of(vision_name)
    vision_config = load_config(tower_class.model_class, vision_name, tower_class.config_overrides)
    for name in (language_name, vision_name):
        weight_files(name)  # those of a hub name are downloaded, so that fingerprints can be taken
    with torch.device("meta"):  # names and shapes, no storage
        model = MultimodalQWenLMHeadModel(config)
        tower = tower_class.model_class(vision_config, **tower_class.model_kwargs)
        projector = build_projector(shape.hidden_size, config.hidden_size, num_projector_layers(checkpoint))
    model.name_or_path = language_name
    language_shapes = {name: value.shape for name, value in model.state_dict().items()}
    if checkpoint.config is not None:
        sizes: Any = SimpleNamespace(
            kind=shape.kind,
            num_image_tokens=shape.num_image_tokens,
            hidden_size=shape.hidden_size,
            name_or_path=vision_name,
        )
        check_bases(checkpoint, sizes, model, base_fingerprints(sizes, model))
    trained = read_projector(checkpoint.folder)
    where = f"projector in {checkpoint.folder}"
    check_weights(projector.state_dict(), trained, where, "another vision tower or language model")
    return Sources(
        checkpoint=checkpoint,
        language_name=language_name,
        vision_name=vision_name,
        language=config,
        vision=vision_config,
        tower=shape,
        drop_first_patch=drop,
        lora=_read_lora(model, checkpoint),
        projector=trained,
        dtype=dtype or _trained_dtype(checkpoint, config),
        language_shapes=language_shapes,
        vision_shapes={_bare(name): value.shape for name, value in tower.state_dict().items()},
    )


def _read_lora(model: MultimodalQWenLMHeadModel, checkpoint: Checkpoint) -> dict[str, Update]:
    wrapped = load_lora(model, checkpoint, trainable=False)
    updates = {}
    for name, layer in wrapped.get_base_model().named_modules():
        if isinstance(layer, LoraLayer):
            A: Any = layer.lora_A["default"]
            B: Any = layer.lora_B["default"]
            updates[name] = Update(A.weight.detach(), B.weight.detach(), layer.scaling["default"])
    return updates


def _trained_dtype(checkpoint: Checkpoint, config: QWenConfig) -> torch.dtype:
    """Return what the checkpoint says; the original project's say nothing, and get the base model's own."""
    if checkpoint.config is not None:
        return parse_dtype(checkpoint.config.dtype)
    return parse_dtype(str(config.dtype).removeprefix("torch.")) if config.dtype else torch.float32


# ---- Weights, one at a time


def language_weights(sources: Sources) -> Iterator[tuple[str, Tensor]]:
    """Yield the language model's tensors by their published names, LoRA merged, in the export's dtype.

    The head is always among them, also where the base model shares the embedding's weight: LoRA may have changed it.
    """
    shapes, is_tied = dict(sources.language_shapes), sources.language.tie_word_embeddings
    if is_tied:
        del shapes[HEAD]
    for name, value in _expected(read_weights(sources.language_name), shapes, sources.language_name):
        yield name, _merge(name, value, sources)
        if is_tied and name == EMBEDDING:
            yield HEAD, _merge(HEAD, value, sources)


def _merge(name: str, W: Tensor, sources: Sources) -> Tensor:
    """Return W + scale · B A, computed in fp32 and rounded once, as `lora.merge_lora` does after loading."""
    W = W.to(sources.dtype)  # (N, K), what was frozen while training
    update = sources.lora.get(name.removesuffix(".weight"))
    if update is None:
        return W
    return torch.addmm(W.float(), update.B.float(), update.A.float(), alpha=update.scale).to(sources.dtype)


def tower_weights(sources: Sources) -> Iterator[tuple[str, Tensor]]:
    """Yield the vision tower's tensors in the export's dtype, named as in transformers' vision model."""
    halves = ((_bare(name), value) for name, value in read_weights(sources.vision_name))  # a text half has other names
    for name, value in _expected(halves, sources.vision_shapes, sources.vision_name):
        yield name, value.to(sources.dtype)


def _bare(name: str) -> str:
    return name.removeprefix("vision_model.")


def _expected(
    weights: Iterable[tuple[str, Tensor]], shapes: dict[str, torch.Size], name_or_path: str
) -> Iterator[tuple[str, Tensor]]:
    """Pass the tensors on that have one of these names, and check that none is missing or of another shape."""
    missing = dict(shapes)
    for name, value in weights:
        if name not in missing:
            continue
        if value.shape != missing.pop(name):
            raise ValueError(f"{name_or_path}: {name} is {tuple(value.shape)}, expected {tuple(shapes[name])}")
        yield name, value
    if missing:
        shown = ", ".join(sorted(missing)[:4])
        raise ValueError(f"{name_or_path}: {len(missing)} weights are missing ({shown}, …): use a complete base model")


def read_weights(name_or_path: str) -> Iterator[tuple[str, Tensor]]:
    """Yield a base model's tensors by their published names, file by file; safetensors are mapped one at a time."""
    for path in weight_files(name_or_path):
        if path.suffix != ".safetensors":
            yield from map_tensors(path).items()
            continue
        with reading(path), safe_open(path, framework="pt") as file:
            names = list(file.keys())
        for name in names:
            with reading(path), safe_open(path, framework="pt") as file:  # anew: pages that were read are let go
                value = file.get_tensor(name)
            yield name, value


def weight_files(name_or_path: str) -> list[Path]:
    """Return the paths of a base model's weights, downloaded if need be.

    Raises:
        ValueError: if it has none.
    """
    for file in ("model.safetensors", "pytorch_model.bin"):
        if (path := base_file(name_or_path, file)) is not None:
            return [path]
        index = read_base_json(name_or_path, f"{file}.index.json")
        if index is not None:
            parts = sorted(set(index["weight_map"].values()))
            return [path for part in parts if (path := base_file(name_or_path, part)) is not None]
    raise ValueError(
        f"{name_or_path}: no model.safetensors or pytorch_model.bin, whole or in shards; give a base model"
    )


def base_file(name_or_path: str, file: str) -> Path | None:
    """Return the path of a base model's file, or None where it has none."""
    try:
        return Path(str(cached_file(name_or_path, file)))
    except OSError:
        return None


def read_base_json(name_or_path: str, file: str) -> dict[str, Any] | None:
    """Read a base model's JSON file; None where it has none."""
    path = base_file(name_or_path, file)
    if path is None:
        return None
    with reading(path):
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values
