"""test.py and test.sh as people call them: what stands on stdout, and what is said where something is wrong."""

from __future__ import annotations

import io
import json
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
    make_bases,
    make_language_model,
    make_pictures,
    one_line_error,
    start,
    write_as_the_original,
)
from tiny_towers import make_clip_checkpoint, make_siglip_checkpoint
from transformers import set_seed

from dataset import load_image
from model import LoraSettings, VisionLanguageModel
from qwen import QWenTokenizer

ask = load_test_py()
STOPS = {151643, 151644, 151645}
SYSTEM = "你是一位图像理解助手。"


@pytest.fixture(scope="module")
def bases(tmp_path_factory, qwen_tiktoken) -> list[str]:
    return make_bases(tmp_path_factory.mktemp("bases"), qwen_tiktoken)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> dict[str, Path]:
    return make_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory, bases) -> Path:
    """A checkpoint whose LoRA and projector make a difference, in a run folder with an older and a broken one."""
    model = VisionLanguageModel.from_pretrained(bases[1], bases[3], device="cpu")
    model.add_lora(LoraSettings(rank=4, alpha=8, dropout=0.0))
    generator = torch.Generator().manual_seed(0)
    run = tmp_path_factory.mktemp("run")
    with torch.no_grad():
        for number in (9, 10):  # as text, 9 comes last
            for parameter in (p for p in model.parameters() if p.requires_grad):
                parameter.normal_(0, 0.4, generator=generator)
            model.save_checkpoint(run / f"checkpoint-{number}")
    shutil.copytree(run / "checkpoint-10", run / "checkpoint-11")
    (run / "checkpoint-11/projector.safetensors").unlink()  # as if the disk had been full
    return run / "checkpoint-10"


@pytest.fixture
def answer(weights, capsys):
    """Call test.py in this process; gives stdout, and fails unless the exit status is 0."""

    def call(*flags: object, status: int = 0, checkpoint: Path = weights) -> str:
        capsys.readouterr()
        assert ask.main(["--model_weights", str(checkpoint), "--device", "cpu", *map(str, flags)]) == status
        out, call.err = capsys.readouterr()
        return out

    return call


def expected(
    weights: Path, turns: list[str], images=(), *, system: str = SYSTEM, dtype=None, bases=(), **options
) -> str:
    """What the checkpoint says to a conversation (question, answer, …, question), by `generate` alone."""
    model = VisionLanguageModel.from_pretrained(*bases, model_weights=weights, dtype=dtype, device="cpu")
    if dtype is not None:
        model.merge_lora()  # a sum that is rounded tells merged from unmerged; in fp32 nothing does
    tokenizer = QWenTokenizer.from_pretrained(model.base_language_model)
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


# ---- One answer


