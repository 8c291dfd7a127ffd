"""The checkpoint as two GGUF files for llama.cpp: the language model, and SigLIP with the projector.

llama.cpp applies SigLIP's last norm itself and reads the projector as LLaVA's, so no value changes: tensors get other
names, and some of Llama's have their rows reordered. The metadata is written first, then where each tensor lies, then
the tensors one by one, so that only one is in memory at a time.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen import QWenConfig
from visual.loading import load_image_processor

from ..checkpoints.saving import flush_to_disk
from .gguf_text import FAMILIES, add_text_metadata, text_misfits, text_shapes, text_weights
from .llava import misfits, refuse
from .sources import Sources, tower_weights
from .text_half import text_half

_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""GGUF's names."""
_GELUS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "quick_gelu")
"""Activations that llama.cpp has for a tower; the first four are one there."""
_VISION_NAMES = {
    "embeddings.patch_embedding": "v.patch_embd",
    "embeddings.position_embedding": "v.position_embd",
    "post_layernorm": "v.post_ln",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}


def check_gguf(sources: Sources) -> None:
    """Refuse what llama.cpp cannot express, and a missing package.

    Raises:
        ValueError: with every reason.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ValueError("--format gguf writes with the package gguf, which is not installed: pip install gguf")
    kind, known = sources.language.model_type, (QWenConfig.model_type, *FAMILIES)
    if kind not in known:
        raise ValueError(f"--format gguf writes {', '.join(known)}; the language model is {kind}: use --format llava")
    tower, act = sources.tower, getattr(sources.vision, "hidden_act", None)
    clip = "the tower is clip, whose patches llama.cpp misplaces (https://github.com/ggml-org/llama.cpp/issues/25814)"
    is_siglip = tower.kind == "siglip"
    refuse(
        [
            *misfits(sources),
            *text_misfits(sources, text_half(sources)),
            (tower.kind == "clip", clip),
            (tower.kind not in ("clip", "siglip"), f"the tower is {tower.kind}, and only SigLIP can be written"),
            (
                is_siglip and not sources.takes_norm,
                f"features are those of layer {tower.feature_layer}, and only SigLIP's last can be written",
            ),
            (sources.drop_first_patch, "SigLIP's first patch is left out, and llama.cpp gives all to the model"),
            (is_siglip and act not in _GELUS, f"hidden_act is {act!r}, and llama.cpp knows {', '.join(_GELUS)}"),
        ],
        "gguf",
    )


def gguf_names(sources: Sources) -> tuple[str, str]:
    """Return the names of the two files: language model, and tower with projector."""
    suffix = _DTYPES[sources.dtype].lower()
    return f"model-{suffix}.gguf", f"mmproj-{suffix}.gguf"


def write_gguf(sources: Sources, folder: Path) -> None:
    """Write both files into an empty folder.

    Raises:
        ValueError: if the base models' files are incomplete.
        OSError: if files are missing or can't be written.
    """
    text, mmproj = (folder / name for name in gguf_names(sources))
    half = text_half(sources)
    writer = _new_file(sources, text, "model", half.config()["model_type"])
    add_text_metadata(writer, sources, half)
    _write(writer, text_shapes(sources, half), text_weights(sources, half))
    vision_shapes = [
        (name, torch.empty(shape, dtype=sources.dtype, device="meta")) for name, shape in sources.vision_shapes.items()
    ]
    projector = {name: value.to(sources.dtype) for name, value in sources.projector.items()}
    _write(
        _vision_metadata(sources, mmproj),
        _vision_tensors(vision_shapes, projector),
        _vision_tensors(tower_weights(sources), projector),
    )


# ---- Metadata


def _new_file(sources: Sources, path: Path, kind: str, architecture: str) -> Any:
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type(kind)
    dtype = _DTYPES[sources.dtype]
    writer.add_file_type(getattr(gguf.LlamaFileType, "ALL_F32" if dtype == "F32" else f"MOSTLY_{dtype}"))
    return writer


def _vision_metadata(sources: Sources, path: Path) -> Any:
    config: Any = sources.vision
    writer = _new_file(sources, path, "mmproj", "clip")
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("mlp")
    writer.add_vision_use_gelu(config.hidden_act != "quick_gelu")
    writer.add_vision_image_size(config.image_size)
    writer.add_vision_patch_size(config.patch_size)
    writer.add_vision_embedding_length(config.hidden_size)
    writer.add_vision_feed_forward_length(config.intermediate_size)
    writer.add_vision_projection_dim(sources.language.hidden_size)
    writer.add_vision_block_count(config.num_hidden_layers)
    writer.add_vision_head_count(config.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(config.layer_norm_eps)
    writer.add_array("clip.vision.feature_layer", [config.num_hidden_layers])  # the last; by default the one before
    images = load_image_processor(sources.vision_name, sources.tower.image_size)[0]
    writer.add_vision_image_mean(list(images.image_mean))
    writer.add_vision_image_std(list(images.image_std))
    return writer


# ---- Tensors


def _vision_tensors(
    tensors: Iterable[tuple[str, Tensor]], projector: dict[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    for name, value in tensors:
        yield _renamed(name.removeprefix("encoder.layers."), _VISION_NAMES, "v.blk"), value
    for name, value in projector.items():
        yield f"mm.{name}", value


def _renamed(name: str, names: dict[str, str], block: str) -> str:
    """Return GGUF's name: `blk.3.attn_q.weight` for `3.self_attn.q_proj.weight`."""
    module, kind = name.rsplit(".", 1)
    if module in names:
        return f"{names[module]}.{kind}"
    number, part = module.split(".", 1)
    return f"{block}.{number}.{names[part]}.{kind}"


def _write(writer: Any, shapes: Iterable[tuple[str, Tensor]], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write a file.

    Args:
        writer: with all metadata.
        shapes: every tensor once, on the meta device: they get their places in this order.
        tensors: the same with values, in whatever order they are read.
    """
    from gguf import GGMLQuantizationType

    places, size = {}, 0
    for name, value in shapes:
        stored = _as_stored(name, value)
        kind = GGMLQuantizationType[_DTYPES[stored.dtype]]
        writer.add_tensor_info(name, stored.shape, None, stored.nbytes, kind)
        places[name] = size
        size += writer.ggml_pad(stored.nbytes, writer.data_alignment)
    with contextlib.closing(writer):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        file = writer.fout[0]
        begin = writer.ggml_pad(file.tell(), writer.data_alignment)
        file.truncate(begin + size)
        for name, value in tensors:
            file.seek(begin + places.pop(name))
            file.write(_as_stored(name, value).contiguous().flatten().view(torch.uint8).numpy())
    assert not places, f"no values for {sorted(places)}"
    flush_to_disk(writer.path)


def _as_stored(name: str, value: Tensor) -> Tensor:
    """Return the tensor as the file has it: only matrices in half precision, which llama.cpp expects."""
    is_matrix = value.dim() == 2 and not name.startswith("v.position_embd.")
    return value if is_matrix else value.float()
