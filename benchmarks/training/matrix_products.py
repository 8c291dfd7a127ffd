"""The matrix products that a training step cannot do without: counted, and how fast this machine does them alone."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import nn

from model import VisionLanguageModel

Product = tuple[int, int, int]
"""(m, k, n): (m, k) times (k, n), which takes 2 · m · k · n floating-point operations."""


def counted_products(model: VisionLanguageModel, batches: Iterable[tuple[int, ...]]) -> Counter[Product]:
    """Count the products of training steps.

    A frozen matrix multiplies twice (forward, and the gradient of its input), a trained one three times; the tower runs
    forward only; the head, and the last layer after its attention, run at supervised positions only. Attention's
    products count by half, being causal.

    Args:
        model: ours, with LoRA.
        batches: (rows, tokens, real tokens, supervised tokens, images) of each step.
    """
    work: Counter[Product] = Counter()
    for rows, tokens, _, supervised, images in batches:
        _count_text(work, model, rows, tokens, supervised)
        _count_tower(work, model.vision_tower, images)
        for layer in model.projector:
            if isinstance(layer, nn.Linear):
                _count_trained(work, images * model.num_image_tokens, layer, first=layer is model.projector[0])
    return work


def _count_frozen(work: Counter[Product], m: int, layer: Any) -> None:
    n, k = layer.weight.shape
    work[m, k, n] += 1
    work[m, n, k] += 1


def _count_trained(work: Counter[Product], m: int, layer: Any, first: bool = False) -> None:
    n, k = layer.weight.shape
    work[m, k, n] += 1
    work[n, m, k] += 1  # of the weight
    if not first:  # nothing below is trained
        work[m, n, k] += 1


def _count_text(work: Counter[Product], model: VisionLanguageModel, rows: int, tokens: int, supervised: int) -> None:
    last = f"{len(model.qwen.transformer.h) - 1}."
    for name, module in model.qwen.transformer.h.named_modules():
        everywhere = "c_attn" in name or not name.startswith(last)
        m = rows * tokens if everywhere else supervised  # the last layer mixes no positions after its attention
        if isinstance(module, LoraLinear):
            _count_frozen(work, m, module.base_layer)
            _count_trained(work, m, module.lora_A["default"])
            _count_trained(work, m, module.lora_B["default"])
        elif isinstance(module, nn.Linear) and name.endswith("c_proj"):
            _count_frozen(work, m, module)
    config = model.qwen.config
    attention = rows * config.num_attention_heads * config.num_hidden_layers
    # Scores and their weighting, forward and, each with two gradients, backward; one half of each is masked.
    work[tokens, config.kv_channels, tokens] += 6 * attention // 2
    _count_frozen(work, supervised, model.qwen.lm_head)


def _count_tower(work: Counter[Product], tower: Any, images: int) -> None:
    config = tower.config
    tokens = tower.num_image_tokens + tower.num_skipped
    for layer in tower.modules():
        if isinstance(layer, nn.Linear):
            n, k = layer.weight.shape
            work[images * tokens, k, n] += 1
    work[images * tokens, 3 * config.patch_size**2, config.hidden_size] += 1
    width = config.hidden_size // config.num_attention_heads
    work[tokens, width, tokens] += 2 * images * config.num_attention_heads * config.num_hidden_layers


def seconds_of_products(work: Counter[Product], dtype: torch.dtype, rounds: int = 3) -> tuple[float, float]:
    """Time the products when nothing else runs, each shape by itself; the median of the rounds counts.

    Returns:
        Processor seconds, of all threads, and floating-point operations.
    """
    seconds = flops = 0.0
    for (m, k, n), count in work.items():
        a, b = torch.randn(m, k, dtype=dtype), torch.randn(n, k, dtype=dtype).t()
        torch.mm(a, b)
        calls = max(2, min(50, int(2e9 / (2 * m * k * n))))
        taken = []
        for _ in range(rounds):
            start = time.process_time()
            for _ in range(calls):
                torch.mm(a, b)
            taken.append((time.process_time() - start) / calls)
        seconds += count * sorted(taken)[len(taken) // 2]
        flops += count * 2.0 * m * k * n
    return seconds, flops