def test_stdout_is_the_answer_alone(weights, pictures, bases, tmp_path):
    """In a process of its own, from another folder, through the run folder; both base models are printed."""
    done = start(
        *(sys.executable, ROOT / "test.py", "--model_weights", weights.parent, "--greedy"),
        *("--image_path", pictures["red"], "--prompt", "这是什么<|extra_0|>"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected(weights, ["这是什么<|extra_0|>"], [pictures["red"]], do_sample=False) + "\n"
    assert bases[1] in done.stderr
    assert bases[3] in done.stderr
    assert "may be ignored" not in done.stderr  # of sampling settings, which the published configuration holds
    assert "Traceback" not in done.stderr


def test_a_prompt_is_taken_as_it_is_or_gets_its_placeholders_in_front(answer, weights, pictures):
    red, blue = pictures["red"], pictures["blue"]
    for prompt, images, meant in (
        ("What", [red], "<|extra_0|>What"),
        ("What<|extra_0|>is", [red], "What<|extra_0|>is"),
        ("Compare", [red, blue], "<|extra_0|><|extra_0|>Compare"),
        ("Is <|extra_0|> like <|extra_0|> or not", [blue, red], "Is <|extra_0|> like <|extra_0|> or not"),
        ("Hello", [], "Hello"),
    ):
        paths = ["--image_path", *images] if images else []
        got = answer(*paths, "--prompt", prompt, "--greedy")
        assert got == expected(weights, [meant], images, do_sample=False) + "\n", prompt
    # The images do make a difference.
    assert answer("--image_path", red, "--prompt", "What", "--greedy") != answer(
        "--image_path", blue, "--prompt", "What", "--greedy"
    )


def test_system_prompt_and_dtype(answer, weights, pictures):
    red = pictures["red"]
    flags = ["--image_path", red, "--prompt", "What<|extra_0|>", "--greedy"]
    other = expected(weights, ["What<|extra_0|>"], [red], system="Answer like a pirate.", do_sample=False)
    assert answer(*flags, "--system", "Answer like a pirate.") == other + "\n"
    rough = expected(weights, ["What<|extra_0|>"], [red], dtype=torch.bfloat16, do_sample=False)
    assert answer(*flags, "--dtype", "bfloat16") == rough + "\n"


# ---- Generation settings


def test_the_models_generation_config_rules_unless_flags_say_otherwise(answer, weights, pictures, bases, tmp_path):
    flags = ["--image_path", pictures["red"], "--prompt", "What<|extra_0|>"]
    one = (["What<|extra_0|>"], [pictures["red"]])

    def reference(seed: int, **options) -> str:
        set_seed(seed)
        return expected(weights, *one, **options) + "\n"

    # It says: sample, top_p 0.8, at most 8 tokens.
    sampled = answer(*flags)
    assert sampled == answer(*flags) == answer(*flags, "--seed", 42)
    assert sampled == answer(*flags, "--do_sample", "--top_p", 0.8, "--top_k", 0, "--max_new_tokens", 8)
    assert sampled != answer(*flags, "--seed", 1)
    assert sampled != answer(*flags, "--greedy") == reference(0, do_sample=False)
    assert answer(*flags, "--greedy", "--max_new_tokens", 2) == reference(0, do_sample=False, max_new_tokens=2)
    assert answer(*flags, "--greedy", "--repetition_penalty", 2.5) == reference(
        0, do_sample=False, repetition_penalty=2.5
    )
    # Another file, other rules.
    shorter = tmp_path / "qwen"
    shutil.copytree(bases[1], shorter)
    (shorter / "generation_config.json").write_text(json.dumps({"do_sample": False, "max_new_tokens": 3}))
    assert answer(*flags, "--base_language_model", shorter) == reference(0, do_sample=False, max_new_tokens=3)


def test_streaming_gives_the_same_answer(answer, pictures):
    flags = ["--image_path", pictures["green"], "--prompt", "What<|extra_0|>"]
    for settings in (
        ["--greedy"],
        ["--seed", 3],
        ["--seed", 4, "--temperature", 1.7, "--top_k", 40, "--repetition_penalty", 1.2, "--max_new_tokens", 20],
    ):
        assert answer(*flags, *settings, "--stream") == answer(*flags, *settings)


# ---- A folder, a chat


def narrow_window(language_model: str, folder: Path) -> Path:
    """The language model with a window of 40 tokens."""
    shutil.copytree(language_model, folder)
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**settings, "max_window_size": 40}))
    return folder


def test_a_folder_is_asked_about_picture_by_picture(answer, pictures, tmp_path):
    for name in ("red", "blue"):
        shutil.copy(pictures[name], tmp_path / f"{name} one.PNG")
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 not really")
    (tmp_path / "notes.txt").write_text("not a picture")
    (tmp_path / "folder.png").mkdir()
    flags = ["--prompt", "What", "--greedy", "--max_new_tokens", 12]
    lines = answer("--image_path", tmp_path, *flags, status=2).splitlines()
    assert answer.err.count("test.py: ") == 1
    assert "broken.jpg" in one_line_error(answer.err, "test.py")
    for line, name in zip(lines, ("blue", "red"), strict=True):
        alone = answer("--image_path", pictures[name], *flags)
        assert line == f"{name} one.PNG\t{ask.one_line(alone.removesuffix(chr(10)))}"
    (tmp_path / "broken.jpg").unlink()
    assert answer("--image_path", tmp_path, *flags).splitlines() == lines


