"""The benchmarks of grouped batches, of growing costs and of data workers, on a model of no size: that they run."""

from __future__ import annotations

import argparse
import json

import pytest
import torch
from tiny_run import start

from benchmarks.peers import Size
from benchmarks.training import grouped, growth, workers


def run(name: str, tmp_path, *flags: object):
    """Run a benchmark's command; returns what it printed and what it wrote."""
    command = [
        "python",
        "-m",
        f"benchmarks.training.{name}",
        "--tiny",
        "--rounds",
        1,
        "--threads",
        1,
        "--output",
        tmp_path,
    ]
    done = start(*command, *flags)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / f"{name}.png").stat().st_size > 1000
    return done.stdout, json.loads((tmp_path / f"{name}.json").read_text())


def test_grouped_compares_the_same_samples(tmp_path):
    printed, results = run("grouped", tmp_path, "--scale", 0.01, "--batches", 4, "--samples", 8)
    assert printed.startswith("3,100 samples of ")
    assert "grouped, exact lengths, batch 4" in printed
    shares = results["counted"]["shares"]
    assert 0 < shares["grouped, batch 4"]["padding"] < 0.03 < shares["random, batch 4"]["padding"]
    random, ordered = (results["measured"]["4"][name] for name in ("random", "grouped"))
    assert random["samples"] == ordered["samples"] == 8
    assert ordered["padding"] < random["padding"]
    # (8 samples, of the same real tokens) in different times
    tokens = [one["tokens_per_second"] / one["samples_per_second"] for one in (random, ordered)]
    assert tokens[0] == pytest.approx(tokens[1])


def test_too_few_samples_for_a_batch_are_one_line(tmp_path):
    command = ("python", "-m", "benchmarks.training.grouped", "--tiny", "--output", tmp_path, "--samples", 3)
    done = start(*command, "--batches", 2, 4)
    assert done.returncode == 2
    assert done.stderr == "grouped.py: --samples 3 make no batch of 4; give more\n"
    assert list(tmp_path.iterdir()) == []


def test_attention_pays_for_padding_by_the_square():
    assert grouped.attention_share(torch.tensor([4, 4, 2, 2]), 2) == 0
    assert grouped.attention_share(torch.tensor([4, 2, 3]), 2) == pytest.approx(1 - (16 + 4 + 9) / (2 * 16 + 9))


def test_growth_changes_one_thing_and_compares_it_with_the_base(tmp_path):
    printed, results = run("growth", tmp_path, "--things", "checkpointing", "--steps", 2)
    lines = [line.split() for line in printed.splitlines()[-2:]]
    assert lines[0][:2] == ["checkpointing", "off"]
    assert lines[0][3::2] == ["1.00", "1.00"]
    assert lines[1][0] == "on"
    assert results["figures"]["checkpointing"]["on"]["step_seconds"] > 0


def test_what_grows_is_what_the_table_says():
    base, sizes = Size(), {}
    for thing, changes in growth.TRAINING.items():
        for value, change in changes.items():
            assert change != growth.BASE
            sizes[thing, value] = growth.size_of(change.times, tiny=False)
    assert sizes["picture", "336 px, 576 tokens"].image_size == 336
    assert sizes["picture", "336 px, 576 tokens"].num_image_tokens == 576
    assert sizes["layers", "16"].layers == 16 == 2 * base.layers
    wide = sizes["width", "1,024"]
    assert (wide.width, wide.inner, wide.width // wide.heads) == (1024, 2 * base.inner, base.width // base.heads)
    assert sizes["vocabulary", "303,872"].vocabulary == 303_872 == 2 * base.vocabulary
    assert sizes["batch", "8"] == base
    shown = {"layers": str(base.layers), "width": str(base.width), "vocabulary": f"{base.vocabulary:,}"}
    assert shown.items() <= growth.OF_BASE.items()
    assert growth.OF_BASE.keys() == growth.TRAINING.keys()
    folders = [change.inputs for changes in growth.TRAINING.values() for change in changes.values()]
    assert len({*folders, growth.BASE.inputs}) == 7, "one for each size, and for each length of answers"
    assert growth.Change({"width": 2}).inputs != growth.Change({"width": 4}).inputs


def test_a_token_is_timed_behind_a_filled_cache():
    given = argparse.Namespace(tiny=True, threads=torch.get_num_threads(), dtype="float32", tokens=3)
    assert growth.decode(20, given)["step_seconds"] > 0


def test_workers_deliver_what_is_trained(tmp_path):
    printed, results = run("workers", tmp_path, "--workers", 2, "--steps", 3, "--skipped", 1, "--pictures", 44)
    assert printed.splitlines()[1].split()[0] == "2"
    for one in results["figures"].values():
        assert 0 < one["wait_seconds"] < one["step_seconds"]
        assert one["pictures_per_second"] > 0
        assert 100_000 < one["picture_bytes"] < 200_000, "as photographs of that size have"


def test_what_a_step_waits_is_noted_and_handed_on():
    class Trainer:
        def get_batch_samples(self, iterator, number):
            return [next(iterator) for _ in range(number)], None

    trainer = Trainer()
    waiting = workers.Waiting(trainer)
    assert trainer.get_batch_samples(iter("abc"), 2) == (["a", "b"], None)
    with pytest.raises(StopIteration):
        trainer.get_batch_samples(iter(""), 1)
    assert len(waiting.seconds) == 2
    assert all(seconds > 0 for seconds in waiting.seconds)
