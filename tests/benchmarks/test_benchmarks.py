"""The benchmarks: that each starts and compares like with like, on a model of no size; and what their tables say."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch
from safetensors import safe_open
from tiny_run import start
from transformers import CLIPVisionModel

from benchmarks import measure, random_weights
from benchmarks.answering import load
from benchmarks.peers import TINY, build_ours, build_peer, copy_weights
from benchmarks.training import full_size
from qwen import IMAGE_TOKEN_ID, QWenLMHeadModel


def run(name: str, folder, *flags: object) -> tuple[str, dict]:
    """Run a benchmark's command; returns what it printed and what it wrote."""
    done = start(sys.executable, "-m", f"benchmarks.{name}", "--output", folder, *flags)
    assert done.returncode == 0, done.stderr
    name = name.split(".")[-1]
    assert (folder / f"{name}.png").stat().st_size > 1000
    return done.stdout, json.loads((folder / f"{name}.json").read_text())


# ---- Measuring


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_every_round_runs_all_and_turns_the_order(tmp_path):
    log = tmp_path / "log"
    write = "import sys; open(sys.argv[1], 'a').write(sys.argv[2])"
    runs = measure.run_in_turn({name: [*python(write), str(log), name] for name in "abc"}, 3)
    assert log.read_text() == "abccbaabc"
    assert {name: [run.values for run in done] for name, done in runs.items()} == {name: [{}] * 3 for name in "abc"}


def test_a_process_is_measured_by_itself():
    code = (
        "import json, os, resource, time; x = b'x' * {}; time.sleep(0.1); print('x');"
        "print(json.dumps({{'own': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,"
        " 'threads': os.environ['OMP_NUM_THREADS']}}))"
    )
    for size in (300, 900):
        run = measure.run_once(python(code.format(size * 2**20)), threads=3)
        assert abs(run.peak_bytes - run.values["own"] * 1024) < 8 * 2**20
        assert run.peak_bytes > size * 2**20
        assert run.seconds > 0.1
        assert run.values["threads"] == "3"


def test_weights_in_shards_load_as_published(tmp_path, qwen_tiktoken):
    config = random_weights.qwen_config(layers=2, width=16, heads=2, inner=24, vocabulary=300)
    total = random_weights.write_language_model(tmp_path / "qwen", config, torch.bfloat16, shard_bytes=8000)
    shards = sorted((tmp_path / "qwen").glob("*.safetensors"))
    assert len(shards) > 2
    assert sum(shard.stat().st_size for shard in shards) >= total
    for shard in shards:
        with safe_open(shard, "pt") as file:
            # The embedding alone is larger than a shard may be; nothing is added to it.
            assert len(list(file.keys())) == 1 or shard.stat().st_size < 8000 + 2000
    model = QWenLMHeadModel.from_pretrained(tmp_path / "qwen")
    assert model.dtype == torch.bfloat16
    assert model.transformer.h[0].attn.c_attn.weight.float().std().item() == pytest.approx(0.02, rel=0.2)
    assert (tmp_path / "qwen/qwen.tiktoken").read_bytes() == qwen_tiktoken.read_bytes()
    random_weights.write_tower(tmp_path / "clip", random_weights.clip_config(2, 64, 128), shard_bytes=100_000)
    assert CLIPVisionModel.from_pretrained(tmp_path / "clip").config.hidden_size == 64


# ---- Training