def test_a_folder_with_a_question_that_is_cut_names_the_picture(answer, pictures, bases, tmp_path):
    narrow = narrow_window(bases[1], tmp_path / "qwen")
    folder = pictures["red"].parent
    answer("--image_path", folder, "--prompt", "word " * 99, "--greedy", "--base_language_model", narrow)
    cut = [
        line.split(": the question is longer than the window of 40 tokens: the")[0] for line in answer.err.splitlines()
    ]
    assert [name for name in cut if name.endswith(".png")] == sorted(path.name for path in pictures.values())


def test_an_answer_takes_one_column_of_one_line():
    assert ask.one_line("a\\n b\nc\r\nd\te") == "a\\\\n b\\nc\\r\\nd\\te"


def test_a_chat_sees_the_turns_before(answer, weights, pictures, monkeypatch):
    blue = pictures["blue"]
    monkeypatch.setattr(
        sys, "stdin", io.StringIO("Two <|extra_0|> of <|extra_0|>?\nWhat\n\n  And why <|extra_0|>? \nexit\nMore\n")
    )
    got = answer("--image_path", blue, "--greedy")
    first = expected(weights, ["<|extra_0|>What"], [blue], do_sample=False)
    second = expected(weights, ["<|extra_0|>What", first, "And why ?"], [blue], do_sample=False)
    assert got == f"{first}\n{second}\n"
    assert "2 placeholders" in one_line_error(answer.err, "test.py")  # and the chat went on
    monkeypatch.setattr(sys, "stdin", io.StringIO("What"))
    assert answer("--greedy") == expected(weights, ["What"], do_sample=False) + "\n"


def test_a_chat_longer_than_the_window_keeps_the_image(answer, weights, pictures, bases, tmp_path, monkeypatch):
    narrow = narrow_window(bases[1], tmp_path / "qwen")
    monkeypatch.setattr(sys, "stdin", io.StringIO("What\nWhy\n"))
    blue = pictures["blue"]
    got = answer("--image_path", blue, "--greedy", "--base_language_model", narrow)
    first, second = (expected(weights, [f"<|extra_0|>{word}"], [blue], do_sample=False) for word in ("What", "Why"))
    assert got == f"{first}\n{second}\n"
    assert "the oldest 1 turn was left out" in answer.err


# ---- Checkpoints


def test_the_originals_folders_need_their_base_models_named(answer, weights, pictures, bases, tmp_path):
    folder = write_as_the_original(weights, tmp_path / "original")
    flags = ["--image_path", pictures["red"], "--prompt", "What<|extra_0|>", "--greedy"]
    assert answer(*flags, *bases, checkpoint=folder) == answer(*flags)
    assert answer(*flags, checkpoint=folder, status=2) == ""
    assert "give --base_language_model and --base_value_model" in one_line_error(answer.err, "test.py")


# ---- test.sh


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("extra", [[], ["--prompt", "two words", "--greedy"]])
def test_test_sh_runs_the_published_command(tmp_path, elsewhere, extra):
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)
    cwd = tmp_path if elsewhere else ROOT
    script = str(ROOT / "test.sh") if elsewhere else "test.sh"
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["sh", script, *extra], cwd=cwd, env=env, text=True, capture_output=True)
    program, *words = done.stdout.removesuffix("\n").split("\n")
    assert (cwd / program).resolve() == ROOT / "test.py"
    published = ["--model_weights", "./weights/train_V1_5/checkpoint-10000/", "--image_path", "./test_img/1.jpg"]
    assert words == [*published, "--prompt", "使用语言描述一下图中出现了那些颜色<|extra_0|>", *extra]


# ---- What users get wrong


