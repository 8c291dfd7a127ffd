"""Every command of the README runs as it is written: in a copy of the repository, with tiny models in a hub cache."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_families import make_family
from tiny_run import COLOURS, ROOT, environment, free_port, make_language_model
from tiny_towers import make_clip_checkpoint, make_siglip_checkpoint

from model import read_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.long]

BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.S | re.M)
SOURCES = (
    "README.md",
    *(f"docs/{name}.md" for name in ("asking", "language-models", "resuming", "feature-cache", "memory")),
)
ELSEWHERE = (  # installing, downloading, tests and benchmarks have tests of their own or need a network
    r"curl|unzip|mkdir|python3 -m venv|pip install|\. \.venv|sh demo\.sh|sh tests/run\.sh|web_demo\.py|weights/original"
)
SHORTER = " --max_steps 2 --use_cpu true"  # a reader has a GPU and an hour


def commands(name: str) -> list[str]:
    """The lines of a document's shell blocks; a loop is one command."""
    found: list[str] = []
    for block in BLOCK.findall((ROOT / name).read_text(encoding="utf-8")):
        if re.search(r"^for ", block, re.M):
            if not re.search(ELSEWHERE, block):
                found.append(block)
            else:  # what follows a loop of downloads
                found += [line for line in block.splitlines() if line.startswith("python ")]
        else:
            found += [line for line in block.splitlines() if not re.search(ELSEWHERE, line)]
    return found


def hub(folder: Path, name: str, model: str) -> None:
    """Put a model where transformers looks for a hub name when it is offline."""
    repository = folder / "hub" / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(model, repository / "snapshots" / ("0" * 40))


@pytest.fixture(scope="module")
def checkout(tmp_path_factory, qwen_tiktoken):
    """A copy of the repository with raw data, a hub cache of tiny models, and the environment that names it."""
    folder = tmp_path_factory.mktemp("reader")
    copy = folder / "repository"
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in tracked.splitlines():
        if (ROOT / name).is_file() and not name.startswith(("tests/", "benchmarks/results/")):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    data = copy / "data"
    write_raw_data(data)
    language = make_language_model(folder / "qwen", qwen_tiktoken)
    for name in ("Qwen/Qwen-7B-Chat", "Qwen/Qwen-1_8B-Chat", "Qwen/Qwen-14B-Chat"):
        hub(folder / "home", name, language)
    hub(folder / "home", "openai/clip-vit-large-patch14", make_clip_checkpoint(folder / "clip"))
    hub(folder / "home", "Qwen/Qwen3-4B-Instruct-2507", make_family(folder / "qwen3", "qwen3"))
    hub(folder / "home", "google/siglip-so400m-patch14-384", make_siglip_checkpoint(folder / "siglip"))
    shuffled = make_siglip_checkpoint(folder / "siglip2", image_size=42)  # a grid of 3 × 3 patches
    hub(folder / "home", "google/siglip2-so400m-patch14-384", shuffled)
    questions = [
        {"id": 1, "image": "test_img/1.jpg", "prompt": "Which colour?", "answers": ["red"]},
        {"id": 2, "image": f"data/coco/train2017/{next(iter(COLOURS))}.jpg", "prompt": "Which?", "answers": ["blue"]},
        {"id": 3, "image": None, "prompt": "?", "answers": ["two"]},
    ]
    (copy / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return copy, environment(HF_HOME=str(folder / "home"), PATH=path, MASTER_PORT=str(free_port()))


def write_raw_data(data: Path) -> None:
    """A few annotations in both formats, where config.yaml expects them."""
    from PIL import Image

    challenger = data / "ai_challenger_caption_train_20170902"
    photos = challenger / "caption_train_images_20170902", data / "coco" / "train2017"
    for photo_folder in photos:
        photo_folder.mkdir(parents=True)
        for name, colour in COLOURS.items():
            Image.new("RGB", (40, 30), colour).save(photo_folder / f"{name}.jpg")
    captions = [{"image_id": f"{name}.jpg", "caption": [f"一块{name}的牌子。"] * 5, "url": ""} for name in COLOURS]
    (challenger / "caption_train_annotations_20170902.json").write_text(json.dumps(captions))
    (data / "llava").mkdir()
    for name in ("detail_23k", "complex_reasoning_77k"):
        records = [
            {
                "id": colour,
                "image": f"{colour}.jpg",
                "conversations": [
                    {"from": "human", "value": "What is it?\n<image>"},
                    {"from": "gpt", "value": f"A {colour} sign."},
                ],
            }
            for colour in COLOURS
        ]
        (data / "llava" / f"{name}.json").write_text(json.dumps(records))


@pytest.mark.parametrize(
    "sources", [SOURCES[:1], pytest.param(SOURCES, marks=pytest.mark.release)], ids=["README", "all"]
)
def test_every_command_runs(checkout, sources):
    folder, env = checkout
    failed, run = [], 0
    for name in sources:
        for command in commands(name):
            if "weights/train_V1_5" in command or "test.sh" in command:
                published = folder / "weights" / "train_V1_5" / "checkpoint-10000"
                if not published.exists():
                    shutil.copytree(folder / "weights" / "train_V1_5" / "checkpoint-2", published)
            if re.search(r"\btrain\.(sh|py)\b", command) and "--dry_run" not in command:
                command = command.rstrip() + SHORTER + " --save_steps 2"
                if "--resume" not in command and "--output_dir" not in command:
                    command += " --overwrite_output_dir true"
            if command.startswith("python test.py") and "--prompt" not in command and "--batch" not in command:
                command = f"printf 'Which?\\nexit\\n' | {command}"
            done = subprocess.run(
                ["bash", "-euc", command],
                cwd=folder,
                env=env,
                capture_output=True,
                text=True,
                stdin=subprocess.DEVNULL,
                timeout=600,
            )
            run += 1
            if done.returncode != 0:
                failed.append((name, command, done.returncode, done.stderr[-800:]))
    assert not failed, failed
    assert run > 10
    kinds = {"aligned": "projector", "qwen3-lora": "lora", "qwen3-all": "all"}  # of the README's two stages
    assert {name: read_checkpoint(folder / "weights" / name).train_only for name in kinds} == kinds
    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [sorted(answer) for answer in answers] == [["answer", "id"]] * 3
    assert (folder / "results/mine/report.html").is_file()
