"""Every kind of tower beside today's language models: planned, cached, trained, and asked."""

from __future__ import annotations

import json
import re

import pytest
from tiny_families import make_family
from tiny_run import MIXED_CAPTIONS, load_test_py, losses, one_line_error, write_data
from tiny_towers import (
    make_clip_checkpoint,
    make_dinov2_checkpoint,
    make_dinov3_checkpoint,
    make_siglip_checkpoint,
    make_vit_checkpoint,
)

import train

MAKE = {
    "dinov3_vit": make_dinov3_checkpoint,
    "clip": make_clip_checkpoint,
    "siglip": make_siglip_checkpoint,
    "dinov2": make_dinov2_checkpoint,
    "vit": make_vit_checkpoint,
}
QUICK = [
    *("--lora_rank", "4", "--lora_alpha", "8", "--learning_rate", "1e-2", "--feature_proj_lr", "1e-2"),
    *("--use_cpu", "true", "--report_to", "none", "--disable_tqdm", "true", "--logging_steps", "1"),
    *("--max_steps", "2", "--per_device_train_batch_size", "4"),
]


@pytest.mark.parametrize(
    "kind", [kind if kind == "dinov3_vit" else pytest.param(kind, marks=pytest.mark.slow) for kind in MAKE]
)
def test_a_tower_is_planned_cached_trained_and_asked(kind, tmp_path, pictures, capsys):
    tower = MAKE[kind](tmp_path / "tower")
    flags = ["--base_language_model", make_family(tmp_path / "base", "qwen3"), "--base_value_model", tower, *QUICK]
    flags += write_data(tmp_path / "data", MIXED_CAPTIONS, pictures["red"].parent)
    assert train.main([*flags, "--dry_run"]) == 0
    planned = capsys.readouterr().out
    cache = ["--feature_cache", str(tmp_path / "cache"), "--feature_cache_dtype", "float32"]
    for name, more in (("plain", []), ("cached", cache)):
        assert train.main([*flags, *more, "--output_dir", str(tmp_path / name)]) == 0
    assert losses(tmp_path / "plain/checkpoint-2") == losses(tmp_path / "cached/checkpoint-2")
    (note,) = (tmp_path / "cache").rglob("tower.json")
    assert (json.loads(note.read_text())["kind"], json.loads(note.read_text())["shape"]) == (kind, [4, 32])
    config = json.loads((tmp_path / "plain/multimodal_config.json").read_text())
    assert (config["vision_tower"], config["num_image_tokens"]) == (kind, 4)
    assert re.search(r"of images +0 +[\d.]+ +8\n", planned)
    capsys.readouterr()
    ask = ["--model_weights", str(tmp_path / "plain"), "--image_path", str(pictures["red"]), "--prompt", "What?"]
    assert load_test_py().main([*ask, "--greedy"]) == 0
    assert capsys.readouterr().out.strip()
    other = MAKE[kind](tmp_path / "other", seed=1)
    assert load_test_py().main([*ask, "--base_value_model", other]) == 2
    assert "base_value_model differ" in one_line_error(capsys.readouterr().err, "test.py")
