"""Tiny base models, data and command lines for the tests of train.py and test.py as people call them."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_qwen import tiny_model
from tiny_towers import make_clip_checkpoint
from torch import Tensor

import train
from model import VLMTrainer
from model.arguments import parse_arguments

ROOT = Path(__file__).resolve().parent.parent
COLOURS = {
    "red": (220, 20, 20),
    "green": (20, 200, 40),
    "blue": (20, 40, 220),
    "yellow": (240, 230, 20),
    "black": (5, 5, 5),
    "white": (250, 250, 250),
}
PUBLISHED_GENERATION_CONFIG = {
    "chat_format": "chatml",
    "eos_token_id": 151643,
    "pad_token_id": 151643,
    "max_window_size": 24000,
    "max_new_tokens": 512,
    "do_sample": True,
    "top_k": 0,
    "top_p": 0.8,
}


def make_language_model(
    folder: Path, qwen_tiktoken: Path, *, generation: dict | None = None, head_scale: float = 1.0, **changes
) -> str:
    """A QWen checkpoint as published, tiny but for its vocabulary; answers are short unless `generation` says so.

    A frozen random head has to be loud (`head_scale`), or even a hidden state that points straight at one token's row
    leaves most of the probability to the 151,935 others.
    """
    model = tiny_model(vocab_size=151936, **changes)
    with torch.no_grad():
        model.lm_head.weight.mul_(head_scale)
    model.save_pretrained(str(folder))
    shutil.copy(qwen_tiktoken, folder / "qwen.tiktoken")
    auto_map = {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]}
    config = {"tokenizer_class": "QWenTokenizer", "auto_map": auto_map}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    settings = {**PUBLISHED_GENERATION_CONFIG, "max_new_tokens": 8, **(generation or {})}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return str(folder)


def make_bases(folder: Path, qwen_tiktoken: Path) -> list[str]:
    """Both base models; returns the flags that name them."""
    language = make_language_model(folder / "qwen", qwen_tiktoken)
    return ["--base_language_model", language, "--base_value_model", make_clip_checkpoint(folder / "clip")]


def make_pictures(folder: Path) -> dict[str, Path]:
    """One picture of each colour, by its name."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, colour in COLOURS.items():
        Image.new("RGB", (40, 30), colour).save(folder / f"{name}.png")
    return {name: folder / f"{name}.png" for name in COLOURS}


def write_data(folder: Path, samples: list[tuple[object, object]], pictures: Path) -> list[str]:
    """Write both files; a sample is (image names, caption or (question, answer)). Returns the flags that name them."""
    folder.mkdir(parents=True, exist_ok=True)
    image_map, captions = {}, {}
    for number, (images, caption) in enumerate(samples):
        image_map[f"sample {number}"] = {"image_file": images, "ID": number, "path": str(pictures)}
        captions[str(number)] = {"q": caption[0], "a": caption[1]} if isinstance(caption, tuple) else caption
    files = folder / "image_map.json", folder / "captions.json"
    for file, content in zip(files, (image_map, captions), strict=True):
        file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return ["--image_map", str(files[0]), "--captions_file", str(files[1])]


MIXED_CAPTIONS: list[tuple[object, object]] = [
    ("red.png", ("What colour?<|extra_0|>", ["It is red.", "Red, I think.", "A red one."])),
    ("green.png", ("<|extra_0|>这是什么颜色？", "绿色。")),
    (["blue.png", "white.png"], ("First <|extra_0|>, then <|extra_0|>?", "Blue, then white.")),
    (None, ("1 + 1?", ["2", "Two."])),
    (None, {"turns": [{"q": "你好", "a": "你好！"}, {"q": "再见", "a": "再见，朋友。"}]}),
    ("black.png", {"turns": [{"q": "<|extra_0|>Dark?", "a": "Yes."}, {"q": "Why?", "a": "Black takes all light in."}]}),
    (None, ("Say a long word.", "Donaudampfschifffahrtsgesellschaft")),
    (None, ("Name a fruit.", "Apple")),
    ("yellow.png", ("<|extra_0|>", "Yellow, as a lemon is.")),
    (None, ("Name a planet.", "Mars")),
    (None, ("Ja?", "Nein.")),
    (None, ("🙂", "🙃")),
]
"""Twelve samples with one image, two, or none, of one turn or two, with alternatives or none; see `write_data`."""


