"""From raw annotations to an answer, through the commands that people type."""

from __future__ import annotations

import sys

import pytest
from tiny_run import (
    load_test_py,
    make_language_model,
    make_pictures,
    printed_steps,
    start,
    write_data,
)
from tiny_towers import make_clip_checkpoint

SAMPLES = [
    ("red.png", ("这幅图像描述了什么？<|extra_0|>", "一块红色的牌子。🟥")),
    ("blue.png", ("这幅图像描述了什么？<|extra_0|>", "A blue sign,\n and nothing else.")),
    (["green.png", "yellow.png"], ("Compare <|extra_0|> with <|extra_0|>!", "绿与黄: green, then yellow.")),
    (
        "black.png",
        {"turns": [{"q": "<|extra_0|>Is it dark?", "a": "Yes, black."}, {"q": "为什么？", "a": "黑色不反光。"}]},
    ),
]
"""The first two share their question: only the picture tells them apart."""


@pytest.mark.slow
def test_four_samples_are_learnt_to_their_exact_answers(tmp_path, qwen_tiktoken, capsys):
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "kv_channels": 16, "intermediate_size": 256}
    language = make_language_model(tmp_path / "qwen", qwen_tiktoken, head_scale=2.0, **sizes)
    bases = ["--base_language_model", language, "--base_value_model", make_clip_checkpoint(tmp_path / "clip")]
    pictures = make_pictures(tmp_path / "pictures")
    data = write_data(tmp_path, SAMPLES, tmp_path / "pictures")
    done = start(
        *(sys.executable, "train.py", *bases, *data, "--output_dir", tmp_path / "run", "--use_cpu", "true"),
        *("--lora_rank", "16", "--lora_alpha", "32", "--lora_dropout", "0", "--target_modules", "c_attn|w1|w2|c_proj"),
        *("--learning_rate", "1e-2", "--feature_proj_lr", "2e-2", "--per_device_train_batch_size", "4"),
        *("--max_steps", "36", "--logging_steps", "12"),
    )
    assert done.returncode == 0, done.stderr
    assert printed_steps(done.stdout)[-1]["loss"] < 0.1

    greedy = ["--model_weights", str(tmp_path / "run"), "--device", "cpu", "--greedy", "--max_new_tokens", "40"]
    asked = ["--image_path", pictures["red"], "--prompt", "这幅图像描述了什么？<|extra_0|>"]
    done = start(sys.executable, "test.py", *greedy, *asked)
    assert (done.returncode, done.stdout) == (0, "一块红色的牌子。🟥\n")
    done = start(sys.executable, "test.py", *greedy, "--image_path", pictures["black"], stdin="Is it dark?\n为什么？\n")
    assert (done.returncode, done.stdout) == (0, "Yes, black.\n黑色不反光。\n")
    capsys.readouterr()
    for names, (question, answer) in (SAMPLES[1], SAMPLES[2]):
        paths = [str(tmp_path / "pictures" / name) for name in ([names] if isinstance(names, str) else names)]
        assert load_test_py().main([*greedy, "--image_path", *paths, "--prompt", question]) == 0
        assert capsys.readouterr().out == f"{answer}\n"
