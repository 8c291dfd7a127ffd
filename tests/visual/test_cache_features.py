"""visual/cache_features.py as people call it: estimate, shards, what is skipped, what is bad, stops."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from tiny_run import (
    MIXED_CAPTIONS,
    ROOT,
    environment,
    losses,
    make_pictures,
    one_line_error,
    start,
    write_as_the_original,
    write_data,
)

import train
from model.feature_caching import fill
from visual import build_vision_tower, cache_features
from visual.base import VisionTower
from visual.feature_cache import FeatureCache, open_feature_cache

PROGRAM = "cache_features.py"
QUICK = [
    *("--lora_rank", "4", "--lora_dropout", "0", "--use_cpu", "true", "--report_to", "none", "--disable_tqdm", "true"),
    *("--logging_steps", "1", "--num_train_epochs", "1", "--per_device_train_batch_size", "4"),
]


@pytest.fixture
def pictures(tmp_path) -> Path:
    make_pictures(tmp_path / "pictures")
    return tmp_path / "pictures"


@pytest.fixture
def data(tmp_path, pictures) -> list[str]:
    return write_data(tmp_path / "data", MIXED_CAPTIONS, pictures)


@pytest.fixture
def flags(tmp_path, base_flags, data) -> list[str]:
    return [
        *base_flags[2:],
        *data[:2],
        "--feature_cache",
        str(tmp_path / "cache"),
        "--num_workers",
        "0",
        "--device",
        "cpu",
    ]


def stored(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("cache/*/??/*.safetensors")}


def test_the_command_says_the_estimate_first_and_training_needs_no_tower(
    tmp_path, base_flags, data, flags, monkeypatch
):
    done = start(sys.executable, f"visual/{PROGRAM}", *flags, "--num_workers", "2", "--feature_cache_dtype", "float32")
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    size = os.statvfs(tmp_path).f_frsize
    estimate = f"6 images, 4 × 32 float32 each: at most {6 * size:,} bytes on the disk; 0 stored already, "
    assert done.stderr.index(estimate) < done.stderr.index("6/6")
    assert "6 images: 6 stored now, 0 were there, 0 bad; 6 stored in all" in done.stderr
    assert sum(path.stat().st_blocks * 512 for path in tmp_path.glob("cache/*/??/*.safetensors")) == 6 * size

    command = [*base_flags, *data, *QUICK]
    assert train.main([*command, "--output_dir", str(tmp_path / "plain"), "--save_steps", "3"]) == 0
    monkeypatch.setattr(VisionTower, "forward", None)
    words = ["--feature_cache", str(tmp_path / "cache"), "--feature_cache_dtype", "float32", "--save_steps", "3"]
    assert train.main([*command, "--output_dir", str(tmp_path / "cached"), *words]) == 0
    assert losses(tmp_path / "cached" / "checkpoint-3") == losses(tmp_path / "plain" / "checkpoint-3")


def test_as_training_stores_it_under_autocast(tmp_path, base_flags, data, flags):
    assert cache_features.main([*flags, "--dtype", "bfloat16", "--batch_size", "4"]) == 0
    (folder,) = (tmp_path / "cache").iterdir()
    before = {path.name: path.read_bytes() for path in folder.glob("??/*")}
    command = [*base_flags, *data, *QUICK, "--bf16", "true", "--output_dir", str(tmp_path / "out")]
    assert train.main([*command, "--feature_cache", str(tmp_path / "trained")]) == 0
    assert [path.name for path in (tmp_path / "trained").iterdir()] == [folder.name]
    assert {path.name: path.read_bytes() for path in (tmp_path / "trained").glob("*/??/*")} == before


def test_shards_take_each_image_once_and_what_is_there_is_left_alone(tmp_path, flags, capsys):
    parts = []
    for shard in range(4):
        before = stored(tmp_path)
        assert cache_features.main([*flags, "--num_shards", "4", "--shard", str(shard)]) == 0
        parts.append(stored(tmp_path) - before)
    assert [len(part) for part in parts] == [2, 2, 1, 1]
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("cache/*/??/*")}
    capsys.readouterr()
    assert cache_features.main(flags) == 0
    assert "6 images: 0 stored now, 6 were there, 0 bad; 6 stored in all" in capsys.readouterr().err
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.glob("cache/*/??/*")}
    next(tmp_path.glob("cache/*/??/*")).write_bytes(b"cut")
    assert cache_features.main(flags) == 0
    assert "6 images: 1 stored now, 5 were there" in capsys.readouterr().err


def test_bad_images_and_entries_are_listed_and_counted(tmp_path, flags, pictures, capsys):
    (pictures / "red.png").write_text("no picture")
    (pictures / "blue.png").unlink()
    shutil.move(pictures / "white.png", tmp_path / "white.png")
    (pictures / "white.png").symlink_to(tmp_path / "white.png")
    other = write_data(
        tmp_path / "more", [("../up.png", ("<|extra_0|>", "a")), ("yellow.png", ("<|extra_0|>", "a"))], pictures
    )
    both = [*flags[:3], flags[3], other[1], *flags[4:]]
    assert cache_features.main(both) == 0
    said = capsys.readouterr().err
    assert "6 images: 3 stored now, 0 were there, 4 bad; 3 stored in all" in said
    bad = [line for line in said.splitlines() if "bad: " in line]
    assert len(bad) == 4
    for words in ("red.png': not an image", "blue.png': missing", "white.png': link leads out", "../up.png"):
        assert sum(words in line for line in bad) == 1, words
    assert cache_features.main([*both, "--allow_links"]) == 0
    assert len(stored(tmp_path)) == 4
    for path in pictures.iterdir():
        path.unlink()
    assert cache_features.main(flags) == 1, "no image can be used"


@pytest.mark.parametrize(("value", "said"), [(float("nan"), "infinite or no numbers"), (1e6, "float16 can't hold")])
def test_features_that_cannot_be_stored_are_bad_too(tmp_path, flags, pictures, capsys, monkeypatch, value, said):
    forward = VisionTower.forward

    def spoil(self, pixel_values):
        features = forward(self, pixel_values).clone()
        features[:2, 1, 2] = value
        return features

    monkeypatch.setattr(VisionTower, "forward", spoil)
    assert cache_features.main([*flags, "--feature_cache_dtype", "float16"]) == 0
    err = capsys.readouterr().err
    assert "6 images: 4 stored now, 0 were there, 2 bad; 4 stored in all" in err
    bad = [line for line in err.splitlines() if "bad: " in line]
    assert len(set(bad)) == 2
    assert all(str(pictures) in line and said in line for line in bad)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["--feature_cache_dtype", "int8"], "invalid choice: 'int8'"),
        (["--num_shards", "2", "--shard", "2"], "--shard 2: with --num_shards 2 it goes from 0 to 1"),
        (["--batch_size", "0"], "--batch_size 0: at least 1"),
        (["--image_map", "nowhere.json"], "cannot read nowhere.json"),
        (["--base_value_model", "no/where/at/all"], "'no/where/at/all' cannot be read"),
        (["--feature_cache", "pyproject.toml"], "--feature_cache pyproject.toml can't be made"),
        (["--device", "cpo"], "no device has such a name"),
    ],
)
def test_mistakes_are_one_line(flags, capsys, changes, said, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert cache_features.main([*flags, *changes]) == 2
    assert said in one_line_error(capsys.readouterr().err, PROGRAM)


def test_too_small_a_disk_is_refused_unless_enough_is_there(tmp_path, flags, pictures, capsys, monkeypatch):
    block = os.statvfs(tmp_path).f_frsize
    room = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: room._replace(free=3 * block))
    assert cache_features.main(flags) == 2
    line = one_line_error(capsys.readouterr().err, PROGRAM)
    assert f"6 images to be stored will take {6 * block:,} bytes, and {3 * block:,} bytes are free" in line
    assert stored(tmp_path) == set()
    assert cache_features.main([*flags, "--skip_space_check"]) == 0
    for missing, status in ((3, 0), (4, 2)):  # 3 fit
        for path in list(tmp_path.glob("cache/*/??/*.safetensors"))[:missing]:
            path.unlink()
        assert cache_features.main(flags) == status


def test_a_disk_that_fills_up_ends_it_with_what_is_there(tmp_path, flags, capsys, monkeypatch):
    write = FeatureCache.write

    def full_after_two(self, key, features):
        if len(stored(tmp_path)) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, key, features)

    with monkeypatch.context() as patch:
        patch.setattr(FeatureCache, "write", full_after_two)
        assert cache_features.main([*flags, "--batch_size", "1"]) == 1
    line = one_line_error(capsys.readouterr().err, PROGRAM)
    assert "2 of 6 images were stored, then the disk failed (No space left on device)" in line
    assert cache_features.main(flags) == 0
    assert "4 stored now, 2 were there" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_by_a_signal_it_leaves_a_cache_that_can_be_used(tmp_path, base_flags, flags, pictures, number, code):
    names = []
    for index in range(3000):
        names.append(f"{index}.png")
        Image.new("RGB", (8, 8), (index % 256, index // 256, 0)).save(pictures / names[-1])
    data = write_data(tmp_path / "many", [(name, ("<|extra_0|>", "a")) for name in names], pictures)
    words = [*flags, "--image_map", data[1], "--num_workers", "2", "--batch_size", "2"]
    process = subprocess.Popen(
        [sys.executable, f"visual/{PROGRAM}", *words],
        cwd=ROOT,
        env=environment(),
        text=True,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    said = ""
    while not re.search(r"images:\s+\d+%.*\| +[1-9]", said):
        said += process.stderr.read(1)
        assert process.poll() is None, said
    os.killpg(process.pid, number)  # as a terminal's Ctrl-C does, its workers too
    said += process.communicate(timeout=600)[1]
    assert process.returncode == code, said
    assert "Traceback" not in said
    assert f"stopped by {signal.Signals(number).name}" in said
    assert 0 < len(stored(tmp_path)) < 3000
    assert list((tmp_path / "cache").glob("*/tmp/*")) == []
    cache = open_feature_cache(tmp_path / "cache", build_vision_tower(base_flags[3]), "bfloat16")
    assert all(cache.read(bytes.fromhex(name.split(".")[0])) is not None for name in stored(tmp_path))


def test_siglip_without_its_first_patch_as_training_on_from_the_original_project_sees_it(
    tmp_path, base_flags, data, flags, tiny_siglip, monkeypatch
):
    """What is stored for a checkpoint that was trained without that patch is what training on from it finds."""
    siglip = [*base_flags[:2], "--base_value_model", tiny_siglip]
    command = [*siglip, *data, *QUICK]
    assert train.main([*command, "--output_dir", str(tmp_path / "first"), "--save_strategy", "no"]) == 0
    original = write_as_the_original(tmp_path / "first", tmp_path / "original")
    words = [*flags, "--base_value_model", tiny_siglip, "--previous_lora_weights", str(original)]
    assert cache_features.main(words) == 0
    (folder,) = (tmp_path / "cache").iterdir()
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("??/*")}
    assert len(before) == 6
    on = [*command, "--previous_lora_weights", str(original), "--feature_cache", str(tmp_path / "cache")]
    monkeypatch.setattr(VisionTower, "forward", None)
    assert train.main([*on, "--output_dir", str(tmp_path / "on")]) == 0
    assert {path.name: path.stat().st_mtime_ns for path in folder.glob("??/*")} == before
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [folder.name]


def test_a_picture_that_changes_while_it_is_read_is_not_stored(tmp_path, flags, pictures, monkeypatch, capsys):
    def load_and_replace(path):
        image = load_image(path)
        if path.name == "red.png":
            Image.new("RGB", (40, 30), "pink").save(path)
        return image

    load_image = fill.load_image
    with monkeypatch.context() as patch:
        patch.setattr(fill, "load_image", load_and_replace)
        assert cache_features.main(flags) == 0
    (bad,) = [line for line in capsys.readouterr().err.splitlines() if "bad: " in line]
    assert "red.png" in bad
    assert len(stored(tmp_path)) == 5
    assert cache_features.main(flags) == 0
    assert len(stored(tmp_path)) == 6
