"""test.py --batch: the answers of each question alone, in order, after any stop, and what becomes of bad lines."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import ROOT, environment, load_test_py, one_line_error, with_generation_config

from dataprocess.file_lock import hold
from model import VisionLanguageModel
from model.asking import batch_answers
from model.asking.answer_file import AnswerFile
from model.asking.batch_answers import answer_all
from model.asking.question_file import Question, read_questions

ask = load_test_py()


@pytest.fixture
def call(trained, loaded_once, capsys):
    """Call test.py in this process; return stdout and stderr, and fail unless the exit status is the one said."""

    def run(*flags: object, status: int = 0) -> tuple[str, str]:
        capsys.readouterr()
        assert ask.main(["--model_weights", str(trained), "--device", "cpu", *map(str, flags)]) == status
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


# ---- The answers


@pytest.mark.parametrize(
    "flags", [["--greedy"], ["--do_sample", "--seed", 3, "--repetition_penalty", 1.3]], ids=["greedy", "sampled"]
)
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


class Counting:
    """Stands for the assistant: answers with how many batches there were, and takes no question about `bad`."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def features(self, images):
        return None

    def prompt_ids(self, prompt: str, name: str) -> list[int]:
        return [len(prompt)] * len(prompt)

    def answer_rows(self, prompts, features, seed: int) -> list[str]:
        self.batches.append([len(prompt) for prompt in prompts])
        return [str(len(self.batches))] * len(prompts)


def test_an_answer_is_given_as_soon_as_all_before_it_are_there():
    assistant = Counting()
    asked = [Question(number, (), "x" * length) for number, length in enumerate((2, 9, 1, 3, 4, 5, 6, 7, 1))]
    lines = answer_all(assistant, asked, 2, 0)
    assert next(lines) == {"id": 0, "answer": "1"}
    assert assistant.batches == [[1, 2]], "one batch only, of prompts of similar length"
    assert [line["answer"] for line in lines] == ["4", "1", "2", "2", "3", "3", "4", "5"]
    assert assistant.batches[4] == [1]


def test_bad_questions_get_their_line_and_the_others_an_answer(call, pictures, tmp_path):
    (tmp_path / "broken.png").write_text("no picture")
    shutil.copy(pictures["red"], tmp_path / "near.png")
    good = {"id": 4, "image": "near.png", "prompt": "What?"}  # counts from the file's own folder
    asked = [
        {"id": "missing", "image": "nowhere.png", "prompt": "What?"},
        {"id": "broken", "image": "broken.png", "prompt": "What?"},
        {"id": "two", "image": "near.png", "prompt": "<|extra_0|><|extra_0|>?"},
        good,
        {"id": "nul", "image": "a\0b.png", "prompt": "What?"},
        {"id": "long", "image": "x" * 5000, "prompt": "What?"},
    ]
    file = write(tmp_path / "q.jsonl", asked)
    flags = ["--batch", file, "--output", tmp_path / "a.jsonl", "--greedy"]
    err = call(*flags, status=2)[1]
    lines = read(tmp_path / "a.jsonl")
    assert [line["id"] for line in lines] == [question["id"] for question in asked]
    answer = alone(call, {**good, "image": str(tmp_path / "near.png")}, "--greedy")
    assert [line.get("answer") for line in lines] == [None] * 3 + [answer] + [None] * 2
    for line, words in zip(lines, ("nowhere.png", "broken.png", "2 placeholders", "", "", ""), strict=True):
        assert words in line.get("error", "")
        assert "\n" not in line.get("error", "")
    assert err.count("test.py: ") == 6
    assert "5 of 6 questions" in err
    # Asked again, nothing is answered twice, and the exit status is the same.
    before = (tmp_path / "a.jsonl").read_bytes()
    assert "5 of 6" in call(*flags, status=2)[1]
    assert (tmp_path / "a.jsonl").read_bytes() == before


def test_a_question_that_is_cut_is_named(call, base_flags, tmp_path):
    narrow = with_generation_config(base_flags[1], tmp_path / "qwen", max_window_size=40)
    asked = [{"id": "short", "prompt": "x"}, {"id": "lo\nng", "prompt": "word " * 99}, {"id": 3, "prompt": "w " * 98}]
    file = write(tmp_path / "q.jsonl", asked)
    err = call("--batch", file, "--output", tmp_path / "a.jsonl", "--base_language_model", narrow)[1]
    assert re.findall(r"question (\S+): .* 40 tokens", err) == ["lo\\nng", "3"]


