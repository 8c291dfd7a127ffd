"""A checkpoint and its base models, tensor by tensor: what an export is made of. No language model is built.

Shape legend: K inputs of a linear layer, N outputs, R LoRA's rank.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_utils import load_state_dict
from transformers.utils import cached_file

from qwen import MultimodalQWenLMHeadModel, QWenConfig
from visual import TowerShape, read_tower_shape, tower_class_of
from visual.loading import load_config

from ..checkpoints.base_models import base_fingerprints, read_language_config
from ..checkpoints.checkpoint import (
    base_models,
    check_bases,
    load_lora,
    load_projector,
    read_checkpoint,
    tower_settings,
)
from ..checkpoints.folder import reading
from ..checkpoints.readers import Checkpoint
from ..device import parse_dtype
from ..language_models.causal_lm import multimodal_class
from ..pixel_shuffle import check_pixel_shuffle
from ..projector import build_projector

_ROWS = 1 << 14
"""Rows that are merged together: only the head has more, and in fp32 it would take gigabytes."""


@dataclass(frozen=True)
class LanguageNames:
    """Names in a language model, as its published files have them."""

    architecture: str  # of the class, as in `LlamaForCausalLM`
    prefix: str  # of the decoder's weights, without a dot
    embedding: str  # of the weight
    head: str  # likewise


@dataclass(frozen=True)
class Sources:
    """A checkpoint that was checked against its base models, and what is needed to read all of them."""

    checkpoint: Checkpoint
    language_name: str  # hub name or folder of the language model
    vision_name: str  # hub name or folder of the vision tower
    language: PreTrainedConfig
    names: LanguageNames
    is_tied: bool  # whether the export's head is its embedding; never for QWen
    vision: PreTrainedConfig  # of the vision half
    tower: TowerShape
    drop_first_patch: bool  # whether SigLIP's first patch is left out
    lora: dict[str, tuple[Tensor, Tensor, float]]  # A (R, K), B (N, R) and alpha / R, by the name of the linear layer
    projector: dict[str, Tensor]  # `0.weight 0.bias` and, with two layers, `2.weight 2.bias`; fp32
    dtype: torch.dtype  # of what is written
    language_shapes: dict[str, torch.Size]  # of the language model's tensors
    vision_shapes: dict[str, torch.Size]  # of the tower's, without `vision_model.`

    @property
    def takes_norm(self) -> bool:
        """Return whether features have gone through SigLIP's last norm, which LLaVA leaves out."""
        return self.tower.kind == "siglip" and self.tower.feature_layer == -1


def read_sources(
    model_weights: str | os.PathLike[str], language: str | None, vision: str | None, dtype: torch.dtype | None
) -> Sources:
    """Read a checkpoint and check that it fits its base models; of their weights only some values are read yet.

    Args:
        model_weights: a checkpoint or a run folder; one of the original project too.
        language: hub name or folder of the language model; by default the one that the checkpoint names.
        vision: likewise of the vision tower.
        dtype: of the export; by default the one that the checkpoint was trained in; of `--train_only all` float32.

    Raises:
        ValueError: if something is missing, damaged, or does not fit.
        OSError: if files are missing.
    """
    checkpoint = read_checkpoint(model_weights)
    language_name, vision_name = base_models(language, vision, checkpoint)
    config, settings = read_language_config(language_name), tower_settings(checkpoint, vision_name)
    is_qwen = isinstance(config, QWenConfig)
    shape, tower_class = read_tower_shape(vision_name, **settings), tower_class_of(vision_name)
    vision_config = load_config(tower_class.model_class, vision_name, tower_class.config_overrides)
    for name in (language_name, vision_name):
        weight_files(name)  # downloads those of a hub name, of which fingerprints are taken
    with torch.device("meta"):  # names and shapes, no storage
        model: Any = (MultimodalQWenLMHeadModel if is_qwen else multimodal_class(config))(config)
        tower = tower_class.model_class(vision_config, **tower_class.model_kwargs)
    model.name_or_path = language_name
    language_shapes = {name: value.shape for name, value in model.state_dict().items()}
    if checkpoint.config is not None:
        stand_in: Any = SimpleNamespace(name_or_path=vision_name, **vars(shape))
        check_bases(checkpoint, stand_in, model, base_fingerprints(stand_in, model))
    check_pixel_shuffle(checkpoint.pixel_shuffle, shape.num_image_tokens)
    width = shape.hidden_size * checkpoint.pixel_shuffle**2
    projector = build_projector(width, config.hidden_size, checkpoint.projector_layers)
    load_projector(projector, checkpoint.folder)
    if dtype is None and checkpoint.train_only == "all":
        dtype = torch.float32  # what was trained; the checkpoint's dtype is that of the frozen tower
    if dtype is None:  # the original project's checkpoints record none
        trained = checkpoint.config.dtype if checkpoint.config is not None else config.dtype or "float32"
        dtype = parse_dtype(str(trained).removeprefix("torch."))
    names, lora = _language_names(model), _read_lora(model, checkpoint)
    ties = config.tie_word_embeddings and names.head not in stored_names(language_name)
    ties = ties and names.embedding == f"{names.prefix}.embed_tokens.weight"  # LLaVA ties its head to this alone
    return Sources(
        checkpoint=checkpoint,
        language_name=language_name,
        vision_name=vision_name,
        language=config,
        names=names,
        is_tied=ties and not is_qwen and names.head.removesuffix(".weight") not in lora,
        vision=vision_config,
        tower=shape,
        drop_first_patch=settings["drop_first_patch"],
        lora=lora,
        projector=projector.state_dict(),
        dtype=dtype,
        language_shapes=language_shapes,
        vision_shapes={_bare(name): value.shape for name, value in tower.state_dict().items()},
    )


