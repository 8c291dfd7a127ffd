"""Training with --feature_cache: the same losses, without the tower, whatever is stored and whatever goes wrong."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_run import (
    MIXED_CAPTIONS,
    ROOT,
    environment,
    losses,
    make_bases,
    make_pictures,
    one_line_error,
    start,
    trained_weights,
    write_data,
)
from tiny_towers import make_clip_checkpoint
from tiny_vlm import NUM_IMAGE_TOKENS, collate, new_model, sample

import train
from dataset import ImageCaptionDataset
from dataset import image_caption_dataset as dataset_module
from model.tower_features import tower_features
from visual.base import VisionTower
from visual.feature_cache import FeatureCache, open_feature_cache

# 12 samples, 6 pictures, one sample with two; 3 steps of 4 samples an epoch.
QUICK = [
    *("--lora_rank", "4", "--lora_alpha", "8", "--lora_dropout", "0.2", "--learning_rate", "1e-2"),
    *("--use_cpu", "true", "--report_to", "none", "--disable_tqdm", "true", "--logging_steps", "1"),
    *("--save_steps", "3", "--num_train_epochs", "2", "--per_device_train_batch_size", "2"),
    *("--gradient_accumulation_steps", "2"),
]
NUM_PICTURES = 6
COLOURS_ALONE = ("red", "green", "yellow")
"""Pictures that are the only one of their sample."""


@pytest.fixture
def pictures(tmp_path) -> Path:
    make_pictures(tmp_path / "pictures")
    return tmp_path / "pictures"


@pytest.fixture(scope="module")
def bases(tmp_path_factory, qwen_tiktoken) -> list[str]:
    return make_bases(tmp_path_factory.mktemp("bases"), qwen_tiktoken)


@pytest.fixture
def command(tmp_path, bases, pictures) -> list[str]:
    return [*bases, *write_data(tmp_path / "data", MIXED_CAPTIONS, pictures), *QUICK]


@pytest.fixture
def calls(monkeypatch) -> dict[str, int]:
    """Images that went through the tower, and that were opened."""
    counted = {"tower": 0, "opened": 0}
    forward = VisionTower.forward

    def count_forward(self, pixel_values):
        counted["tower"] += len(pixel_values)
        return forward(self, pixel_values)

    monkeypatch.setattr(VisionTower, "forward", count_forward)
    monkeypatch.setattr(dataset_module, "load_image", counting(dataset_module.load_image, counted))
    return counted


def counting(function, counted):
    def call(*args, **kwargs):
        counted["opened"] += 1
        return function(*args, **kwargs)

    return call


def run(command, folder: Path, *flags: object) -> list[float]:
    """Train in this process; the losses."""
    assert train.main([*command, "--output_dir", str(folder), *map(str, flags)]) == 0
    return losses(newest(folder))


def newest(folder: Path) -> Path:
    return max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


def stored(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/??/*.safetensors"))


def same_weights(a: Path, b: Path) -> bool:
    first, second = trained_weights(a), trained_weights(b)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# ---- Results do not change


def test_float32_changes_nothing_and_the_tower_runs_once(command, tmp_path, calls):
    plain = run(command, tmp_path / "plain")
    assert calls == {"tower": 12, "opened": 12}, "6 images, 2 epochs"
    flags = ("--feature_cache", tmp_path / "cache", "--feature_cache_dtype", "float32")
    calls.update(tower=0, opened=0)
    assert run(command, tmp_path / "cold", *flags) == plain
    assert len(stored(tmp_path / "cache")) == NUM_PICTURES
    assert calls["tower"] == calls["opened"] == 6, "the second epoch reads"
    calls.update(tower=0, opened=0)
    assert run(command, tmp_path / "warm", *flags) == plain
    assert calls == {"tower": 0, "opened": 0}
    assert same_weights(tmp_path / "plain", tmp_path / "cold")
    assert same_weights(tmp_path / "plain", tmp_path / "warm")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_agrees_to_its_rounding_cold_or_warm(command, tmp_path, dtype):
    plain = run(command, tmp_path / "plain")
    flags = ("--feature_cache", tmp_path / "cache", "--feature_cache_dtype", dtype)
    cold, warm = run(command, tmp_path / "cold", *flags), run(command, tmp_path / "warm", *flags)
    assert cold == warm, "what is computed is rounded as what is read"
    assert cold != plain
    assert cold == pytest.approx(plain, rel=2e-3 if dtype == "bfloat16" else 2e-4)
    assert {path.parts[-3].rsplit("-", 1)[1] for path in stored(tmp_path / "cache")} == {dtype}


def test_under_autocast_bfloat16_changes_nothing(command, tmp_path):
    """The projector rounds its input to bfloat16 there in any case."""
    command = [*command, "--bf16", "true"]
    plain = run(command, tmp_path / "plain")
    for name in ("cold", "warm"):
        assert run(command, tmp_path / name, "--feature_cache", tmp_path / "cache") == plain


def test_evaluation_reads_too(command, tmp_path, calls):
    flags = ["--eval_image_map", command[5], "--eval_captions_file", command[7], "--per_device_eval_batch_size", 5]

    def evaluated(folder: Path) -> list[float]:
        history = json.loads((newest(folder) / "trainer_state.json").read_text())["log_history"]
        return [entry["eval_loss"] for entry in history if "eval_loss" in entry]

    plain = run(command, tmp_path / "plain", *flags)
    cached = ("--feature_cache", tmp_path / "cache", "--feature_cache_dtype", "float32")
    calls.update(tower=0)
    assert run(command, tmp_path / "cached", *flags, *cached) == plain
    assert evaluated(tmp_path / "cached") == evaluated(tmp_path / "plain")
    assert len(evaluated(tmp_path / "plain")) == 1, (
        "after the first epoch; the last checkpoint is saved before the second"
    )
    assert calls["tower"] == 6


def test_workers_and_two_processes(command, tmp_path):
    plain = run(command, tmp_path / "plain")
    flags = ("--feature_cache", tmp_path / "cache", "--feature_cache_dtype", "float32")
    assert run(command, tmp_path / "workers", *flags, "--dataloader_num_workers", 2) == plain
    assert run(command, tmp_path / "warm", *flags, "--dataloader_num_workers", 2) == plain
    for path in stored(tmp_path / "cache")[::2]:  # some of each
        path.unlink()
    words = [*command, "--output_dir", tmp_path / "two", "--gradient_accumulation_steps", 1, *flags]
    words += ["--lora_dropout", 0]
    one = [*command, "--lora_dropout", "0"]
    alone = run(one, tmp_path / "alone")
    done = start("torchrun", "--nproc_per_node=2", "--master_port=25713", "train.py", *words)
    assert done.returncode == 0, done.stderr
    assert losses(newest(tmp_path / "two")) == pytest.approx(alone, rel=1e-5)
    assert len(stored(tmp_path / "cache")) == NUM_PICTURES
    assert list((tmp_path / "cache").glob("*/tmp/*")) == []


def test_going_on_with_the_cache_or_without(command, tmp_path):
    whole = run(command, tmp_path / "whole")
    flags = ("--feature_cache", tmp_path / "cache", "--feature_cache_dtype", "float32")
    for name, first, second in (("with", flags, flags), ("begun with", flags, ()), ("gone on with", (), flags)):
        folder = tmp_path / name
        run(command, folder, *first)
        shutil.rmtree(folder / "checkpoint-6")
        assert run(command, folder, *second, "--resume_from_checkpoint", "auto") == whole
        assert same_weights(folder, tmp_path / "whole")


def test_going_on_with_other_rounding_is_said_once(command, tmp_path, capsys):
    folder = tmp_path / "run"
    float32, bfloat16 = (
        ("--feature_cache", tmp_path / "cache", "--feature_cache_dtype", d) for d in ("float32", "bfloat16")
    )
    run(command, folder, *float32, "--num_train_epochs", 1)
    for epochs, flags, said in (
        (2, float32, None),
        (3, bfloat16, "features of images are stored in bfloat16 now, they were stored in float32: losses differ"),
        (4, (), "features of images are as the tower gives them now, they were stored in bfloat16: losses differ"),
    ):
        capsys.readouterr()
        run(command, folder, *flags, "--num_train_epochs", epochs, "--resume_from_checkpoint", "auto")
        lines = [line for line in capsys.readouterr().err.splitlines() if "losses differ" in line]
        assert len(lines) == (said is not None)
        assert not lines or lines[0].startswith(said)
    (folder / "train_config.json").write_text("{")
    run(command, folder, *bfloat16, "--num_train_epochs", 5, "--resume_from_checkpoint", "auto")
    assert "losses differ" not in capsys.readouterr().err


# ---- Nothing stale


def test_a_changed_picture_is_seen_anew_and_equal_ones_share(command, tmp_path, pictures, calls):
    shutil.copy(pictures / "red.png", pictures / "green.png")
    flags = ("--feature_cache", tmp_path / "cache", "--feature_cache_dtype", "float32")
    run(command, tmp_path / "first", *flags)
    assert len(stored(tmp_path / "cache")) == NUM_PICTURES - 1
    Image.new("RGB", (40, 30), "orange").save(pictures / "green.png")
    calls.update(tower=0)
    changed = run(command, tmp_path / "changed", *flags)
    assert calls["tower"] == 1
    assert changed == run(command, tmp_path / "plain")


def test_another_tower_or_transform_is_run(command, tmp_path, calls):
    flags = ("--feature_cache", tmp_path / "cache", "--feature_cache_dtype", "float32")
    run(command, tmp_path / "first", *flags)
    other = make_clip_checkpoint(tmp_path / "other", seed=5)
    moved = shutil.copytree(command[3], tmp_path / "moved")
    for name, tower, number in (("other", other, 6), ("moved", moved, 0)):
        calls.update(tower=0)
        run([*command, "--base_value_model", str(tower)], tmp_path / f"to {name}", *flags)
        assert calls["tower"] == number
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_damaged_files_are_computed_anew(command, tmp_path, pictures, calls, capsys):
    flags = ("--feature_cache", tmp_path / "cache", "--feature_cache_dtype", "float32")
    plain = run(command, tmp_path / "first", *flags)
    files = {path.stem: path for path in stored(tmp_path / "cache")}
    red, green, yellow = (files[FeatureCache.key_of(pictures / f"{name}.png").hex()] for name in COLOURS_ALONE)
    red.write_bytes(red.read_bytes()[:-5])
    green.write_bytes(yellow.read_bytes())
    calls.update(tower=0)
    assert run(command, tmp_path / "again", *flags) == plain
    assert calls["tower"] == 2
    assert capsys.readouterr().err.count("is damaged") == 2
    assert len({path.read_bytes() for path in stored(tmp_path / "cache")}) == NUM_PICTURES


# ---- What goes wrong


def test_a_full_disk_does_not_stop_the_run(command, tmp_path, monkeypatch, capsys):
    plain = run(command, tmp_path / "plain")

    def full(self, key, features):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(FeatureCache, "write", full)
    flags = ("--feature_cache", tmp_path / "cache", "--feature_cache_dtype", "float32")
    assert run(command, tmp_path / "full", *flags) == plain
    assert [line for line in capsys.readouterr().err.splitlines() if "can't be stored" in line] == [
        f"{next((tmp_path / 'cache').iterdir())}: features can't be stored any more (No space left on device)"
    ]
    assert stored(tmp_path / "cache") == []


def test_a_broken_picture_is_still_found(command, tmp_path, pictures, capsys):
    flags = ["--feature_cache", tmp_path / "cache"]
    run(command, tmp_path / "first", *flags)
    (pictures / "red.png").write_bytes((pictures / "red.png").read_bytes()[:60])
    (pictures / "blue.png").unlink()
    run(command, tmp_path / "skip", *flags, "--max_bad_fraction", 0.5)
    lines = (tmp_path / "skip" / "bad_samples.jsonl").read_text().splitlines()
    assert len(lines) == 2
    assert "red.png" in lines[0]
    assert "missing" in lines[1]
    capsys.readouterr()
    words = [*command, "--output_dir", str(tmp_path / "error"), *map(str, flags), "--on_bad_sample", "error"]
    assert train.main(words) == 2
    assert "png" in one_line_error(capsys.readouterr().err, "train.py")


def test_links_out_of_the_folder_are_refused_stored_or_not(command, tmp_path, pictures):
    shutil.move(pictures / "red.png", tmp_path / "red.png")
    (pictures / "red.png").symlink_to(tmp_path / "red.png")
    flags = ["--feature_cache", tmp_path / "cache", "--max_bad_fraction", 0.5]
    run(command, tmp_path / "allowed", *flags, "--allow_links", "true")
    assert len(stored(tmp_path / "cache")) == NUM_PICTURES
    run(command, tmp_path / "refused", *flags)
    assert "link leads out" in (tmp_path / "refused" / "bad_samples.jsonl").read_text()


def test_mistakes_are_one_line(command, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for flags, said in (
        (["--feature_cache", str(tmp_path / "file")], "is a file; give a folder"),
        (["--feature_cache", str(tmp_path), "--feature_cache_dtype", "int8"], "invalid choice: 'int8'"),
    ):
        assert train.main([*command, "--output_dir", str(tmp_path / "out"), *flags]) == 2
        assert said in one_line_error(capsys.readouterr().err, "train.py")


def test_killed_in_mid_epoch(command, tmp_path):
    """What a killed run has stored can be used."""
    flags = ["--feature_cache", str(tmp_path / "cache"), "--feature_cache_dtype", "float32"]
    process = subprocess.Popen(
        [sys.executable, "train.py", *command, "--output_dir", str(tmp_path / "killed"), *flags],
        cwd=ROOT,
        env=environment(PYTHONUNBUFFERED="1"),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    for line in process.stdout:
        if "'loss'" in line:
            process.send_signal(signal.SIGKILL)
            break
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert 0 < len(stored(tmp_path / "cache")) <= NUM_PICTURES
    assert run(command, tmp_path / "again", *flags) == run(command, tmp_path / "plain")


# ---- One piece at a time


def stored_sample(model, number: int, **kwargs) -> tuple[dict, dict]:
    """A sample, and the same with its features in the place of its pixels."""
    made = sample(number, **kwargs)
    features = {name: value for name, value in made.items() if name != "pixel_values"}
    if number:
        features["vision_features"] = model.vision_tower(made["pixel_values"])
    return made, features


@pytest.mark.parametrize("mask", ["111", "000", "101", "010", "011"])
@pytest.mark.parametrize("counts", [(1, 2, 1), (0, 1, 2), (2, 0, 0)])
def test_batches_of_both_kinds(tiny_bases, mask, counts):
    model = new_model(tiny_bases).eval()
    pairs = [stored_sample(model, number, seed=i) for i, number in enumerate(counts)]
    expected = model(**collate(*(plain for plain, _ in pairs))).loss
    batch = collate(*(pair[int(which)] for pair, which in zip(pairs, mask, strict=True)))
    with torch.no_grad():
        assert torch.equal(model(**batch).loss, expected)


def test_text_only_batches_have_nothing_of_it(tiny_bases):
    batch = collate(sample(0), sample(0, seed=1))
    assert not {"pixel_values", "vision_features", "has_features", "image_keys"} & set(batch)
    assert new_model(tiny_bases)(**batch).loss.isfinite()


def test_features_that_do_not_fit_are_named(tiny_bases):
    model = new_model(tiny_bases)
    made, features = stored_sample(model, 1)
    batch = collate(made, features)
    with pytest.raises(ValueError, match="must mark 1 of 2 images"):
        model(**{**batch, "has_features": None})
    with pytest.raises(ValueError, match="must mark 1 of 2 images"):
        model(**{**batch, "has_features": torch.tensor([True, True])})
    with pytest.raises(ValueError, match=r"shape \(N, 4, 32\)"):
        model(**{**batch, "vision_features": torch.zeros(1, NUM_IMAGE_TOKENS, 31)})
    with pytest.raises(ValueError, match=r"4 image tokens .* but 2 images"):
        model(**{**collate(features), "vision_features": torch.zeros(2, NUM_IMAGE_TOKENS, 32)})
    with pytest.raises(ValueError, match="neither"):
        tower_features(model.vision_tower, None, None)


def test_a_picture_that_changes_while_it_is_read_is_not_stored(tmp_path, bases, tokenizer, pictures, monkeypatch):
    from visual import build_vision_tower

    tower = build_vision_tower(bases[3])
    cache = open_feature_cache(tmp_path / "cache", tower, "float32")
    _, image_map, _, captions = write_data(
        tmp_path / "data", [(["red.png", "blue.png"], ("<|extra_0|><|extra_0|>", "a"))], pictures
    )
    dataset = ImageCaptionDataset(
        image_map, captions, tokenizer, tower.image_transform, tower.num_image_tokens, feature_cache=cache
    )
    keys = dataset[0]["image_keys"]
    assert keys.shape == (2, 32)
    assert bytes(keys[0].tolist()) == cache.key_of(pictures / "red.png")
    load = dataset_module.load_image

    def replaced(path):
        image = load(path)
        if path.name == "red.png":
            Image.new("RGB", (40, 30), "pink").save(path)
        return image

    monkeypatch.setattr(dataset_module, "load_image", replaced)
    changed = dataset[0]["image_keys"]
    assert not changed[0].any()
    assert changed[1].tolist() == keys[1].tolist()


def test_logging_of_the_folder(command, tmp_path, capsys):
    run(command, tmp_path / "run", "--feature_cache", tmp_path / "cache")
    (folder,) = (tmp_path / "cache").iterdir()
    assert f"features of images are kept in {folder}" in capsys.readouterr().err