# ---- Settings under which nothing, or not everything, can be answered


def test_settings_under_which_nothing_can_be_answered_end_the_run(call, base_flags, tmp_path):
    base = with_generation_config(base_flags[1], tmp_path / "qwen", repetition_penalty=-1.0)
    file, output = write(tmp_path / "q.jsonl", [{"id": 1, "prompt": "x"}, {"id": 2, "prompt": "y"}]), tmp_path / "a"
    flags = ["--batch", file, "--output", output]
    said = one_line_error(call(*flags, "--base_language_model", base, status=2)[1], "test.py")
    assert "penalty" in said
    assert str(base) in said
    assert not output.exists(), "no question has an error for good"
    call(*flags)
    assert len(read(output)) == 2


# ---- Stopped and resumed


def test_a_run_resumes_after_its_last_whole_line_and_asks_what_has_none(call, pictures, tmp_path, monkeypatch):
    file, output = write(tmp_path / "q.jsonl", questions(pictures)), tmp_path / "a.jsonl"
    flags = ["--batch", file, "--output", output, "--greedy", "--batch_size"]
    call(*flags, 8)
    whole = output.read_bytes()
    added: list[dict] = []
    add = AnswerFile.add
    monkeypatch.setattr(AnswerFile, "add", lambda self, line: added.append(line) or add(self, line))
    for cut in (1, 31, 200):
        output.write_bytes(whole[:-cut])
        added.clear()
        call(*flags, 2)
        assert output.read_bytes() == whole
        assert len(added) == 6 - whole[:-cut].count(b"\n")
    first, second, *others = whole.splitlines(keepends=True)
    output.write_bytes(b"".join([first, *others]))  # as a person deletes a line
    call(*flags, 2)
    assert output.read_bytes() == b"".join([first, *others, second])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "a.jsonl.made_with.json", "q.jsonl"]


def test_an_answer_without_room_names_the_output(tmp_path):
    """As on a full disk: files may not grow beyond 100 bytes, and the system's error names none."""
    answers, limits = AnswerFile(tmp_path / "a.jsonl", {"a": ""}, {}), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        answers.begin({})
        with pytest.raises(OSError, match=r"a\.jsonl"):
            answers.add({"id": "a", "answer": "long" * 50})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


KILLED_AFTER_5 = """
import os, signal, sys
from tiny_run import load_test_py
from model.asking.answer_file import AnswerFile
add = AnswerFile.add
def die_after_5(self, line):
    add(self, line)
    if len(self.lines) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
AnswerFile.add = die_after_5
load_test_py().main(sys.argv[1:])
"""


def test_a_killed_run_loses_no_answer_that_was_given(call, trained, pictures, tmp_path):
    """Killed for good, in a process of its own, at the fifth answer."""
    asked = [{"id": i, "image": str(pictures["red"]), "prompt": f"Question {i}"} for i in range(12)]
    file, output = write(tmp_path / "q.jsonl", asked), tmp_path / "a.jsonl"
    flags = ["--batch", str(file), "--output", str(output), "--greedy"]
    command = [sys.executable, "-c", KILLED_AFTER_5, "--model_weights", str(trained), "--device", "cpu", *flags]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(command, env=environment(PYTHONPATH=path), capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [line["id"] for line in read(output)] == list(range(5))
    assert "5 of 12" in call(*flags)[1]
    call(*flags[:2], "--output", tmp_path / "other.jsonl", "--greedy")
    assert read(tmp_path / "other.jsonl") == read(output)


# ---- Outputs of something else


@pytest.fixture(scope="module")
def made(trained, pictures, tmp_path_factory) -> Path:
    """A folder with questions and all their answers; not to be written to."""
    folder = tmp_path_factory.mktemp("made")
    file = write(folder / "q.jsonl", questions(pictures))
    write(folder / "other.jsonl", questions(pictures)[:-1])
    write(folder / "bad.jsonl", [*questions(pictures), "{"])
    (folder / "link").symlink_to("nowhere")
    flags = ["--batch", str(file), "--output", str(folder / "a.jsonl"), "--greedy", "--max_new_tokens", "5"]
    assert ask.main(["--model_weights", str(trained), "--device", "cpu", *flags]) == 0
    return folder


@pytest.fixture
def again(call, made, tmp_path, monkeypatch):
    """Answer the same questions again, in a copy of the folder, with some flags changed; nothing may be loaded."""
    folder = shutil.copytree(made, tmp_path / "copy", symlinks=True)
    monkeypatch.setattr(batch_answers, "load_assistant", lambda args: pytest.fail("the model was loaded"))

    def run(*flags: object, status: int = 2) -> str:
        given = [str(flag).format(folder) for flag in flags]
        same = ["--batch", folder / "q.jsonl", "--output", folder / "a.jsonl", "--max_new_tokens", 5]
        greedy = [] if "--do_sample" in given else ["--greedy"]
        err = call(*same, *greedy, *given, status=status)[1]
        assert (folder / "a.jsonl").read_bytes() == (made / "a.jsonl").read_bytes(), "nothing is changed"
        return err if status == 0 else one_line_error(err, "test.py")

    return run


def test_a_finished_output_needs_no_model(again):
    assert "6 of 6" in again(status=0)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--do_sample"], "settings"),
        (["--output", "{}/q.jsonl"], "q.jsonl.made_with.json"),
        (["--output", "{}/nowhere/a"], "nowhere"),
        (["--output", "{}/" + "x" * 300], "File name too long"),
        (["--output", "{}/link"], "regular file"),
        (["--batch", "{}/other.jsonl"], "questions"),
        (["--batch", "{}/bad.jsonl"], "line 7"),
    ],
    ids=lambda value: "".join(map(str, value))[:30] if isinstance(value, list) else None,
)
def test_mistakes_of_the_output_are_found_before_the_model_is_loaded(again, flags, words):
    assert words in again(*flags)


