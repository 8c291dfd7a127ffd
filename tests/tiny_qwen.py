"""A tiny, seeded QWen checkpoint with the real vocabulary, written in the published format."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from qwen import QWenConfig, QWenLMHeadModel

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "kv_channels": 16,
    "intermediate_size": 128,
    "seq_length": 512,
}
GENERATION = {
    "chat_format": "chatml",
    "eos_token_id": 151643,
    "pad_token_id": 151643,
    "max_window_size": 24000,
    "max_new_tokens": 512,
    "do_sample": True,
    "top_k": 0,
    "top_p": 0.8,
}


def make_qwen_checkpoint(folder: Path, vocabulary: Path, *, seed: int = 0, std: float = 0.1, **overrides: Any) -> Path:
    """Write config.json, weights, qwen.tiktoken, tokenizer_config.json and generation_config.json."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = QWenLMHeadModel(QWenConfig(**{**SIZES, "initializer_range": std, **overrides}))
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_qwen.QWenConfig"}  # as published files have it
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(vocabulary, folder / "qwen.tiktoken")
    tokenizer_config = {
        "model_max_length": 8192,
        "tokenizer_class": "QWenTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    return folder
