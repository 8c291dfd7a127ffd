"""A tiny model that has been trained until it gives the answers below, for tests that read what it says."""

from __future__ import annotations

from pathlib import Path

from tiny_run import build_trainer, make_language_model, make_pictures, write_data
from tiny_towers import make_clip_checkpoint

SONG = "Sing!"
"""The question whose answer goes on for ever, "la la la …": training cut it, so that the model never saw its end."""
HOSTILE = "Markup?"
"""The question whose answer would run a script and load a picture from another host, if a page took it for markup."""
COLOURS_TOLD = {"red": "It is red.", "green": "It is green.", "blue": "It is blue."}
CHINESE = {"red": "红色。", "green": "绿色。", "blue": "蓝色。"}
SAMPLES: list[tuple[object, object]] = [
    *(
        (f"{name}.png", {"turns": [{"q": "<|extra_0|>Which colour?", "a": answer}, {"q": "Again?", "a": f"{name}!"}]})
        for name, answer in COLOURS_TOLD.items()
    ),
    *((f"{name}.png", ("<|extra_0|>这是什么颜色？", answer)) for name, answer in CHINESE.items()),
    (["red.png", "blue.png"], ("<|extra_0|><|extra_0|>Both?", "Red, then blue.")),
    (["blue.png", "red.png"], ("<|extra_0|><|extra_0|>Both?", "Blue, then red.")),
    (None, ("Hello", "Hello, visitor.")),
    (None, (HOSTILE, '<img src=x onerror="hacked = 1">![x](http://elsewhere.example/y.png)')),
    (None, (SONG, "la" + " la" * 200)),
]


def train_tiny(folder: Path, qwen_tiktoken: Path) -> Path:
    """Train in this process; return the run's folder. Its pictures are in `folder / "pictures"`."""
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "kv_channels": 16, "intermediate_size": 256}
    language = make_language_model(
        folder / "qwen", qwen_tiktoken, head_scale=2.0, seq_length=8192, generation={"do_sample": False}, **sizes
    )
    make_pictures(folder / "pictures")
    data = write_data(folder, SAMPLES, folder / "pictures")
    trainer = build_trainer(
        [
            *("--base_language_model", language, "--base_value_model", make_clip_checkpoint(folder / "clip"), *data),
            *("--output_dir", folder / "run", "--use_cpu", "true", "--lora_rank", 16, "--lora_alpha", 32),
            *("--lora_dropout", 0, "--target_modules", "c_attn|w1|w2|c_proj", "--max_steps", 60),
            *("--learning_rate", 1e-2, "--feature_proj_lr", 2e-2, "--per_device_train_batch_size", len(SAMPLES)),
            *("--max_length", 80, "--logging_steps", 60, "--disable_tqdm", "true"),
        ]
    )
    trainer.train()
    return folder / "run"