def test_another_checkpoint_is_refused(again, trained, tmp_path):
    assert "checkpoint" in again("--model_weights", trained.parent / "checkpoint-9")
    shutil.copytree(trained, tmp_path / "moved")
    again("--model_weights", tmp_path / "moved", status=0)


def test_other_base_models_and_settings_of_theirs_are_refused(call, base_flags, tmp_path):
    file, output = write(tmp_path / "q.jsonl", [{"id": 1, "prompt": "x"}]), tmp_path / "a.jsonl"
    flags = ["--batch", file, "--output", output, "--greedy"]
    call(*flags)
    moved = with_generation_config(base_flags[1], tmp_path / "moved")
    call(*flags, "--base_language_model", moved)
    other = with_generation_config(base_flags[1], tmp_path / "other", repetition_penalty=1.5)
    said = call(*flags, "--base_language_model", other, status=2)[1]
    assert "generation settings" in one_line_error(said, "test.py")
    note = tmp_path / "a.jsonl.made_with.json"
    note.write_text(note.read_text().replace('_fingerprint": "', '_fingerprint": "0'))
    said = call(*flags, "--base_language_model", base_flags[1], status=2)[1]
    assert "base models" in one_line_error(said, "test.py")


def test_a_picture_that_was_replaced_is_noticed(call, pictures, tmp_path):
    """By one of the same size, behind a link: only the time of change tells."""
    from PIL import Image

    picture = tmp_path / "one.bmp"
    Image.open(pictures["red"]).save(picture)
    (tmp_path / "link.bmp").symlink_to(picture)
    file = write(tmp_path / "q.jsonl", [{"id": 1, "image": "link.bmp", "prompt": "Colour?"}])
    flags = ["--batch", file, "--output", tmp_path / "a.jsonl", "--greedy"]
    call(*flags)
    before = picture.stat()
    Image.open(pictures["blue"]).save(picture)
    os.utime(picture, ns=(before.st_atime_ns, before.st_mtime_ns + 1_000_000_000))
    assert picture.stat().st_size == before.st_size
    assert "pictures" in one_line_error(call(*flags, status=2)[1], "test.py")


