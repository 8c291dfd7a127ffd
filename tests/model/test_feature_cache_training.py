"""Training with --feature_cache: the cache is filled first, then the losses are the same without the tower."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from tiny_run import (
    MIXED_CAPTIONS,
    losses,
    make_pictures,
    one_line_error,
    start,
    trained_weights,
    write_data,
)

import train
from dataset import image_caption_dataset as dataset_module
from visual.base import VisionTower
from visual.feature_cache import FeatureCache

# 12 samples, 6 pictures, one sample with two; 3 steps of 4 samples an epoch.
QUICK = [
    *("--lora_rank", "4", "--lora_alpha", "8", "--lora_dropout", "0.2", "--learning_rate", "1e-2"),
    *("--use_cpu", "true", "--report_to", "none", "--disable_tqdm", "true", "--logging_steps", "1"),
    *("--save_steps", "3", "--num_train_epochs", "2", "--per_device_train_batch_size", "2"),
    *("--gradient_accumulation_steps", "2"),
]
NUM_PICTURES = 6


@pytest.fixture
def pictures(tmp_path) -> Path:
    make_pictures(tmp_path / "pictures")
    return tmp_path / "pictures"


@pytest.fixture
def command(tmp_path, base_flags, pictures) -> list[str]:
    return [*base_flags, *write_data(tmp_path / "data", MIXED_CAPTIONS, pictures), *QUICK]


@pytest.fixture
def cached(tmp_path) -> tuple[object, ...]:
    return "--feature_cache", tmp_path / "cache", "--feature_cache_dtype", "float32"


@pytest.fixture
def calls(monkeypatch) -> dict[str, int]:
    """Images that went through the tower, and that the data set opened."""
    counted = {"tower": 0, "opened": 0}
    forward, load_image = VisionTower.forward, dataset_module.load_image

    def count_forward(self, pixel_values):
        counted["tower"] += len(pixel_values)
        return forward(self, pixel_values)

    def count_opened(path):
        counted["opened"] += 1
        return load_image(path)

    monkeypatch.setattr(VisionTower, "forward", count_forward)
    monkeypatch.setattr(dataset_module, "load_image", count_opened)
    return counted


def run(command, folder: Path, *flags: object) -> list[float]:
    """Train in this process; the losses."""
    assert train.main([*command, "--output_dir", str(folder), *map(str, flags)]) == 0
    return losses(newest(folder))


def newest(folder: Path) -> Path:
    return max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


def stored(folder: Path) -> list[Path]:
    return sorted(folder.glob("cache/*/??/*.safetensors"))


def same_weights(a: Path, b: Path) -> bool:
    first, second = trained_weights(a), trained_weights(b)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# ---- Results do not change


def test_float32_changes_nothing_and_the_tower_runs_once(command, tmp_path, calls, cached, capsys):
    plain = run(command, tmp_path / "plain")
    assert calls == {"tower": 12, "opened": 12}, "6 images, 2 epochs"
    for name, in_tower in (("cold", NUM_PICTURES), ("warm", 0)):
        calls.update(tower=0, opened=0)
        assert run(command, tmp_path / name, *cached) == plain
        assert calls == {"tower": in_tower, "opened": 0}, "training reads features only"
        assert same_weights(tmp_path / "plain", tmp_path / name)
        assert len(stored(tmp_path)) == NUM_PICTURES
    (folder,) = (tmp_path / "cache").iterdir()
    assert str(folder) in capsys.readouterr().err


def test_evaluation_reads_too(command, tmp_path, calls, cached):
    flags = ["--eval_image_map", command[5], "--eval_captions_file", command[7], "--per_device_eval_batch_size", 5]

    def evaluated(folder: Path) -> list[float]:
        history = json.loads((newest(folder) / "trainer_state.json").read_text())["log_history"]
        return [entry["eval_loss"] for entry in history if "eval_loss" in entry]

    plain = run(command, tmp_path / "plain", *flags)
    calls.update(tower=0)
    assert run(command, tmp_path / "cached", *flags, *cached) == plain
    assert evaluated(tmp_path / "cached") == evaluated(tmp_path / "plain") != []
    assert calls["tower"] == NUM_PICTURES


@pytest.mark.slow
def test_two_processes_share_the_filling(command, tmp_path, cached):
    command = [*command, "--lora_dropout", "0"]
    alone = run(command, tmp_path / "alone", *cached)
    for path in stored(tmp_path)[::2]:
        path.unlink()
    words = [*command, "--output_dir", tmp_path / "two", "--gradient_accumulation_steps", 1, *cached]
    done = start("torchrun", "--nproc_per_node=2", "--standalone", "train.py", *words)
    assert done.returncode == 0, done.stderr
    assert losses(newest(tmp_path / "two")) == pytest.approx(alone, rel=1e-5)
    assert len(stored(tmp_path)) == NUM_PICTURES
    assert list((tmp_path / "cache").glob("*/tmp/*")) == []


@pytest.mark.parametrize(("before", "after"), [(True, False), (False, True)])
def test_resuming_with_the_cache_or_without(command, tmp_path, cached, before, after):
    whole = run(command, tmp_path / "whole")
    folder = tmp_path / "resumed"
    run(command, folder, *(cached if before else ()))
    shutil.rmtree(folder / "checkpoint-6")
    assert run(command, folder, *(cached if after else ()), "--resume_from_checkpoint", "auto") == whole
    assert same_weights(folder, tmp_path / "whole")


# ---- Nothing stale


# ---- What goes wrong


def test_a_full_disk_stops_the_run_before_its_first_step(command, tmp_path, monkeypatch, capsys, cached):
    write = FeatureCache.write

    def full_after_two(self, key, features):
        if len(stored(tmp_path)) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, key, features)

    with monkeypatch.context() as patch:
        patch.setattr(FeatureCache, "write", full_after_two)
        assert train.main([*command, "--output_dir", str(tmp_path / "out"), *map(str, cached)]) == 2
    line = one_line_error(capsys.readouterr().err, "train.py")
    assert "--feature_cache" in line
    assert os.strerror(errno.ENOSPC) in line
    assert not list(tmp_path.glob("out/checkpoint-*"))
    assert len(stored(tmp_path)) == 2
    assert run(command, tmp_path / "again", *cached) == run(command, tmp_path / "plain")


def test_a_picture_without_features_is_a_bad_sample(command, tmp_path, pictures, capsys, cached):
    run(command, tmp_path / "first", *cached)
    (pictures / "red.png").write_bytes((pictures / "red.png").read_bytes()[:60])
    (pictures / "blue.png").unlink()
    capsys.readouterr()
    run(command, tmp_path / "skip", *cached, "--max_bad_fraction", 0.5)
    lines = (tmp_path / "skip" / "bad_samples.jsonl").read_text().splitlines()
    assert ["red.png" in lines[0], "blue.png" in lines[1]] == [True, True]
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("bad: ")]
    assert sorted(name for line in said for name in ("red.png", "blue.png") if name in line) == ["blue.png", "red.png"]


def test_links_out_of_the_folder_are_refused_stored_or_not(command, tmp_path, pictures, cached):
    shutil.move(pictures / "red.png", tmp_path / "red.png")
    (pictures / "red.png").symlink_to(tmp_path / "red.png")
    flags = (*cached, "--max_bad_fraction", 0.5)
    run(command, tmp_path / "allowed", *flags, "--allow_links", "true")
    assert len(stored(tmp_path)) == NUM_PICTURES
    run(command, tmp_path / "refused", *flags)
    assert "link leads out" in (tmp_path / "refused" / "bad_samples.jsonl").read_text()