def environment(**changes: str) -> dict[str, str]:
    """Offline, one thread per process, and nothing of an outer torchrun."""
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NPROC_PER_NODE")
    kept = {name: value for name, value in os.environ.items() if name not in launcher}
    path = os.pathsep.join([str(Path(sys.executable).parent), kept["PATH"]])
    offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PATH": path}
    return {**kept, **offline, **changes}


def start(*command: object, stdin: str = "", cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    words = [str(word) for word in command]
    return subprocess.run(
        words, input=stdin, cwd=cwd, env=environment(**env), text=True, capture_output=True, timeout=900
    )


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def printed_steps(output: str) -> list[dict[str, float]]:
    """The steps that Trainer printed, rounded as they are."""
    lines = re.findall(r"\{'loss'.*?\}", output)
    return [{k: float(v) for k, v in re.findall(r"'(\w+)': '?([-+.\deE]+)'?", line)} for line in lines]


def losses(checkpoint: Path) -> list[float]:
    """The loss of every step up to a checkpoint, as it is."""
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def trained_weights(folder: Path) -> dict[str, Tensor]:
    """LoRA and projector of a checkpoint."""
    return {**load_file(folder / "adapter_model.safetensors"), **load_file(folder / "projector.safetensors")}


def weights_differ(a: Path, b: Path) -> float:
    """The largest difference between the weights of two checkpoints."""
    first, second = trained_weights(a), trained_weights(b)
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)


def write_as_the_original(checkpoint: Path, folder: Path) -> Path:
    """Write a checkpoint as the original project did: pickled tensors, and no note of the base models."""
    folder.mkdir(parents=True)
    shutil.copy(checkpoint / "adapter_config.json", folder)
    torch.save(load_file(checkpoint / "adapter_model.safetensors"), folder / "adapter_model.bin")
    torch.save(load_file(checkpoint / "projector.safetensors"), folder / "other_params.bin")
    return folder


def one_line_error(stderr: str, program: str) -> str:
    """What the program says went wrong; fails if that is not one line, or if there is a traceback."""
    assert "Traceback" not in stderr, stderr
    lines = [line for line in stderr.splitlines() if line.startswith(f"{program}: ")]
    assert len(lines) == 1, stderr
    return lines[0]


def too_much_memory() -> RuntimeError:
    """Return what PyTorch really says on the CPU."""
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 58, dtype=torch.uint8)
    return error.value


def with_generation_config(base: str, folder: Path, **changes: object) -> Path:
    """Copy a language model, and change its generation_config.json; None leaves a setting out."""
    shutil.copytree(base, folder, dirs_exist_ok=True)
    settings = {**json.loads((folder / "generation_config.json").read_text()), **changes}
    kept = {name: value for name, value in settings.items() if value is not None}
    (folder / "generation_config.json").write_text(json.dumps(kept))
    return folder


def build_trainer(argv: Sequence[object]) -> VLMTrainer:
    """Return what train.py trains for a command line; nothing keeps other runs out of its folder afterwards."""
    with contextlib.ExitStack() as lock:
        return train.build_trainer(*parse_arguments([str(word) for word in argv]), lock)


def exit_status(monkeypatch: pytest.MonkeyPatch, trainer: VLMTrainer) -> int:
    """What train.py makes of a trainer's run."""
    monkeypatch.setattr(train, "parse_arguments", lambda *_: (None, SimpleNamespace(dry_run=False), None))
    monkeypatch.setattr(train, "build_trainer", lambda *_: trainer)
    return train.main([])


def load_test_py() -> ModuleType:
    """test.py as a module; `import test` would mean Python's own."""
    spec = importlib.util.spec_from_file_location("test_py", ROOT / "test.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
