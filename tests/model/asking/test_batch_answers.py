"""test.py --batch: the answers of each question alone, in order, after any stop, and what becomes of bad lines."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_run import ROOT, environment, load_test_py, make_bases, make_pictures, one_line_error

from model import LoraSettings, VisionLanguageModel
from model.asking.answer_file import AnswerFile
from model.asking.batch_answers import Outcome
from model.asking.question_file import read_questions

ask = load_test_py()


@pytest.fixture(scope="module")
def bases(tmp_path_factory, qwen_tiktoken) -> list[str]:
    return make_bases(tmp_path_factory.mktemp("bases"), qwen_tiktoken)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> dict[str, Path]:
    return make_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory, bases) -> Path:
    model = VisionLanguageModel.from_pretrained(bases[1], bases[3], device="cpu")
    model.add_lora(LoraSettings(rank=4, alpha=8, dropout=0.0))
    generator = torch.Generator().manual_seed(0)
    folder = tmp_path_factory.mktemp("weights")
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.normal_(0, 0.4, generator=generator)
    model.save_checkpoint(folder)
    return folder


@pytest.fixture
def call(weights, capsys):
    """Call test.py in this process; gives stdout and stderr, and fails unless the exit status is the one said."""

    def run(*flags: object, status: int = 0) -> tuple[str, str]:
        capsys.readouterr()
        assert ask.main(["--model_weights", str(weights), "--device", "cpu", *map(str, flags)]) == status
        return capsys.readouterr()

    return run


def write(path: Path, lines: list[object]) -> Path:
    text = "".join((line if isinstance(line, str) else json.dumps(line, ensure_ascii=False)) + "\n" for line in lines)
    path.write_text(text, encoding="utf-8")
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def questions(pictures: dict[str, Path]) -> list[dict]:
    """Of several lengths, with no, one and two images, some of them more than once."""
    red, blue = str(pictures["red"]), str(pictures["blue"])
    return [
        {"id": "a", "image": red, "prompt": "What is this? " * 9},
        {"id": "b", "image": None, "prompt": "你好"},
        {"id": 3, "image": [blue, red], "prompt": "Is <|extra_0|> like <|extra_0|>?"},
        {"id": "d", "prompt": "Hello"},
        {"id": "e", "image": [red], "prompt": "Colour?<|extra_0|>", "note": "other keys are passed over"},
        {"id": "f", "image": blue, "prompt": "Colour?<|extra_0|>"},
    ]


def alone(call, question: dict, *flags: object) -> str:
    images = question.get("image") or []
    paths = ["--image_path", *([images] if isinstance(images, str) else images)] if images else []
    return call(*paths, "--prompt", question["prompt"], *flags)[0].removesuffix("\n")


@pytest.mark.parametrize("flags", [["--greedy"], ["--do_sample", "--seed", 3, "--repetition_penalty", 1.3]])
def test_answers_are_those_of_each_question_alone_in_order(call, pictures, tmp_path, flags):
    asked = questions(pictures)
    file = write(tmp_path / "q.jsonl", ["", *asked])
    expected = [{"id": question["id"], "answer": alone(call, question, *flags)} for question in asked]
    for size in (1, 4):
        out, err = call("--batch", file, "--output", tmp_path / f"{size}.jsonl", "--batch_size", size, *flags)
        assert out == ""
        assert "6/6" in err
        assert read(tmp_path / f"{size}.jsonl") == expected
    assert len({row["answer"] for row in expected}) > 2


def test_the_tower_sees_an_image_once_in_a_batch(call, pictures, tmp_path, monkeypatch):
    seen: list[int] = []
    forward = VisionLanguageModel.encode_images
    count = lambda self, pixels: seen.append(len(pixels)) or forward(self, pixels)  # noqa: E731
    monkeypatch.setattr(VisionLanguageModel, "encode_images", count)
    file = write(tmp_path / "q.jsonl", questions(pictures))
    call("--batch", file, "--output", tmp_path / "a.jsonl", "--greedy")
    assert seen == [2]


def test_bad_questions_get_their_line_and_the_others_an_answer(call, pictures, tmp_path):
    (tmp_path / "broken.png").write_text("no picture")
    shutil.copy(pictures["red"], tmp_path / "beside.png")
    good = {"id": 4, "image": "beside.png", "prompt": "What?"}  # counts from the file's own folder
    asked = [
        {"id": "gone", "image": "nowhere.png", "prompt": "What?"},
        {"id": "broken", "image": "broken.png", "prompt": "What?"},
        {"id": "two", "image": "beside.png", "prompt": "<|extra_0|><|extra_0|>?"},
        good,
        {"id": "nul", "image": "a\0b.png", "prompt": "What?"},
        {"id": "long", "image": "x" * 5000, "prompt": "What?"},
    ]
    file = write(tmp_path / "q.jsonl", asked)
    err = call("--batch", file, "--output", tmp_path / "a.jsonl", "--greedy", status=2)[1]
    lines = read(tmp_path / "a.jsonl")
    assert [line["id"] for line in lines] == ["gone", "broken", "two", 4, "nul", "long"]
    answer = alone(call, {**good, "image": str(tmp_path / "beside.png")}, "--greedy")
    assert [line.get("answer") for line in lines] == [None] * 3 + [answer] + [None] * 2
    for line, words in zip(lines, ("nowhere.png", "broken.png", "2 placeholders", "", "", ""), strict=True):
        assert words in line.get("error", "")
        assert "\n" not in line.get("error", "")
    assert err.count("test.py: ") == 6
    assert "5 of 6 questions have no answer" in err
    # Asked again, nothing is answered twice, and the exit status is the same.
    before = (tmp_path / "a.jsonl").read_bytes()
    assert "5 of 6" in call("--batch", file, "--output", tmp_path / "a.jsonl", "--greedy", status=2)[1]
    assert (tmp_path / "a.jsonl").read_bytes() == before


def test_a_question_that_is_cut_is_named(call, bases, tmp_path):
    narrow = tmp_path / "qwen"
    shutil.copytree(bases[1], narrow)
    settings = json.loads((narrow / "generation_config.json").read_text())
    (narrow / "generation_config.json").write_text(json.dumps({**settings, "max_window_size": 40}))
    asked = [
        {"id": "short", "prompt": "x"},
        {"id": "lo\nng", "prompt": "word " * 99},
        {"id": 3, "prompt": "word " * 98},
    ]
    file = write(tmp_path / "q.jsonl", asked)
    err = call("--batch", file, "--output", tmp_path / "a.jsonl", "--base_language_model", narrow)[1]
    assert "question lo\\nng: the question is longer than the window of 40 tokens: the first " in err
    assert "question 3: the question is longer than the window of 40 tokens: the first " in err
    assert err.count("longer than the window") == 2


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"do_sample": True, "temperature": -1.0}, "temperature"),
        ({"repetition_penalty": -1.0}, "penalty"),
        ({"do_sample": True, "top_k": -3}, "top_k"),
        ({"num_beams": 2, "num_return_sequences": 2}, "num_return_sequences is 2"),
    ],
)
def test_settings_under_which_nothing_can_be_answered_end_the_run(call, bases, tmp_path, settings, words):
    base = tmp_path / "qwen"
    shutil.copytree(bases[1], base)
    before = json.loads((base / "generation_config.json").read_text())
    (base / "generation_config.json").write_text(json.dumps({**before, **settings}))
    file, output = write(tmp_path / "q.jsonl", [{"id": 1, "prompt": "x"}, {"id": 2, "prompt": "y"}]), tmp_path / "a"
    flags = ["--batch", file, "--output", output, "--base_language_model", base]
    said = one_line_error(call(*flags, status=2)[1], "test.py")
    assert "the generation settings can't be used: " in said
    assert words in said
    assert f"correct the generation_config.json of {base}" in said
    assert output.read_bytes() == b"", "no question has an error for good"
    (base / "generation_config.json").write_text(json.dumps(before))
    call(*flags)
    assert len(read(output)) == 2


def test_a_prompt_without_room_is_no_matter_of_the_settings(call, bases, tmp_path):
    base = tmp_path / "qwen"
    shutil.copytree(bases[1], base)
    before = json.loads((base / "generation_config.json").read_text())
    del before["max_new_tokens"]
    (base / "generation_config.json").write_text(json.dumps({**before, "max_length": 60}))
    asked = [{"id": 1, "prompt": "x"}, {"id": 2, "prompt": "word " * 99}]
    file = write(tmp_path / "q.jsonl", asked)
    call("--batch", file, "--output", tmp_path / "a", "--base_language_model", base, status=2)
    answered, failed = read(tmp_path / "a")
    assert "answer" in answered
    assert "leaves no room for an answer" in failed["error"]


@pytest.mark.parametrize("cut", [0, 1, 30, 31, 200])
def test_a_run_goes_on_behind_its_last_whole_line(call, pictures, tmp_path, cut, monkeypatch):
    file = write(tmp_path / "q.jsonl", questions(pictures))
    output = tmp_path / "a.jsonl"
    call("--batch", file, "--output", output, "--greedy")
    whole = output.read_bytes()
    left = whole[: len(whole) - cut]
    output.write_bytes(left)
    added: list[Outcome] = []
    add = AnswerFile.add
    monkeypatch.setattr(AnswerFile, "add", lambda self, outcome: added.append(outcome) or add(self, outcome))
    call("--batch", file, "--output", output, "--greedy", "--batch_size", 2)
    assert output.read_bytes() == whole
    assert len(added) == 6 - left.count(b"\n")


def test_a_killed_run_goes_on(call, weights, pictures, tmp_path):
    """Killed for good, in a process of its own, as soon as something is written."""
    asked = [{"id": i, "image": str(pictures["red"]), "prompt": f"Question {i}"} for i in range(40)]
    file, output = write(tmp_path / "q.jsonl", asked), tmp_path / "a.jsonl"
    flags = ["--batch", str(file), "--output", str(output), "--batch_size", "2", "--greedy"]
    command = [sys.executable, str(ROOT / "test.py"), "--model_weights", str(weights), "--device", "cpu", *flags]
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.DEVNULL)
    while process.poll() is None and not (output.exists() and output.stat().st_size):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    call(*flags)
    assert [line["id"] for line in read(output)] == list(range(40))
    call(*flags[:2], "--output", tmp_path / "other.jsonl", "--greedy")
    assert read(tmp_path / "other.jsonl") == read(output)


def test_an_output_of_something_else_is_refused_and_left_alone(call, pictures, tmp_path):
    asked = questions(pictures)
    file, output = write(tmp_path / "q.jsonl", asked), tmp_path / "a.jsonl"
    call("--batch", file, "--output", output, "--greedy")
    before = output.read_bytes()
    other = write(tmp_path / "other.jsonl", asked[:-1])
    for flags, words in (
        (["--batch", other, "--output", output, "--greedy"], "was made with other questions"),
        (["--batch", file, "--output", output], "was made with other settings"),
        (["--batch", file, "--output", output, "--greedy", "--system", "x"], "was made with other settings"),
        (["--batch", file, "--output", output, "--greedy", "--dtype", "bf16"], "was made with other settings"),
        (["--batch", file, "--output", file, "--greedy"], "no q.jsonl.made_with.json says what"),
    ):
        assert words in one_line_error(call(*flags, status=2)[1], "test.py")
    assert output.read_bytes() == before
    note = tmp_path / "a.jsonl.made_with.json"
    note.write_text(note.read_text().replace('"checkpoint": "', '"checkpoint": "0'))
    flags = ["--batch", file, "--output", output, "--greedy"]
    assert "was made with other weights" in one_line_error(call(*flags, status=2)[1], "test.py")


def test_mistakes_of_the_output_are_found_before_the_model_is_loaded(call, pictures, tmp_path, monkeypatch):
    asked = questions(pictures)
    file, output = write(tmp_path / "q.jsonl", asked), tmp_path / "a.jsonl"
    flags = ["--batch", file, "--output", output, "--greedy", "--max_new_tokens", 5]
    call(*flags)
    before = output.read_bytes()
    monkeypatch.setattr(ask, "load_assistant", lambda args: pytest.fail("the model was loaded"))
    assert "6 of 6 answered already" in call(*flags)[1], "a finished output"
    other = write(tmp_path / "other.jsonl", asked[:-1])
    for changes, words in (
        (["--batch", other], "was made with other questions"),
        (["--do_sample"], "was made with other settings"),
        (["--max_new_tokens", 6], "was made with other settings"),
        (["--seed", 1], "was made with other settings"),
        (["--dtype", "bf16"], "was made with other settings"),
        (["--output", file], "no q.jsonl.made_with.json says what"),
        (["--output", tmp_path / "gone" / "a"], "gone"),
        (["--model_weights", tmp_path / "nowhere"], "nowhere"),
        (["--device", "cpo"], "no device has such a name"),
    ):
        words_of = [word for word in flags if word != "--greedy"] if changes == ["--do_sample"] else flags
        assert words in one_line_error(call(*words_of, *changes, status=2)[1], "test.py")
    with AnswerFile(tmp_path / "busy", ["a"], {}):
        said = one_line_error(call(*flags, "--output", tmp_path / "busy", status=2)[1], "test.py")
    assert "another run is writing" in said
    output.write_bytes(before[:-1])
    with pytest.raises(pytest.fail.Exception, match="was loaded"):
        call(*flags)
    assert output.read_bytes() == before[:-1], "nothing is cut off before the model is there"


def test_a_finished_output_is_compared_in_full_where_the_command_is_another(call, bases, tmp_path):
    file, output = write(tmp_path / "q.jsonl", [{"id": 1, "prompt": "x"}]), tmp_path / "a.jsonl"
    flags = ["--batch", file, "--output", output, "--greedy", "--max_new_tokens"]
    call(*flags, 5)
    moved = tmp_path / "moved"
    shutil.copytree(bases[1], moved)
    call(*flags, 5, "--base_language_model", moved)
    settings = json.loads((moved / "generation_config.json").read_text())
    (moved / "generation_config.json").write_text(json.dumps({**settings, "repetition_penalty": 1.5}))
    said = call(*flags, 5, "--base_language_model", moved, status=2)[1]
    assert "was made with other settings" in one_line_error(said, "test.py")


def test_a_picture_that_was_replaced_is_noticed(call, pictures, tmp_path):
    shutil.copy(pictures["red"], tmp_path / "one.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "one.png")
    asked = [{"id": i, "image": "link.png", "prompt": "Colour?"} for i in range(2)]
    file, output = write(tmp_path / "q.jsonl", asked), tmp_path / "a.jsonl"
    flags = ["--batch", file, "--output", output, "--greedy"]
    call(*flags)
    output.write_bytes(output.read_bytes().split(b"\n")[0] + b"\n")
    call(*flags)
    assert len(read(output)) == 2
    shutil.copy(pictures["blue"], tmp_path / "one.png")
    assert "was made with other pictures" in one_line_error(call(*flags, status=2)[1], "test.py")


def test_lines_of_others_and_a_second_writer_are_refused(tmp_path):
    output = tmp_path / "a.jsonl"
    with AnswerFile(output, ["a", "\ud800"], {"x": 1}) as answers:
        answers.go_on({"x": 1})
        answers.add(Outcome("one\n"))
        answers.add(Outcome(None, "why"))
        with pytest.raises(ValueError, match="another run is writing"):
            AnswerFile(output, ["a", "\ud800"], {"x": 1})
    assert read(output) == [{"id": "a", "answer": "one\n"}, {"id": "\ud800", "error": "why"}]
    with AnswerFile(output, ["a", "\ud800"], {"x": 1}) as answers:
        assert (answers.num_done, len(answers.failed)) == (2, 1)
    for lines in (["b", "\ud800"], ["a"]):
        with pytest.raises(ValueError, match="is not the answer to that question"):
            AnswerFile(output, lines, {"x": 1})
    output.write_text("")
    with AnswerFile(output, ["b"], {"x": 2}) as answers:
        assert answers.num_done == 0


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP])
def test_a_file_system_without_locks_is_written_to_with_a_warning(tmp_path, monkeypatch, caplog, number):
    def no_locks(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("model.asking.answer_file.fcntl.flock", no_locks)
    with AnswerFile(tmp_path / "a.jsonl", ["a"], {"x": 1}) as answers:
        answers.add(Outcome("one"))
    assert read(tmp_path / "a.jsonl") == [{"id": "a", "answer": "one"}]
    (message,) = caplog.messages
    assert "has no locks" in message
    assert os.strerror(number) in message


BAD_LINES = {
    "not JSON": ("{", "not JSON"),
    "a list": ("[1]", "got [1]"),
    "no id": ('{"prompt": "x"}', "the id is absent"),
    "an id that is a list": ('{"id": [1], "prompt": "x"}', "the id is [1]"),
    "an id that is true": ('{"id": true, "prompt": "x"}', "the id is true"),
    "no prompt": ('{"id": 1}', "the prompt is absent"),
    "an empty prompt": ('{"id": 1, "prompt": " "}', "the prompt is"),
    "a number for an image": ('{"id": 1, "prompt": "x", "image": 7}', "the image is 7"),
    "an image without a name": ('{"id": 1, "prompt": "x", "image": [""]}', "the image is"),
    "an id twice": ('{"id": "one", "prompt": "x"}', "that of line 1 too"),
    "deep": ("[" * 100_000, "JSON"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_line_that_is_no_question_stops_before_any_answer(call, tmp_path, case):
    line, words = BAD_LINES[case]
    file = write(tmp_path / "q.jsonl", [{"id": "one", "prompt": "x"}, "", line])
    said = one_line_error(call("--batch", file, "--output", tmp_path / "a.jsonl", status=2)[1], "test.py")
    assert f"{file}, line 3: " in said
    assert words in said
    assert len(said) < 400 + len(str(file))
    assert not (tmp_path / "a.jsonl").exists()


def test_other_encodings_of_a_file(tmp_path):
    file = tmp_path / "q.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"id": 1, "prompt": "x"}\r\n\r\n{"id": "1", "prompt": "y"}')
    assert [(question.id, question.prompt) for question in read_questions(file)] == [(1, "x"), ("1", "y")]
    file.write_bytes(b'{"id": 1, "prompt": "\xff"}')
    with pytest.raises(ValueError, match=r"line 1: not UTF-8 \(byte 22\)"):
        read_questions(file)
    file.write_bytes(b"\n")
    with pytest.raises(ValueError, match="there is no question in it"):
        read_questions(file)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--batch", "q.jsonl"], "--output FILE go together"),
        (["--output", "a.jsonl"], "--output FILE go together"),
        (["--batch", "q.jsonl", "--output", "a.jsonl", "--prompt", "x"], "leave out --prompt"),
        (["--batch", "q.jsonl", "--output", "a.jsonl", "--image_path", "x"], "leave out --prompt"),
        (["--batch", "nowhere.jsonl", "--output", "a.jsonl"], "nowhere.jsonl"),
        (["--prompt", "x", "--batch_size", "0"], "--batch_size 0: must be at least 1"),
    ],
)
def test_flags_that_do_not_go_together(call, tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "q.jsonl", [{"id": 1, "prompt": "x"}])
    assert words in one_line_error(call(*flags, status=2)[1], "test.py")


def test_a_folder_that_is_not_there_and_a_full_disk(call, tmp_path, monkeypatch):
    file = write(tmp_path / "q.jsonl", [{"id": 1, "prompt": "x"}])
    assert "gone" in one_line_error(call("--batch", file, "--output", tmp_path / "gone/a", status=2)[1], "test.py")

    def full(self, outcome):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(AnswerFile, "add", full)
    assert "No space left" in call("--batch", file, "--output", tmp_path / "a", "--greedy", status=2)[1]
