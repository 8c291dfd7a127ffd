"""Tiny QWen models with lively random weights, and transformers' Qwen2 with the same weights, for the tests."""

from __future__ import annotations

import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from qwen import QWenConfig, QWenLMHeadModel

torch.set_num_threads(1)  # for matrices as small as these, handing work to threads costs many times what it saves


def tiny_config(**changes) -> QWenConfig:
    """Two layers, two heads of 8 channels, 16 wide, and a trained context that short tests do not pass."""
    sizes = {
        "vocab_size": 200,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "kv_channels": 8,
        "intermediate_size": 48,
        "seq_length": 512,
    }
    return QWenConfig(**{**sizes, **changes})


def enliven(model: nn.Module, seed: int = 0, std: float = 0.2) -> nn.Module:
    """Draw weights so large that every part of the model shows in the logits, norms and biases included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, std, generator=generator)
            else:
                parameter.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


def tiny_model(cls: type = QWenLMHeadModel, seed: int = 0, *, attn_implementation: str | None = None, **changes):
    """A model in eval mode, fp32."""
    config = tiny_config(**changes)
    config._attn_implementation = attn_implementation or "sdpa"
    return enliven(cls(config), seed)


def as_qwen2(model: QWenLMHeadModel, rope_theta: float | None = None) -> Qwen2ForCausalLM:
    """Transformers' Qwen2 with the weights of `model`: the same architecture without NTK and log-n."""
    config = model.config
    width = config.num_attention_heads * config.kv_channels
    twin = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_attention_heads,
            head_dim=config.kv_channels,
            intermediate_size=config.intermediate_size // 2,
            rms_norm_eps=config.layer_norm_epsilon,
            rope_parameters={"rope_type": "default", "rope_theta": float(rope_theta or config.rotary_emb_base)},
            tie_word_embeddings=False,
        )
    )
    ours = model.state_dict()
    theirs = {
        "model.embed_tokens.weight": ours["transformer.wte.weight"],
        "model.norm.weight": ours["transformer.ln_f.weight"],
        "lm_head.weight": ours["lm_head.weight"],
    }
    for i in range(config.num_hidden_layers):
        a, b = f"transformer.h.{i}.", f"model.layers.{i}."
        for j, part in enumerate("qkv"):
            for kind in ("weight", "bias"):
                theirs[f"{b}self_attn.{part}_proj.{kind}"] = ours[f"{a}attn.c_attn.{kind}"][j * width : (j + 1) * width]
        theirs[b + "self_attn.o_proj.weight"] = ours[a + "attn.c_proj.weight"]
        theirs[b + "mlp.up_proj.weight"] = ours[a + "mlp.w1.weight"]
        theirs[b + "mlp.gate_proj.weight"] = ours[a + "mlp.w2.weight"]
        theirs[b + "mlp.down_proj.weight"] = ours[a + "mlp.c_proj.weight"]
        theirs[b + "input_layernorm.weight"] = ours[a + "ln_1.weight"]
        theirs[b + "post_attention_layernorm.weight"] = ours[a + "ln_2.weight"]
    twin.load_state_dict(theirs)  # strict: every weight is mapped
    return twin.eval()


def random_ids(*shape: int, vocab_size: int = 200, seed: int = 1) -> torch.Tensor:
    """Token ids, the same at every call."""
    return torch.randint(0, vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def left_padded(rows: list[torch.Tensor], pad_id: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Stack rows (T,) of several lengths; returns ids and mask (B, longest)."""
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), pad_id)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, longest - len(row) :] = row
        mask[i, longest - len(row) :] = 1
    return ids, mask