def test_both_peers_are_the_same_function():
    ours, peer = build_ours(TINY, torch.float32), build_peer(TINY, torch.float32)
    copy_weights(ours, peer)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in peer.parameters())
    ids = torch.tensor([[1, 2, *[IMAGE_TOKEN_ID] * TINY.num_image_tokens, 3, 4]])
    pixels = torch.randn(1, 3, TINY.image_size, TINY.image_size)
    with torch.no_grad():
        expected = peer(input_ids=ids, pixel_values=pixels).logits
        torch.testing.assert_close(ours(ids, pixel_values=pixels).logits, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("language_model", ["qwen", "qwen2"])
def test_train_step_compares_from_the_same_loss(tmp_path, language_model):
    flags = ["--tiny", "--rounds", 1, "--sizes", "proportional", "--dtypes", "float32", "--steps", 2, "--skipped", 1]
    printed, results = run("training.train_step", tmp_path, *flags, "--language_model", language_model)
    ((size, by_dtype),) = results["sizes"].items()
    assert size == {"qwen": "proportional", "qwen2": "proportional, Qwen2"}[language_model]
    assert printed.splitlines()[1].startswith(f"{size}, float32  peer ")
    peers = by_dtype["float32"]["peers"]
    assert peers["ours"]["padding"] == peers["peer"]["padding"]
    assert peers["ours"]["first_loss"] == pytest.approx(peers["peer"]["first_loss"], rel=1e-5)
    assert peers["ours"]["trained_parameters"] > 1000


@pytest.mark.slow
def test_grouped_compares_the_same_samples(tmp_path):
    flags = ["--tiny", "--rounds", 1, "--scale", 0.01, "--batches", 4, "--samples", 8]
    printed, results = run("training.grouped", tmp_path, *flags)
    assert printed.startswith("3,100 samples ")
    shares = results["counted"]["shares"]
    assert 0 < shares["grouped, batch 4"]["padding"] < 0.03 < shares["random, batch 4"]["padding"]
    random, ordered = (results["measured"]["4"][name] for name in ("random", "grouped"))
    assert random["samples"] == ordered["samples"] == 8
    assert ordered["padding"] < random["padding"]
    # Eight samples of the same real tokens, in different times.
    tokens = [one["tokens_per_second"] / one["samples_per_second"] for one in (random, ordered)]
    assert tokens[0] == pytest.approx(tokens[1])


@pytest.mark.slow
def test_growth_changes_one_thing_and_compares_it_with_the_base(tmp_path):
    flags = ["--tiny", "--rounds", 1, "--things", "checkpointing", "cache", "--steps", 2, "--tokens", 2]
    printed, results = run("training.growth", tmp_path, *flags)
    lines = [line.split() for line in printed.splitlines()]
    assert lines[1][:2] == ["checkpointing", "off"]
    assert lines[1][3::2] == ["1.00", "1.00"]
    assert lines[2][0] == "on"
    assert results["figures"]["checkpointing"]["on"]["step_seconds"] > 0
    assert results["figures"]["cache"]["2,048 tokens"]["step_seconds"] > 0


@pytest.mark.slow
def test_workers_deliver_what_is_trained(tmp_path):
    flags = ["--tiny", "--rounds", 1, "--workers", 2, "--steps", 3, "--skipped", 1, "--pictures", 44]
    printed, results = run("training.workers", tmp_path, *flags)
    assert printed.splitlines()[1].split()[0] == "2"
    (one,) = results["figures"].values()
    assert 0 < one["wait_seconds"] < one["step_seconds"]
    assert 100_000 < one["picture_bytes"] < 200_000, "as photographs of that size have"


@pytest.mark.slow
def test_full_size_at_a_small_scale(tmp_path):
    flags = ["--folder", tmp_path / "files", "--scale", "0.03", "--lora_rank", 2]
    printed, results = run("training.full_size", tmp_path, *flags)
    assert printed.count("as it should") == 7  # each of the others as it ends, and all four in the table
    training = results["processes"]["train.py, two steps"]
    assert training["peak_bytes"] > training["anonymous_bytes"] > 1e8


@pytest.mark.slow
def test_an_export_holds_no_more_of_a_deeper_model(tmp_path):
    peaks = []
    for layers in (2, 8):
        flags = ["--folder", tmp_path / "files", "--scale", "0.25", "--layers", layers, "--lora_rank", 2]
        printed, results = run("answering.export", tmp_path, *flags)
        assert printed.count("as it should") == 2
        peaks.append(results["processes"]["export.py"]["anonymous_bytes"])  # mapped pages can be dropped
        written = sum(path.stat().st_size for path in (tmp_path / "files" / "llava").glob("*.safetensors"))
        shutil.rmtree(tmp_path / "files")
    sizes = full_size.shapes(0.25)["qwen"]
    layer = 2 * sizes["width"] * (4 * sizes["width"] + 3 * sizes["inner"])  # bytes in bf16
    assert written > 8 * layer > 2e8
    assert peaks[1] - peaks[0] < 2 * layer, "six layers more"


def test_a_process_is_ended_where_memory_runs_low(tmp_path):
    assert full_size.watch([sys.executable, "-c", "import time; time.sleep(600)"], tmp_path / "log", 2**60).status == -9


# ---- Answering and data


@pytest.mark.slow
def test_generate_gets_the_same_tokens_from_both(tmp_path):
    flags = ["--tiny", "--dtypes", "float32", "--batches", "2", "--tokens", "4", "--rounds", "1", "--clock", "cpu"]
    printed, results = run("answering.generate", tmp_path, *flags)
    assert "fp32, batch 2: the same tokens from both" in printed
    figures = results["medians"]["fp32, batch 2"]
    assert all(figures[peer][name] > 0 for peer in ("ours", "llava") for name in ("first", "whole", "rate"))


@pytest.mark.slow
def test_load_starts_both(tmp_path):
    printed, results = run("answering.load", tmp_path, "--layers", 1, "--width", 64, "--rounds", 1)
    assert printed.splitlines()[1].startswith("seconds ")
    assert results["medians"]["llava"]["files"] > 1e6


def test_the_imports_are_taken_off_within_a_round():
    """In rounds that were slow for both: of the medians alone, the difference would be 5 - 1 = 4 seconds."""

    def took(*seconds: float) -> list[measure.Run]:
        return [measure.Run(one, 2 * one, int(one * 1e9), {}) for one in seconds]

    runs = {"ours": took(3, 9, 5), "ours, imports": took(1, 8, 1), "llava": took(4, 5, 6)}
    figures = load.figures_of({**runs, "llava, imports": took(0.5, 1, 2)})
    assert figures["ours, less imports"] == {"seconds": 2, "cpu_seconds": 4, "peak_bytes": 2e9}
    figures["ours"]["files"] = figures["llava"]["files"] = 1e9
    lines = load.show(figures).splitlines()
    assert lines[1].split()[-3:] == ["5.00", "5.00", "1.00x"]
    assert lines[2].split()[-3:] == ["2.00", "4.00", "2.00x"]


@pytest.mark.slow
def test_feature_cache_changes_no_loss(tmp_path):
    _, results = run("data.feature_cache", tmp_path, "--tiny", "--rounds", 1)
    without, cached = results["figures"].values()
    assert without["last_loss"] == pytest.approx(cached["last_loss"], rel=1e-4)


@pytest.mark.slow
def test_prepare_at_a_small_scale(tmp_path):
    printed, results = run("data.prepare", tmp_path, "--scale", "0.01", "--pictures", "12")
    assert printed.startswith("3,100 samples")
    assert results["figures"]["a tenth"]["samples"] == 310
    assert 0 < results["figures"]["whole"]["worker_bytes"] < 200e6


@pytest.mark.slow
def test_millions_at_a_small_scale(tmp_path):
    pytest.importorskip("pyarrow")
    printed, results = run("data.millions", tmp_path, "--samples", 500, "--folder", tmp_path)
    figures = results["figures"]
    assert [(one["samples"], one["seen"], one["pictures"]) for one in figures.values()] == [(500, 20, 500)] * 2
    assert all(one["processes_bytes"] > one["start_bytes"] > 1e8 for one in figures.values())
    assert all(one["first_step_seconds"] > one["open_seconds"] for one in figures.values())
    assert printed.splitlines()[1].startswith("jsonl, 500")
