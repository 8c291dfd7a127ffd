"""The benchmarks of answering and loading, on models of no size: that they run, and compare like with like."""

from __future__ import annotations

import json
import subprocess
import sys

import torch
from tiny_run import ROOT, environment

from benchmarks.answering import generate, load
from benchmarks.measure import Run
from benchmarks.peers import TINY, build_ours, build_peer, copy_weights


def test_both_peers_are_the_same_function():
    ours, peer = build_ours(TINY, torch.float32), build_peer(TINY, torch.float32)
    copy_weights(ours, peer)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in peer.parameters())
    prompts, pixels = generate.make_inputs(TINY, 2, "float32")
    ids = torch.tensor([prompts[0]])
    with torch.no_grad():
        expected = peer(input_ids=ids, pixel_values=pixels[:1]).logits
        torch.testing.assert_close(ours(ids, pixel_values=pixels[:1]).logits, expected, atol=1e-5, rtol=1e-4)


def test_the_comparison_prints_and_writes_what_it_measured(tmp_path):
    flags = ["--tiny", "--dtypes", "float32", "--batches", "2", "--tokens", "4", "--rounds", "1", "--clock", "cpu"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.answering.generate", *flags, "--output", str(tmp_path)],
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "fp32, batch 2: the same tokens from both" in done.stderr
    assert "fp32, batch 2" in done.stdout
    figures = json.loads((tmp_path / "generate.json").read_text())["medians"]["fp32, batch 2"]
    assert all(figures[peer][name] > 0 for peer in ("ours", "llava") for name in ("first", "whole", "peak_bytes"))
    assert (tmp_path / "generate.png").stat().st_size > 1000


def test_a_table_of_ratios():
    figures = {
        "fp32, batch 8": {"ours": {"first": 1, "rate": 30, "whole": 2}, "llava": {"first": 2, "rate": 20, "whole": 3}}
    }
    assert generate.show(figures).splitlines()[1].split() == [
        *("fp32,", "batch", "8", "1.000", "2.000", "2.00x", "30.0", "20.0", "1.50x", "2.00", "3.00", "1.50x")
    ]


def test_the_imports_are_taken_off_within_a_round():
    """Rounds whose machine was slow for both: of the medians alone, the difference would be 5 - 1 = 4 seconds."""

    def took(*seconds: float) -> list[Run]:
        return [Run(one, 2 * one, int(one * 1e9), {}) for one in seconds]

    runs = {"ours": took(3, 9, 5), "ours, imports": took(1, 8, 1), "llava": took(4, 5, 6)}
    figures = load.figures_of({**runs, "llava, imports": took(0.5, 1, 2)})
    assert figures["ours, less imports"] == {"seconds": 2, "cpu_seconds": 4, "peak_bytes": 2e9}
    figures["ours"]["files"] = figures["llava"]["files"] = 1e9
    lines = load.show(figures).splitlines()
    assert lines[1].split()[-3:] == ["5.00", "5.00", "1.00x"]
    assert lines[2].split()[-3:] == ["2.00", "4.00", "2.00x"]
