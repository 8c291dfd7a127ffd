"""What the benchmark of the training step says of operations and ratios."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from tiny_vlm import collate, enliven_trained, new_model, sample
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.peers import TINY
from benchmarks.small_vocabulary import fold, fold_labels
from benchmarks.training import train_step
from benchmarks.training.step_inputs import write_data, write_ours
from benchmarks.training.step_runs import build_ours
from benchmarks.training.step_work import counted_work, gemm_seconds


def flops(work: Counter) -> int:
    return sum(2 * m * k * n * count for (m, k, n), count in work.items())


def test_the_operations_are_those_that_a_step_does(tiny_bases):
    model = enliven_trained(new_model(tiny_bases))
    batch = collate(sample(1, num_words=30, num_answer=5), sample(1, num_words=30, num_answer=5, seed=1))
    rows, tokens = batch["input_ids"].shape
    batches = [(rows, tokens, rows * tokens, 10, 2)]
    with FlopCounterMode(display=False) as counter:
        model.train()(**batch, return_logits=False).loss.backward()
    products = counter.get_flop_counts()["Global"]
    seen = sum(number for op, number in products.items() if "attention" not in str(op))
    config, tower = model.qwen.config, model.vision_tower.config
    by_text = 6 * tokens * config.kv_channels * tokens * rows * config.num_attention_heads * config.num_hidden_layers
    width = tower.hidden_size // tower.num_attention_heads
    by_tower = 4 * 5 * width * 5 * 2 * tower.num_attention_heads * tower.num_hidden_layers
    assert flops(counted_work(model, batches)) - by_text - by_tower == pytest.approx(seen, rel=0.02)


def test_bare_products_are_timed_once_for_each_shape():
    seconds, operations = gemm_seconds(Counter({(8, 4, 2): 3}), torch.float32, rounds=1)
    assert seconds > 0
    assert operations == 3 * 2 * 8 * 4 * 2


def test_ids_are_folded_onto_the_rows_there_are():
    plain = torch.nn.Embedding(10, 3)
    folded = fold(plain)
    assert torch.equal(folded(torch.tensor([3, 13, 20])), F.embedding(torch.tensor([3, 3, 0]), plain.weight))
    assert fold_labels({"labels": torch.tensor([-100, 12])}, 10)["labels"].tolist() == [-100, 2]


def test_ratios_are_over_the_peer():
    one = {"samples_per_second": 2.0, "processor_seconds": 1.0, "peak_bytes_vm": 6, "baseline_bytes": 2}
    peer = {"samples_per_second": 0.5, "processor_seconds": 3.0, "peak_bytes_vm": 10, "baseline_bytes": 2}
    assert train_step.ratios({"ours": one, "peer": peer}, "ours") == {
        "speed": 4.0,
        "by_processor": 3.0,
        "memory": 0.6,
        "less_start": 0.5,
    }


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_small_vocabulary_is_trained_wherever_the_model_is_built(tmp_path, workers):
    """By `workers.py` too, which trains what `build_ours` gives, as it is."""
    write_data(tmp_path, 4)
    write_ours(tmp_path, replace(TINY, vocabulary=4748))
    flags = ["--dataloader_num_workers", workers, "--lora_rank", "4"]
    trainer = build_ours(tmp_path, str(tmp_path / "out"), "float32", 1, flags)
    assert math.isfinite(trainer.train().training_loss)