def _language_names(model: Any) -> LanguageNames:
    modules = {id(module): name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    return LanguageNames(
        architecture=type(model).__name__.removeprefix("Multimodal"),  # QWen's
        prefix=model.base_model_prefix,
        embedding=f"{modules[id(embedding)]}.weight",
        head=f"{modules[id(head)]}.weight",
    )


def _read_lora(model: Any, checkpoint: Checkpoint) -> dict[str, tuple[Tensor, Tensor, float]]:
    if checkpoint.lora_config is None:  # of --train_only
        return {}
    base = load_lora(model, checkpoint, trainable=False).get_base_model()
    layers: dict[str, Any] = {name: layer for name, layer in base.named_modules() if isinstance(layer, LoraLayer)}
    return {
        name: (
            layer.lora_A["default"].weight.detach(),
            layer.lora_B["default"].weight.detach(),
            layer.scaling["default"],
        )
        for name, layer in layers.items()
    }


# ---- Weights, one at a time


def language_weights(sources: Sources) -> Iterator[tuple[str, Tensor]]:
    """Yield the language model's tensors by their published names, LoRA merged, in the export's dtype.

    The head is among them unless it is the embedding in the export as well.

    Raises:
        ValueError: if weights are missing, or have other names than in the model.
    """
    shapes, names, stored = dict(sources.language_shapes), sources.names, stored_names(sources.language_name)
    shares_embedding = sources.language.tie_word_embeddings and names.head not in stored
    if shares_embedding:
        del shapes[names.head]
    _check_complete(shapes.keys() - stored, sources.language_name)
    for name, value in _expected(read_weights(sources.language_name), shapes, sources.language_name):
        yield name, _merge(name, value, sources)
        if shares_embedding and name == names.embedding and not sources.is_tied:
            yield names.head, _merge(names.head, value, sources)


def _merge(name: str, W: Tensor, sources: Sources) -> Tensor:
    """Return W + scale · B A, computed in fp32 and rounded once, as `lora.merge_lora` does after loading."""
    W = W.to(sources.dtype)  # (N, K), what was frozen while training
    update = sources.lora.get(name.removesuffix(".weight"))
    if update is None:
        return W
    A, B, scale = update  # (R, K), (N, R)
    merged = torch.empty_like(W)  # (N, K)
    for rows, old, b in zip(*(tensor.split(_ROWS) for tensor in (merged, W, B)), strict=True):
        rows.copy_(torch.addmm(old.float(), b.float(), A.float(), alpha=scale))
    return merged


def tower_weights(sources: Sources) -> Iterator[tuple[str, Tensor]]:
    """Yield the vision tower's tensors in the export's dtype, named as in transformers' vision model."""
    weights = ((_bare(name), value) for name, value in read_weights(sources.vision_name))  # a text half has other names
    for name, value in _expected(weights, sources.vision_shapes, sources.vision_name):
        yield name, value.to(sources.dtype)


def _bare(name: str) -> str:
    return name.removeprefix("vision_model.")


def _expected(
    weights: Iterable[tuple[str, Tensor]], shapes: dict[str, torch.Size], name_or_path: str
) -> Iterator[tuple[str, Tensor]]:
    """Pass the tensors on that have one of these names, and check that none is missing or of another shape."""
    missing = dict(shapes)
    for name, value in weights:
        if name in missing:
            if value.shape != missing.pop(name):
                raise ValueError(f"{name_or_path}: {name} is {tuple(value.shape)}, expected {tuple(shapes[name])}")
            yield name, value
    _check_complete(missing, name_or_path)


def _check_complete(missing: Collection[str], name_or_path: str) -> None:
    if missing:
        shown = ", ".join(sorted(missing)[:4])
        raise ValueError(
            f"{name_or_path}: {len(missing)} weights are missing ({shown}, …): use a complete base model; one whose "
            "weights transformers renames while loading (mixtures of experts, GPT-NeoX) can't be exported"
        )


def read_weights(name_or_path: str) -> Iterator[tuple[str, Tensor]]:
    """Yield a base model's tensors by their published names, file by file; safetensors are mapped one at a time."""
    for path in weight_files(name_or_path):
        with reading(path):
            if path.suffix != ".safetensors":
                yield from load_state_dict(path, weights_only=True).items()
                continue
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
            for name in names:
                with safe_open(path, framework="pt") as file:  # again: pages that were read are let go
                    value = file.get_tensor(name)
                yield name, value


def stored_names(name_or_path: str) -> set[str]:
    """Return the names of a base model's tensors."""
    names: set[str] = set()
    for path in weight_files(name_or_path):
        with reading(path):
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt") as file:
                    names.update(file.keys())
            else:
                names.update(load_state_dict(path, weights_only=True))
    return names


def weight_files(name_or_path: str) -> list[Path]:
    """Return the paths of a base model's weights, downloaded if need be.

    Raises:
        ValueError: if it has none.
    """
    for file in ("model.safetensors", "pytorch_model.bin"):
        if (path := base_file(name_or_path, file)) is not None:
            return [path]
        if (index := base_file(name_or_path, f"{file}.index.json")) is not None:
            parts = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
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
