"""Tiny random language models of several families, as a hub would hold them: weights, tokenizer and chat template."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny_qwen import enliven
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

# Written for these tests, each with the peculiarities of its family.
CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
HEADERS = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] | trim %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{{ '<|header|>system<|/header|>\n\nToday: ' + strftime_now('%d %b %Y') + '\n\n' + system + '<|eot_id|>' }}"
    "{% for m in messages %}{{ '<|header|>' + m['role'] + '<|/header|>\n\n' + m['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|header|>assistant<|/header|>\n\n' }}{% endif %}"
)
INSTRUCTIONS = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST]' + m['content'] + '[/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)

FAMILIES: dict[str, tuple[type[PreTrainedConfig], str, list[str], dict[str, str]]] = {
    "qwen2": (
        Qwen2Config,
        CHATML,
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    ),
    "qwen3": (
        Qwen3Config,
        THINKING,
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"],
        {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    ),
    "llama": (
        LlamaConfig,
        HEADERS,
        ["<|begin|>", "<|eot_id|>", "<|header|>", "<|/header|>"],
        {"eos_token": "<|eot_id|>", "bos_token": "<|begin|>"},
    ),
    "mistral": (
        MistralConfig,
        INSTRUCTIONS,
        ["<s>", "</s>", "[INST]", "[/INST]"],
        {"eos_token": "</s>", "bos_token": "<s>"},
    ),
}
"""For each family: configuration, chat template, control tokens, and the tokens that have a role."""


def make_tokenizer(family: str, template: str | None = None) -> PreTrainedTokenizerFast:
    """Make a byte-level tokenizer with the family's control tokens."""
    _, own_template, control, roles = FAMILIES[family]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=control, show_progress=False
    )
    tokenizer.train_from_iterator(["what colour is the picture? it is red. system user assistant"] * 2, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)
    fast.chat_template = own_template if template is None else template
    return fast


def make_family(
    folder: Path, family: str, seed: int = 0, config_class: type[PreTrainedConfig] | None = None, **changes: object
) -> str:
    """Make a checkpoint folder of a tiny random model, maybe of another kind with this tokenizer; return its path."""
    tokenizer = make_tokenizer(family)
    sizes = {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = (config_class or FAMILIES[family][0])(**{**sizes, **changes})
    torch.manual_seed(seed)
    model = enliven(AutoModelForCausalLM.from_config(config), seed)
    model.generation_config.max_new_tokens = 8
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return str(folder)
