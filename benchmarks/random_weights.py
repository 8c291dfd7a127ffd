"""Base models with random weights in the published formats, written shard by shard: no more than one is in memory.

Weights are cut from one block of normal numbers, so that billions of them take the disk's time and not the generator's.
Norms are 1 and biases 0. What such a model says means nothing; what it takes is what a trained one takes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel, PreTrainedConfig

from qwen import QWenConfig, QWenLMHeadModel

from .inputs import SEED
from .vocabulary import vocabulary_file

SHARD_BYTES = 1_000_000_000
_BLOCK = 1 << 20
_STD = 0.02


def qwen_config(layers: int, width: int, heads: int, inner: int, vocabulary: int) -> QWenConfig:
    """Return a QWen of these sizes; `inner` channels are inside its MLP, half of `intermediate_size`."""
    return QWenConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        kv_channels=width // heads,
        intermediate_size=2 * inner,
    )


def clip_config(layers: int, width: int, inner: int, image_size: int = 224, patch_size: int = 14) -> CLIPVisionConfig:
    """Return a CLIP tower of these sizes, with heads of 64 channels."""
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        image_size=image_size,
        patch_size=patch_size,
    )


def write_language_model(
    folder: Path, config: QWenConfig, dtype: torch.dtype = torch.bfloat16, shard_bytes: int = SHARD_BYTES
) -> int:
    """Write a QWen as published: configuration, shards with their index, vocabulary, settings of answers.

    Returns:
        Bytes of its weights.
    """
    with torch.device("meta"):
        model = QWenLMHeadModel(config)
    total = write_weights(folder, model, config, dtype, shard_bytes)
    shutil.copy(vocabulary_file(), folder / "qwen.tiktoken")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "QWenTokenizer"}))
    settings = {"eos_token_id": 151643, "pad_token_id": 151643, "max_new_tokens": 512, "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return total


def write_tower(
    folder: Path, config: CLIPVisionConfig, dtype: torch.dtype = torch.bfloat16, shard_bytes: int = SHARD_BYTES
) -> int:
    """Write a CLIP tower and its image processor; returns the bytes of its weights."""
    with torch.device("meta"):
        model = CLIPVisionModel(config)
    total = write_weights(folder, model, config, dtype, shard_bytes)
    edge = config.image_size
    processor = CLIPImageProcessorPil(size={"shortest_edge": edge}, crop_size={"height": edge, "width": edge})
    processor.save_pretrained(str(folder))
    return total


def write_weights(
    folder: Path, model: nn.Module, config: PreTrainedConfig, dtype: torch.dtype, shard_bytes: int = SHARD_BYTES
) -> int:
    """Write random weights for a model on the meta device, in shards with their index; returns their bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    config.architectures = [type(model).__name__]
    config.dtype = dtype
    config.save_pretrained(str(folder))
    block = torch.randn(_BLOCK, generator=torch.Generator().manual_seed(SEED)).mul_(_STD).to(dtype)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    shards = list(_shards(shapes, dtype, shard_bytes))
    weight_map, total = {}, 0
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: _values(name, shapes[name], block) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
        del tensors  # before the next ones are made
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def _shards(shapes: dict[str, torch.Size], dtype: torch.dtype, shard_bytes: int) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        more = shape.numel() * dtype.itemsize
        if names and size + more > shard_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += more
    yield names


def _values(name: str, shape: torch.Size, block: Tensor) -> Tensor:
    if len(shape) == 1:
        fill = 1.0 if name.endswith("weight") else 0.0
        return torch.full(tuple(shape), fill, dtype=block.dtype)
    number = shape.numel()
    values = torch.empty(number, dtype=block.dtype)
    for start in range(0, number, len(block)):
        part = values[start : start + len(block)]
        part.copy_(block[: len(part)])
    return values.view(shape)
