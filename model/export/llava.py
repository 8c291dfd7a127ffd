"""The checkpoint as a LLaVA of transformers (`LlavaForConditionalGeneration`); `text_half.py` has the language model.

LLaVA takes the tower's hidden state before its last layer norm. CLIP's features are just that. SigLIP's have gone
through the norm, so one more block is written that does nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaConfig, PreTrainedConfig

from .norm_block import BLOCK_SCALE, norm_block
from .processor_files import write_processor
from .shards import ShardWriter
from .sources import Sources, tower_weights
from .text_half import TextHalf, text_half

_ODD_PARTS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "quick_gelu", "silu", "relu")
"""Activations f with f(x) - f(-x) = x, which the extra block needs."""


def check_llava(sources: Sources) -> None:
    """Refuse what a LLaVA folder cannot express.

    Raises:
        ValueError: with every reason.
    """
    tower, act = sources.tower, getattr(sources.vision, "hidden_act", None)
    reasons = [
        *misfits(sources),
        (tower.kind not in ("clip", "siglip"), f"the tower is {tower.kind}, and engines read CLIP and SigLIP"),
    ]
    if sources.takes_norm:
        norm, width, inner = "SigLIP's last norm becomes a block", tower.hidden_size, tower.intermediate_size
        reasons += [
            (sources.dtype == torch.float16, f"{norm} that overflows in float16 (give --dtype bfloat16)"),
            (inner < 2 * width, f"{norm} that needs 2 × {width} channels, and intermediate_size is {inner}"),
            (act not in _ODD_PARTS, f"{norm} that needs one of {', '.join(_ODD_PARTS)}, and hidden_act is {act!r}"),
        ]
    refuse(reasons, "llava")


def misfits(sources: Sources) -> list[tuple[bool, str]]:
    """Return what neither LLaVA nor llama.cpp can express about language model and projector: (it holds, reason)."""
    return [
        *text_half(sources).misfits(),
        (sources.checkpoint.projector_layers != 2, "the projector has one layer, and LLaVA's has two"),
        (sources.checkpoint.pixel_shuffle != 1, "pixel_shuffle joins patches, and LLaVA takes each as a token"),
    ]


def refuse(reasons: list[tuple[bool, str]], kind: str) -> None:
    """Raise ValueError with every reason that holds, if one does."""
    found = [reason for holds, reason in reasons if holds]
    if found:
        raise ValueError(f"--format {kind} can't express this model: {'; '.join(found)}. --format merged can")


def write_llava(sources: Sources, folder: Path, max_bytes: int) -> None:
    """Write all files of a LLaVA into an empty folder.

    Raises:
        ValueError: if the base models' files are incomplete.
        OSError: if files are missing or can't be written.
    """
    strategy = "default" if sources.tower.kind == "clip" or sources.drop_first_patch else "full"
    text = text_half(sources)
    _write_json(folder / "config.json", _config(sources, text, strategy))
    _write_json(folder / "generation_config.json", text.generation_config())
    text.write_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(text.chat_template(), encoding="utf-8")
    images = {
        "patch_size": sources.vision.patch_size,
        "vision_feature_select_strategy": strategy,
        "num_additional_image_tokens": 1 if sources.tower.kind == "clip" else 0,  # the class token
    }
    write_processor(folder, sources.vision_name, sources.tower.image_size, images)
    ShardWriter(folder, max_bytes).write(_weights(sources, text))


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# ---- Configuration


def _config(sources: Sources, language: TextHalf, strategy: str) -> dict[str, Any]:
    text, dtype = language.config(), str(sources.dtype).removeprefix("torch.")
    vision = sources.vision.to_dict() | {"dtype": dtype}
    if sources.takes_norm:
        vision["num_hidden_layers"] += 1
    llava: Any = LlavaConfig
    config = llava(
        architectures=["LlavaForConditionalGeneration"],
        vision_config=vision,
        text_config=dict(text),
        image_token_index=language.image_token_id,
        image_seq_length=sources.tower.num_image_tokens,
        projector_hidden_act="gelu",
        multimodal_projector_bias=True,
        vision_feature_layer=sources.tower.feature_layer,
        vision_feature_select_strategy=strategy,
        tie_word_embeddings=text["tie_word_embeddings"],
        eos_token_id=text["eos_token_id"],
        pad_token_id=text["pad_token_id"],
        dtype=dtype,
    ).to_dict()
    parts = {"text_config": _own(text), "vision_config": _own(config["vision_config"])}
    return _own(config) | parts


def _own(config: dict[str, Any]) -> dict[str, Any]:
    """Leave out what every configuration has (and a path of this machine), but for what engines look for."""
    kept = ("architectures", "dtype", "model_type", "transformers_version")
    common = PreTrainedConfig().to_dict().keys() | {"_name_or_path"}
    return {name: value for name, value in config.items() if name in kept or name not in common}


# ---- Weights


def _weights(sources: Sources, text: TextHalf) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor under the names that LLaVA's published checkpoints have; all engines know these."""
    for name, value in _tower(sources):
        yield f"vision_tower.vision_model.{name}", value
    scale = 1 / BLOCK_SCALE if sources.takes_norm else 1.0
    for theirs, ours in (("linear_1", "0"), ("linear_2", "2")):
        weight, bias = (sources.projector[f"{ours}.{kind}"] for kind in ("weight", "bias"))
        yield f"multi_modal_projector.{theirs}.weight", (weight * (scale if ours == "0" else 1)).to(sources.dtype)
        yield f"multi_modal_projector.{theirs}.bias", bias.to(sources.dtype)
    yield from ((f"language_model.{name}", value) for name, value in text.weights())


def _tower(sources: Sources) -> Iterator[tuple[str, Tensor]]:
    norm = {}
    for name, value in tower_weights(sources):
        yield name, value
        if name.startswith("post_layernorm."):
            norm[name.removeprefix("post_layernorm.")] = value.clone()
    if sources.takes_norm:
        number = sources.vision.num_hidden_layers
        block = norm_block(norm["weight"], norm["bias"], sources.tower.intermediate_size)
        yield from ((f"encoder.layers.{number}.{name}", value) for name, value in block.items())