def mistakes(folder: Path, qwen_tiktoken: Path, bases: list[str], weights: Path) -> dict[str, tuple[list[object], str]]:
    """Flags that come last, and what the message has to say."""
    (folder / "empty").mkdir()
    (folder / "text.png").write_text("no picture")
    wider = make_language_model(folder / "wider", qwen_tiktoken, hidden_size=24)
    siglip = make_siglip_checkpoint(folder / "siglip")
    finer = make_clip_checkpoint(folder / "finer", patch_size=7)
    no_projector = weights.parent / "checkpoint-11"
    broken = folder / "broken"
    shutil.copytree(weights, broken)
    (broken / "adapter_model.safetensors").write_bytes(b"cut")
    moved = folder / "moved"
    shutil.copytree(weights, moved)
    note = json.loads((moved / "multimodal_config.json").read_text())
    (moved / "multimodal_config.json").write_text(json.dumps({**note, "base_language_model": "/gone/qwen"}))
    return {
        "no image": (["--image_path", folder / "nowhere.png"], "nowhere.png"),
        "not an image": (["--image_path", folder / "text.png"], "text.png"),
        "no pictures": (["--image_path", folder / "empty"], "no picture"),
        "a folder among files": (["--image_path", folder / "text.png", folder / "empty"], "must be given alone"),
        "no checkpoint": (["--model_weights", folder / "nowhere"], "nowhere"),
        "empty checkpoint": (["--model_weights", folder / "empty"], "adapter_config.json"),
        "half a checkpoint": (["--model_weights", no_projector], "projector.safetensors"),
        "broken checkpoint": (["--model_weights", broken], "adapter_model.safetensors"),
        "base moved away": (["--model_weights", moved], "/gone/qwen"),
        "another language model": (["--base_language_model", wider], "language_hidden_size is 24"),
        "another tower": (["--base_value_model", siglip], "vision_tower is siglip"),
        "other patches": (["--base_value_model", finer], "num_image_tokens is 16"),
        "no language model": (["--base_language_model", bases[3]], "model_type 'clip'"),
        "no tower": (["--base_value_model", bases[1]], "model_type 'qwen'"),
        "hub, offline": (["--base_language_model", "Qwen/Qwen-7B-Chat"], "'Qwen/Qwen-7B-Chat' is no local folder"),
        "too many placeholders": (["--prompt", "<|extra_0|> <|extra_0|>"], "2 placeholders"),
        "a folder and two placeholders": (
            ["--image_path", folder, "--prompt", "<|extra_0|> <|extra_0|>"],
            "asked about one by one: --prompt has 2 placeholders <|extra_0|>; write one, or none",
        ),
        "length": (["--max_new_tokens", "0"], "--max_new_tokens 0"),
        "temperature": (["--temperature", "0"], "--temperature 0.0"),
        "no number": (["--temperature", "hot"], "--temperature"),
        "top_p": (["--top_p", "1.5"], "--top_p 1.5"),
        "top_k": (["--top_k", "-1"], "--top_k -1"),
        "penalty": (["--repetition_penalty", "nan"], "--repetition_penalty nan"),
        "seed": (["--seed", "-1"], "--seed -1"),
        "dtype": (["--dtype", "int8"], "--dtype 'int8'"),
        "device": (["--device", "abacus"], "--device 'abacus'"),
        "contradiction": (["--greedy", "--do_sample"], "not allowed with"),
        "misspelt": (["--promt", "x"], "--promt"),
        "a folder, streamed": (["--image_path", str(ROOT / "test_img"), "--stream"], "leave --stream out"),
    }


def test_a_greedy_answer_warns_of_sampling_settings_only_where_they_were_given(answer, pictures):
    flags = ["--image_path", pictures["red"], "--prompt", "What<|extra_0|>", "--greedy"]
    plain = answer(*flags)
    assert "top_p" not in answer.err
    assert answer(*flags, "--top_p", "0.3", "--temperature", "2") == plain
    assert "--temperature, --top_p has no effect" in answer.err


def test_a_mistake_is_one_line_and_no_answer(answer, bases, weights, pictures, qwen_tiktoken, tmp_path):
    for case, (flags, message) in mistakes(tmp_path, qwen_tiktoken, bases, weights).items():
        right = ["--image_path", pictures["red"], "--prompt", "What<|extra_0|>"]
        assert answer(*right, *flags, status=2) == "", case
        said = one_line_error(answer.err, "test.py")
        assert message in said, case
        assert len(said) < 700, case
    assert answer("--image_path", pictures["red"].parent, status=2) == ""
    assert "--prompt" in one_line_error(answer.err, "test.py")


def test_a_mistake_ends_the_process_with_2(tmp_path):
    done = start(sys.executable, ROOT / "test.py", "--prompt", "What", "--image_path", "nowhere.jpg", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "nowhere.jpg" in one_line_error(done.stderr, "test.py")
