"""The language model's half of a GGUF: what llama.cpp has to know of it, and its tensors' names there."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from dataset.chat_template import TEMPLATE_SETTINGS

from .family_text import FamilyText
from .gguf_tokenizer import add_tokenizer, end_ids, tokenizer_misfits
from .qwen_text import QwenText, as_qwen2
from .sources import Sources, language_weights
from .text_half import TextHalf

FAMILIES = ("qwen2", "qwen3", "llama")
"""Language models besides QWen; llama.cpp's names of the architectures are the same."""
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_BIASES = ("attn_q.bias", "attn_k.bias", "attn_v.bias")
"""Those of Qwen2; no other family has any."""

# ---- What cannot be expressed


def text_misfits(sources: Sources, half: TextHalf) -> list[tuple[bool, str]]:
    """Return what llama.cpp cannot express of the language model: (it holds, reason)."""
    config = half.config()
    kind, rotary = config["model_type"], config.get("rope_parameters") or {}
    rope, part = rotary.get("rope_type", "default"), rotary.get("partial_rotary_factor", 1)
    width = config["num_attention_heads"] * _head_dim(config)
    unknown = sorted(name for name, _ in _shapes(sources, half) if _is_foreign(name, kind))
    ends = [] if isinstance(half, QwenText) else end_ids(half)
    return [
        (
            kind == "qwen2" and width != config["hidden_size"],
            f"all heads together are {width} wide, and hidden_size is {config['hidden_size']}",
        ),
        (rope != "default", f"rope_type is {rope!r}, and only unscaled rotation can be written"),
        (part != 1, f"partial_rotary_factor is {part}, and only whole heads can be rotated"),
        ("sliding_attention" in (config.get("layer_types") or ()), "layers with a sliding window can't be written"),
        (config["hidden_act"] != "silu", f"hidden_act of the language model is {config['hidden_act']!r}, not silu"),
        (bool(unknown), f"llama.cpp's {kind} has no place for {', '.join(unknown[:3])}"),
        (len(ends) > 3, f"{len(ends)} tokens end an answer, and llama.cpp has names for three"),
        *([] if isinstance(half, QwenText) else tokenizer_misfits(half)),
    ]


def _is_foreign(name: str, kind: str) -> bool:
    new = _gguf_name(name)
    return new is None or (new.endswith(".bias") and not (kind == "qwen2" and new.endswith(_BIASES)))


# ---- Metadata


def add_text_metadata(writer: Any, sources: Sources, half: TextHalf) -> None:
    """Add all that llama.cpp has to know before it reads tensors."""
    config = half.config()
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(_head_dim(config))
    writer.add_value_length(_head_dim(config))
    writer.add_rope_dimension_count(_head_dim(config))
    writer.add_rope_freq_base(float(config["rope_theta"]))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    add_tokenizer(writer, sources, half)
    writer.add_chat_template(half.chat_template() if isinstance(half, QwenText) else _family_template(half))
    _add_sampling(writer, half.generation_config())


def text_notes(half: TextHalf) -> list[str]:
    """Return what differs from test.py."""
    if isinstance(half, QwenText):
        return half.notes()
    return [
        "**Chat template**: the language model's own. Where it trims texts, spaces at their ends are lost; test.py "
        "keeps\n  them. Thinking is always off, and a template that writes the date always gets 26 July 2024, as in "
        "training."
    ]


def _head_dim(config: dict[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _family_template(half: FamilyText) -> str:
    """Return the family's template with the settings of training: llama.cpp would turn thinking on by itself."""
    settings = "".join(f"{{%- set {name} = {json.dumps(value)} -%}}\n" for name, value in TEMPLATE_SETTINGS.items())
    return f"{settings}{{{{- '' }}}}{half.chat.template}"


def _add_sampling(writer: Any, settings: dict[str, Any]) -> None:
    """Add the settings for sampling where a request has none; llama.cpp's own defaults differ from transformers'."""
    is_drawn = settings.get("do_sample", False)
    writer.add_sampling_temp(float(settings.get("temperature", 1.0)) if is_drawn else 0.0)
    writer.add_sampling_top_k(int(settings.get("top_k", 50)))
    writer.add_sampling_top_p(float(settings.get("top_p", 1.0)))
    writer.add_sampling_min_p(float(settings.get("min_p", 0.0)))
    if "repetition_penalty" in settings:
        writer.add_sampling_penalty_repeat(float(settings["repetition_penalty"]))
        writer.add_sampling_penalty_last_n(-1)  # counted over the whole conversation


# ---- Tensors


def text_shapes(sources: Sources, half: TextHalf) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of the file on the meta device, by its name there."""
    return _renamed(_shapes(sources, half), sources)


def text_weights(sources: Sources, half: TextHalf) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor, LoRA merged; llama.cpp needs no row for an image token."""
    return _renamed(_published(language_weights(sources), sources, half), sources)


def _shapes(sources: Sources, half: TextHalf) -> Iterator[tuple[str, Tensor]]:
    tensors = (
        (name, torch.empty(shape, dtype=sources.dtype, device="meta"))
        for name, shape in sources.language_shapes.items()
        if not (sources.is_tied and name == sources.names.head)
    )
    return _published(tensors, sources, half)


def _published(tensors: Iterable[tuple[str, Tensor]], sources: Sources, half: TextHalf) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors as published files of a Qwen2, Qwen3 or Llama have them."""
    for name, value in tensors:
        if isinstance(half, QwenText):
            yield from as_qwen2(name, value)
        else:
            yield name, value


def _renamed(tensors: Iterable[tuple[str, Tensor]], sources: Sources) -> Iterator[tuple[str, Tensor]]:
    config: Any = sources.language
    heads = {"attn_q": config.num_attention_heads, "attn_k": getattr(config, "num_key_value_heads", None)}
    for name, value in tensors:
        new = _gguf_name(name)
        assert new is not None  # else refused
        part = new.split(".")[-2]
        yield new, interleaved(value, heads[part]) if config.model_type == "llama" and part in heads else value


def _gguf_name(name: str) -> str | None:
    """Return `blk.3.attn_q.weight` for `model.layers.3.self_attn.q_proj.weight`, or None for what llama.cpp lacks."""
    module, kind = name.rsplit(".", 1)
    if module in _NAMES:
        return f"{_NAMES[module]}.{kind}"
    number, part = module.removeprefix("model.layers.").split(".", 1)
    return f"blk.{number}.{_NAMES[part]}.{kind}" if part in _NAMES else None


def interleaved(W: Tensor, heads: int) -> Tensor:
    """Reorder the rows of W (heads · D, K): llama.cpp's Llama turns channels 2i and 2i + 1 of a head together, and
    transformers i and i + D / 2.
    """
    return W.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
