"""The benchmarks of data and models of the real size, at sizes that take seconds."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from tiny_run import ROOT, environment, start
from transformers import CLIPVisionModel

from benchmarks import random_weights
from benchmarks.data import prepare
from benchmarks.training import full_size, memory, memory_run
from qwen import QWenLMHeadModel


def test_weights_in_shards_load_as_published(tmp_path, qwen_tiktoken):
    config = random_weights.qwen_config(layers=2, width=16, heads=2, inner=24, vocabulary=300)
    total = random_weights.write_language_model(tmp_path, config, torch.bfloat16, shard_bytes=8000)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    assert sum(shard.stat().st_size for shard in shards) >= total
    for shard in shards:
        with safe_open(shard, "pt") as file:
            names = list(file.keys())
        # The embedding alone is larger than a shard may be; nothing is added to it.
        assert len(names) == 1 or shard.stat().st_size < 8000 + 2000
    model = QWenLMHeadModel.from_pretrained(tmp_path)
    assert model.dtype == torch.bfloat16
    assert model.transformer.h[0].attn.c_attn.weight.float().std().item() == pytest.approx(0.02, rel=0.2)
    assert torch.equal(model.transformer.ln_f.weight, torch.ones(16, dtype=torch.bfloat16))
    assert not model.transformer.h[0].attn.c_attn.bias.any()
    assert (tmp_path / "qwen.tiktoken").read_bytes() == qwen_tiktoken.read_bytes()


def test_a_tower_in_shards_loads_as_published(tmp_path):
    random_weights.write_tower(tmp_path, random_weights.clip_config(2, 64, 128), torch.float32, shard_bytes=100_000)
    model = CLIPVisionModel.from_pretrained(tmp_path)
    assert model.config.hidden_size == 64
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_full_size_at_a_small_scale(tmp_path):
    command = [sys.executable, "-m", "benchmarks.training.full_size", "--folder", str(tmp_path), "--scale", "0.03"]
    done = subprocess.run(
        [*command, "--lora_rank", "2", "--output", str(tmp_path / "results")],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("as it should") == 7  # each of the others as it ends, and all four in the table
    results = json.loads((tmp_path / "results" / "full_size.json").read_text())["processes"]
    assert results["train.py, two steps"]["peak_bytes"] > results["train.py, two steps"]["anonymous_bytes"] > 1e8
    assert results["dry run"]["output"].startswith("parameters ")
    assert (tmp_path / "results" / "full_size.png").stat().st_size > 1000


def test_a_process_is_ended_where_memory_runs_low(tmp_path):
    watched = full_size.watch([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "log", 2**60)
    assert watched.status == -9
    assert watched.seconds < 30


def test_shapes_are_the_published_ones():
    assert full_size.shapes(1.0) == {
        "qwen": {"layers": 32, "width": 4096, "heads": 32, "inner": 11008, "vocabulary": 151936},
        "clip": {"layers": 24, "width": 1024, "inner": 4096},
    }


def test_prepare_at_a_small_scale(tmp_path):
    done = start(
        *(sys.executable, "-m", "benchmarks.data.prepare", "--scale", "0.01", "--output", tmp_path, "--pictures", "12")
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("3,100 samples")
    figures = json.loads((tmp_path / "prepare.json").read_text())["figures"]
    assert figures["a tenth"]["samples"] == 310
    assert 0 < figures["whole"]["worker_bytes"] < 200e6
    assert (tmp_path / "prepare.png").stat().st_size > 1000


def test_annotations_of_the_real_size_are_as_many_and_as_long(tmp_path):
    prepare.write_annotations(tmp_path, 0.001, pictures=3)
    records = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in ("ai_challenger", "detail")}
    assert [len(record["caption"]) for record in records["ai_challenger"]] == [5] * 210
    answers = [record["conversations"][1]["value"] for record in records["detail"]]
    assert 300 < sum(map(len, answers)) / len(answers) < 1000
    assert len(list((tmp_path / "photos").iterdir())) == 3


def test_memory_of_a_small_size_is_measured_beside_its_estimate(tmp_path, monkeypatch, qwen_tiktoken):
    size = memory_run.Size(2, 64, 96, 2, 400)
    memory_run.write_inputs(tmp_path, size, torch.float32, 4)
    found = memory_run.run(tmp_path, size, torch.float32, checkpointing=True)
    assert found["measured"] > 0
    assert found["language_head"] > 0
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    assert "off by" in memory.table({"small": {key: float(value) for key, value in found.items()}})
