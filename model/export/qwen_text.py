"""QWen as engines know it: a Qwen2, which is the same architecture under other names, with q, k and v apart.

Qwen2 has neither log-n attention nor dynamic NTK, so the two agree up to QWen's `seq_length`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import Qwen2Config

from qwen import QWenConfig, QWenTokenizer
from qwen.tokenization_qwen import ENDOFTEXT_ID, IMAGE_TOKEN_ID

from .processor_files import chat_template, write_tokenizer
from .sources import Sources, base_file, language_weights

_TEXT_TOKENS = 64
"""About the length of a system prompt, a short question and a short answer."""
_SAMPLING = ("temperature", "top_p", "top_k")
_NAMES = {
    "transformer.wte": "model.embed_tokens",
    "transformer.ln_f": "model.norm",
    "lm_head": "lm_head",
    "attn.c_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.up_proj",
    "mlp.w2": "mlp.gate_proj",
    "mlp.c_proj": "mlp.down_proj",
    "ln_1": "input_layernorm",
    "ln_2": "post_attention_layernorm",
}


class QwenText:
    """The language model of an export, if it is QWen; see `text_half`."""

    name = "QWen"

    def __init__(self, sources: Sources, language: QWenConfig) -> None:
        self.sources, self.language = sources, language
        self.image_token_id = IMAGE_TOKEN_ID
        self.max_length: int | None = language.seq_length

    def misfits(self) -> list[tuple[bool, str]]:
        """Return what Qwen2 cannot express: (it holds, reason)."""
        language, needed = self.language, self.sources.tower.num_image_tokens + _TEXT_TOKENS
        stretches = language.use_dynamic_ntk or language.use_logn_attn
        return [
            (
                stretches and needed > language.seq_length,
                f"a question with a picture takes {needed} tokens or more and seq_length is {language.seq_length}, "
                "beyond which QWen changes its attention and Qwen2 does not",
            ),
            (not language.no_bias, "no_bias is false, and Qwen2 has biases for q, k and v only"),
            (not language.scale_attn_weights, "scale_attn_weights is false, and Qwen2 always scales"),
            (language.rotary_pct != 1, f"rotary_pct is {language.rotary_pct}, and Qwen2 turns all channels of a head"),
        ]

    def config(self) -> dict[str, Any]:
        """Return the configuration of a Qwen2."""
        qwen = self.language
        qwen2: Any = Qwen2Config
        values: dict[str, Any] = qwen2(
            architectures=["Qwen2ForCausalLM"],
            vocab_size=qwen.vocab_size,
            hidden_size=qwen.hidden_size,
            intermediate_size=qwen.intermediate_size // 2,
            num_hidden_layers=qwen.num_hidden_layers,
            num_attention_heads=qwen.num_attention_heads,
            num_key_value_heads=qwen.num_attention_heads,
            head_dim=qwen.kv_channels,
            max_position_embeddings=qwen.seq_length,
            rms_norm_eps=qwen.layer_norm_epsilon,
            rope_parameters={"rope_type": "default", "rope_theta": float(qwen.rotary_emb_base)},
            use_sliding_window=False,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=ENDOFTEXT_ID,
            pad_token_id=ENDOFTEXT_ID,
            dtype=str(self.sources.dtype).removeprefix("torch."),
        ).to_dict()
        return values | {"rope_theta": float(qwen.rotary_emb_base)}  # some engines read it here alone

    def generation_config(self) -> dict[str, Any]:
        """Keep the base model's own settings, so that answers are drawn as by test.py; ChatML's tokens end them."""
        path = base_file(self.sources.language_name, "generation_config.json")
        base = json.loads(path.read_text(encoding="utf-8")) if path is not None else {}
        names = ("max_new_tokens", "repetition_penalty", "do_sample", *(_SAMPLING if base.get("do_sample") else ()))
        kept = {name: base[name] for name in names if base.get(name) is not None}
        return kept | {"eos_token_id": sorted(QWenTokenizer.stop_ids), "pad_token_id": ENDOFTEXT_ID}

    def write_tokenizer(self, folder: Path) -> None:
        """Write the tokenizer as Qwen2's."""
        tokenizer = QWenTokenizer.from_pretrained(self.sources.language_name)
        write_tokenizer(folder, tokenizer, self.language.seq_length)

    def chat_template(self) -> str:
        """Return ChatML with test.py's default system prompt."""
        return chat_template()

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield Qwen2's tensors, LoRA merged."""
        for name, value in language_weights(self.sources):
            yield from as_qwen2(name, value)

    def notes(self) -> list[str]:
        """Return what differs from test.py."""
        length, tokens = self.language.seq_length, self.sources.tower.num_image_tokens
        return [
            "**Length**: Qwen2 has neither log-n attention nor dynamic NTK, so answers are equal up to "
            f"{length} tokens, pictures\n  included ({tokens} tokens each).",
            "**No system prompt** means test.py's default one, which the chat template puts in.",
        ]


def as_qwen2(name: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of Qwen2 that a tensor of QWen holds: one, or q, k and v."""
    module, kind = name.rsplit(".", 1)
    if module in _NAMES:
        yield f"{_NAMES[module]}.{kind}", value
        return
    number, part = module.removeprefix("transformer.h.").split(".", 1)
    layer = f"model.layers.{number}"
    if part == "attn.c_attn":
        for letter, third in zip("qkv", value.chunk(3), strict=True):
            yield f"{layer}.self_attn.{letter}_proj.{kind}", third
    else:
        yield f"{layer}.{_NAMES[part]}.{kind}", value
