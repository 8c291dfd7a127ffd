"""test.py and test.sh as people call them: what stands on stdout, and what is said where something is wrong."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_run import (
    ROOT,
    load_test_py,
    one_line_error,
    start,
    with_generation_config,
    write_as_the_original,
)
from transformers import set_seed

from dataset import load_image
from model import VisionLanguageModel
from model.errors import one_line

ask = load_test_py()
STOPS = {151643, 151644, 151645}
SYSTEM = "你是一位图像理解助手。"


@pytest.fixture
def answer(trained, loaded_once, capsys):
    """Call test.py in this process; return stdout, and fail unless the exit status is the one said.

    `answer.err` holds stderr of the last call.
    """

    def call(*flags: object, status: int = 0, checkpoint: Path = trained) -> str:
        capsys.readouterr()
        assert ask.main(["--model_weights", str(checkpoint), "--device", "cpu", *map(str, flags)]) == status
        out, call.err = capsys.readouterr()
        return out

    return call


@pytest.fixture(scope="module")
def loaded(trained):
    """Load the checkpoint, once for each dtype."""
    models = {}

    def load(dtype: torch.dtype) -> VisionLanguageModel:
        if dtype not in models:
            model = VisionLanguageModel.from_pretrained(model_weights=trained, dtype=dtype, device="cpu")
            if dtype != torch.float32:
                model.merge_lora()  # a sum that is rounded tells merged from unmerged; in fp32 nothing does
            models[dtype] = model
        return models[dtype]

    return load


@pytest.fixture(scope="module")
def expected(loaded, tokenizer):
    """What the checkpoint says to a conversation (question, answer, …, question), by `generate` alone."""

    def say(turns: list[str], images=(), *, system: str = SYSTEM, dtype=torch.float32, **options) -> str:
        model = loaded(dtype)
        text = f"<|im_start|>system\n{system}<|im_end|>"
        for question, reply in zip(turns[::2], [*turns[1::2], None], strict=True):
            text += f"\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
            text += "" if reply is None else f"{reply}<|im_end|>"
        ids = torch.tensor([tokenizer.encode(text.replace("<|extra_0|>", "<|extra_0|>" * 4))])
        pixels = torch.stack([model.vision_tower.image_transform(load_image(i)) for i in images]) if images else None
        output = model.generate(ids, torch.ones_like(ids), pixels, eos_token_id=sorted(STOPS), **options)
        new = output[0, ids.shape[1] :].tolist()
        end = next((i for i, token in enumerate(new) if token in STOPS), len(new))
        return tokenizer.decode(new[:end])

    return say


# ---- One answer


def test_stdout_is_the_answer_alone(trained, pictures, base_flags, expected, tmp_path):
    """In a process of its own, from another folder, through the run folder; both base models are printed."""
    done = start(
        *(sys.executable, ROOT / "test.py", "--model_weights", trained.parent, "--greedy"),
        *("--image_path", pictures["red"], "--prompt", "这是什么<|extra_0|>"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected(["这是什么<|extra_0|>"], [pictures["red"]], do_sample=False) + "\n"
    assert base_flags[1] in done.stderr
    assert base_flags[3] in done.stderr
    assert "may be ignored" not in done.stderr  # of sampling settings, which the published configuration holds
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("prompt", "images", "meant"),
    [
        ("What", ["red"], "<|extra_0|>What"),
        ("What", ["blue"], "<|extra_0|>What"),
        ("What<|extra_0|>is", ["red"], "What<|extra_0|>is"),
        ("Compare", ["red", "blue"], "<|extra_0|><|extra_0|>Compare"),
        ("Is <|extra_0|> like <|extra_0|> or not", ["blue", "red"], "Is <|extra_0|> like <|extra_0|> or not"),
        ("Hello", [], "Hello"),
    ],
)
def test_a_prompt_is_taken_as_it_is_or_gets_its_placeholders_in_front(
    answer, expected, pictures, prompt, images, meant
):
    paths = [pictures[name] for name in images]
    got = answer(*(["--image_path", *paths] if paths else []), "--prompt", prompt, "--greedy")
    assert got == expected([meant], paths, do_sample=False) + "\n"


def test_system_prompt_and_dtype(answer, expected, pictures):
    red = pictures["red"]
    flags = ["--image_path", red, "--prompt", "What<|extra_0|>", "--greedy"]
    other = expected(["What<|extra_0|>"], [red], system="Answer like a pirate.", do_sample=False)
    assert answer(*flags, "--system", "Answer like a pirate.") == other + "\n"
    rough = expected(["What<|extra_0|>"], [red], dtype=torch.bfloat16, do_sample=False)
    assert answer(*flags, "--dtype", "bfloat16") == rough + "\n"


# ---- Generation settings


def test_the_models_generation_config_rules_unless_flags_say_otherwise(
    answer, expected, pictures, base_flags, tmp_path
):
    flags = ["--image_path", pictures["red"], "--prompt", "What<|extra_0|>"]

    def reference(seed: int, **options) -> str:
        set_seed(seed)
        return expected(["What<|extra_0|>"], [pictures["red"]], **options) + "\n"

    # It says: sample, top_p 0.8, at most 8 tokens.
    sampled = answer(*flags)
    assert sampled == answer(*flags, "--seed", 42)
    assert sampled == answer(*flags, "--do_sample", "--top_p", 0.8, "--top_k", 0, "--max_new_tokens", 8)
    assert sampled != answer(*flags, "--seed", 1)
    assert sampled != answer(*flags, "--greedy") == reference(0, do_sample=False)
    assert answer(*flags, "--greedy", "--max_new_tokens", 2) == reference(0, do_sample=False, max_new_tokens=2)
    assert answer(*flags, "--greedy", "--repetition_penalty", 2.5) == reference(
        0, do_sample=False, repetition_penalty=2.5
    )
    # Another file, other rules.
    other = with_generation_config(base_flags[1], tmp_path / "qwen", do_sample=False, max_new_tokens=3)
    assert answer(*flags, "--base_language_model", other) == reference(0, do_sample=False, max_new_tokens=3)


@pytest.mark.parametrize(
    "settings",
    [
        ["--greedy"],
        ["--seed", 3],
        ["--seed", 4, "--temperature", 1.7, "--top_k", 40, "--repetition_penalty", 1.2, "--max_new_tokens", 20],
    ],
    ids=["greedy", "sampled", "all settings"],
)
def test_streaming_gives_the_same_answer(answer, pictures, settings):
    flags = ["--image_path", pictures["green"], "--prompt", "What<|extra_0|>", *settings]
    assert answer(*flags, "--stream") == answer(*flags)


# ---- A folder, a chat


def test_a_folder_is_asked_about_picture_by_picture(answer, pictures, tmp_path):
    for name in ("red", "blue"):
        shutil.copy(pictures[name], tmp_path / f"{name} one.PNG")
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 not really")
    (tmp_path / "notes.txt").write_text("not a picture")
    (tmp_path / "folder.png").mkdir()
    flags = ["--prompt", "What", "--do_sample", "--max_new_tokens", 12]  # each as if it were asked about alone
    lines = answer("--image_path", tmp_path, *flags, status=2).splitlines()
    assert "broken.jpg" in one_line_error(answer.err, "test.py")
    for line, name in zip(lines, ("blue", "red"), strict=True):
        alone = answer("--image_path", pictures[name], *flags)
        assert line == f"{name} one.PNG\t{one_line(alone.removesuffix(chr(10)))}"
    (tmp_path / "broken.jpg").unlink()
    assert answer("--image_path", tmp_path, *flags).splitlines() == lines


def test_a_chat_sees_the_turns_before(answer, expected, pictures, monkeypatch):
    blue = pictures["blue"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("What\nAnd why?\n"))
    got = answer("--image_path", blue, "--greedy")
    first = expected(["<|extra_0|>What"], [blue], do_sample=False)
    second = expected(["<|extra_0|>What", first, "And why?"], [blue], do_sample=False)
    assert got == f"{first}\n{second}\n"


# ---- Checkpoints


def test_the_originals_folders_need_their_base_models_named(answer, trained, pictures, base_flags, tmp_path):
    folder = write_as_the_original(trained, tmp_path / "original")
    flags = ["--image_path", pictures["red"], "--prompt", "What<|extra_0|>", "--greedy"]
    assert answer(*flags, *base_flags, checkpoint=folder) == answer(*flags)
    assert answer(*flags, checkpoint=folder, status=2) == ""
    said = one_line_error(answer.err, "test.py")
    assert "--base_language_model" in said
    assert "--base_value_model" in said


# ---- test.sh


def test_test_sh_runs_the_published_command(tmp_path):
    """From any folder; what is given comes last, and so overrides it."""
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["sh", str(ROOT / "test.sh"), "--prompt", "two words", "--greedy"]
    done = subprocess.run(command, cwd=tmp_path, env=env, text=True, capture_output=True)
    program, *words = done.stdout.removesuffix("\n").split("\n")
    assert Path(program) == ROOT / "test.py"
    published = ["--model_weights", "./weights/train_V1_5/checkpoint-10000/", "--image_path", "./test_img/1.jpg"]
    question = ["--prompt", "使用语言描述一下图中出现了那些颜色<|extra_0|>"]
    assert words == [*published, *question, "--prompt", "two words", "--greedy"]


# ---- What users get wrong


@pytest.fixture(scope="module")
def wrong(tmp_path_factory, tiny_siglip, trained) -> Path:
    """A folder of things that do not fit."""
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "empty").mkdir()
    (folder / "text.png").write_text("no picture")
    (folder / "siglip").symlink_to(tiny_siglip)
    (folder / "unfinished").symlink_to(trained.parent / "checkpoint-11")
    return folder


MISTAKES = {
    "no image": ("--image_path {}/nowhere.png", "nowhere.png"),
    "not an image": ("--image_path {}/text.png", "text.png"),
    "no pictures": ("--image_path {}/empty", "no picture"),
    "a folder, streamed": ("--image_path {} --stream", "--stream"),
    "too many placeholders": ("--prompt <|extra_0|><|extra_0|>", "2 placeholders"),
    "no checkpoint": ("--model_weights {}/nowhere", "nowhere"),
    "half a checkpoint": ("--model_weights {}/unfinished", "projector.safetensors"),
    "another tower": ("--base_value_model {}/siglip", "siglip"),
    "temperature, tiny": ("--temperature 1e-40", "--temperature 1e-40"),
    "top_p": ("--top_p 1.5", "--top_p 1.5"),
    "contradiction": ("--greedy --do_sample", "--greedy"),
    "misspelt": ("--promt x", "--promt"),
    "questions without answers": ("--batch q.jsonl", "--output"),
    "questions and a prompt": ("--batch q.jsonl --output a.jsonl", "--prompt"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line_and_no_answer(answer, pictures, wrong, case):
    flags, words = MISTAKES[case]
    right = ["--image_path", pictures["red"], "--prompt", "What<|extra_0|>"]
    assert answer(*right, *flags.replace("{}", str(wrong)).split(), status=2) == ""
    said = one_line_error(answer.err, "test.py")
    assert words in said
    assert len(said) < 700


def test_a_folder_needs_a_prompt(answer, pictures):
    assert answer("--image_path", pictures["red"].parent, status=2) == ""
    assert "--prompt" in one_line_error(answer.err, "test.py")


def test_a_mistake_ends_the_process_with_2(tmp_path):
    done = start(sys.executable, ROOT / "test.py", "--prompt", "What", "--image_path", "nowhere.jpg", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "--model_weights" in one_line_error(done.stderr, "test.py")
    assert done.stderr.count("\n") == 1, "no other package says anything while it is imported"