def test_pictures_that_are_fixed_later_are_asked_about_by_the_same_command(call, pictures, tmp_path, monkeypatch):
    """One was missing, next to the file of questions; one was damaged. What has an answer is not asked again."""
    (tmp_path / "broken.png").write_text("no picture")
    asked = [
        {"id": "late", "image": "late.png", "prompt": "Colour?"},
        {"id": "good", "image": str(pictures["red"]), "prompt": "Colour?"},
        {"id": "broken", "image": "broken.png", "prompt": "Colour?"},
        {"id": "never", "image": "never.png", "prompt": "Colour?"},
    ]
    file, output = write(tmp_path / "q.jsonl", asked), tmp_path / "a.jsonl"
    flags = ["--batch", file, "--output", output, "--greedy"]
    call(*flags, status=2)
    before = read(output)
    assert ["answer" in line for line in before] == [False, True, False, False]
    note = tmp_path / "a.jsonl.made_with.json"
    kept = output.read_bytes(), note.read_bytes()
    shutil.copy(pictures["blue"], tmp_path / "late.png")
    shutil.copy(pictures["green"], tmp_path / "broken.png")
    added: list[dict] = []
    add = AnswerFile.add
    monkeypatch.setattr(AnswerFile, "add", lambda self, line: added.append(line) or add(self, line))
    assert "never.png" in call(*flags, status=2)[1]
    assert [line["id"] for line in added] == ["late", "broken"]
    assert read(output) == [before[1], before[3], *added]
    call("--batch", file, "--output", tmp_path / "fresh.jsonl", "--greedy", status=2)
    by_id = {line["id"]: line for line in read(tmp_path / "fresh.jsonl")}
    assert by_id == {line["id"]: line for line in read(output)}
    # What was answered is never mixed with answers about other pictures.
    shutil.copy(pictures["red"], tmp_path / "late.png")
    assert "pictures" in one_line_error(call(*flags, status=2)[1], "test.py")
    # A kill after the lines of the errors were dropped, and before the note was replaced, is resumed likewise.
    output.write_bytes(b"".join(line for line in kept[0].splitlines(keepends=True) if b'"good"' in line))
    note.write_bytes(kept[1])
    added.clear()
    call(*flags, status=2)
    assert [line["id"] for line in added] == ["late", "broken", "never"]


def test_a_second_writer_is_refused(again, tmp_path):
    with hold(tmp_path / "copy" / "a.jsonl"):
        assert f"process {os.getpid()}" in again()


def test_lines_that_are_no_answers_to_the_questions_are_refused(tmp_path):
    output, ids = tmp_path / "a.jsonl", {"a": "0", "\ud800": "0"}
    answers = AnswerFile(output, ids, {"x": 1})
    answers.begin({"y": 2})
    answers.add({"id": "a", "answer": "one\n"})
    answers.add({"id": "\ud800", "error": "why"})
    assert read(output) == [{"id": "a", "answer": "one\n"}, {"id": "\ud800", "error": "why"}]
    assert read(output) == list(AnswerFile(output, ids, {"x": 1}).lines.values())
    whole = output.read_bytes()
    again = whole.splitlines()[0]  # a second answer to one question
    for line in (again, b'{"id": "b", "answer": ""}', b"[]", b"x"):
        output.write_bytes(whole + line + b"\n")
        with pytest.raises(ValueError, match="line 3"):
            AnswerFile(output, ids, {"x": 1})
    output.write_bytes(whole.splitlines()[0] + b'\n{"id": "\\ud800"}\n')
    with pytest.raises(ValueError, match="line 2"):
        AnswerFile(output, ids, {"x": 1})
    output.write_bytes(b"")
    AnswerFile(output, {"b": "0"}, {"x": 2}).begin({})  # an empty output may become anything


# ---- The file of questions

BAD_LINES = {
    "not JSON": ("{", "JSON"),
    "no id": ('{"prompt": "x"}', "id is missing"),
    "an id that is true": ('{"id": true, "prompt": "x"}', "id is True"),
    "an id twice": ('{"id": "one", "prompt": "x"}', "line 1"),
    "a key twice": ('{"id": 1, "prompt": "x", "prompt": "y"}', "'prompt'"),
    "a long key twice": ('{"id": 1, "%s": 1, "%s": 2}' % (("k" * 99_999,) * 2), "kkk..."),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_line_that_is_no_question_is_refused_with_its_number(tmp_path, case):
    line, words = BAD_LINES[case]
    file = write(tmp_path / "q.jsonl", [{"id": "one", "prompt": "x"}, "", line])
    with pytest.raises(ValueError, match="line 3: ") as error:
        read_questions(file)
    assert words in str(error.value)
    assert str(file) in str(error.value)
    assert len(str(error.value)) < 400 + len(str(file))


def test_other_encodings_of_a_file(tmp_path):
    file = tmp_path / "q.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"id": 1, "prompt": "x"}\r\n\r\n{"id": "1", "prompt": "y"}')
    assert [(question.id, question.prompt) for question in read_questions(file)] == [(1, "x"), ("1", "y")]
    for content, words in ((b'{"id": 1, "prompt": "\xff"}', r"line 1: .*byte 22"), (b"\n", "no question")):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=words):
            read_questions(file)
