"""evaluate.py as people call it: scoring answers without a model, asking one, comparing, and what it refuses."""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import ROOT, environment, load_test_py, one_line_error, start

import evaluate
from dataprocess.file_lock import hold
from model.asking.question_file import Question
from model.evaluation.blind import blind_questions, number_kept


def write(path: Path, lines: list[dict]) -> Path:
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def files(tmp_path, pictures) -> dict[str, Path]:
    """Four questions of two kinds, and answers to them of two models."""
    red = str(pictures["red"])
    questions = [
        {"id": "a", "image": red, "prompt": "Is it <red>?", "answers": ["yes"] * 10, "kind": "yes/no"},
        {"id": "b", "image": red, "prompt": "Blue?", "answers": ["no"] * 7 + ["yes"] * 3, "kind": "yes/no"},
        {"id": "c", "image": None, "prompt": "How many?", "answers": ["2"] * 9 + ["3"], "kind": "number", "note": "n"},
        {"id": "d", "image": "lost.png", "prompt": "多少?", "answers": ["10"] * 10, "kind": "number"},
    ]
    first = [("a", "yes"), ("b", "Yes."), ("c", "two"), ("d", "")]
    second = [("d", "10"), ("c", "two"), ("b", "the no"), ("a", "no")]
    return {
        "questions": write(tmp_path / "q.jsonl", questions),
        "first": write(tmp_path / "first.jsonl", [{"id": index, "answer": answer} for index, answer in first]),
        "second": write(tmp_path / "second.jsonl", [{"id": index, "answer": answer} for index, answer in second]),
    }


@pytest.fixture
def call(capsys):
    """Call evaluate.py in this process; return stdout and stderr, and fail unless the exit status is the one said."""

    def run(*flags: object, status: int = 0) -> tuple[str, str]:
        capsys.readouterr()
        found = evaluate.main([str(flag) for flag in flags])
        out, err = capsys.readouterr()
        assert found == status, err
        return out, err

    return run


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


# ---- Without a model


def test_answers_are_scored_without_torch(files, tmp_path):
    """Neither torch nor transformers is loaded: somebody else's answers can be scored on any machine."""
    words = [
        "evaluate.py",
        "--questions",
        files["questions"],
        "--answers",
        files["first"],
        "--output",
        tmp_path / "out",
    ]
    code = "import runpy, sys\ntry: runpy.run_path('evaluate.py', run_name='__main__')\n"
    code += "except SystemExit as end: print(end.code, {'torch', 'transformers'} & set(sys.modules))"
    command = [sys.executable, "-c", code, *(str(word) for word in words[1:])]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.stdout.endswith("0 set()\n"), done.stderr
    assert "| vqa_accuracy | " in done.stdout


def test_results_answers_and_report(call, files, tmp_path):
    output = tmp_path / "out"
    flags = ("--questions", files["questions"], "--answers", files["first"], "--metrics", "vqa_accuracy", "pope")
    out, err = call(*flags, "--output", output)
    found = results(output)
    # a: 1; b: "yes" is three of ten, (7 × 1 + 3 × 2/3) / 10; c: 1; d: 0
    assert found["metrics"]["vqa_accuracy"] == pytest.approx((1 + 0.9 + 1 + 0) / 4)
    assert found["metrics"]["pope_recall"] == 1.0  # a alone has a reference that is yes or no
    assert found["counts"] == {"questions": 4, "without_answer": 0, "vqa_accuracy": 4, "pope": 1}
    assert found["by_kind"]["number"] == {"questions": 2, "vqa_accuracy": 0.5}
    low, high = found["intervals"]["vqa_accuracy"]
    assert 0 <= low < found["metrics"]["vqa_accuracy"] < high <= 1
    assert set(found) >= {"variants", "command", "versions", "fingerprints"}
    assert "| vqa_accuracy | 0.7250 | " in out
    assert "pope: over 1 question of 4" in err

    lines = {line["id"]: line for line in read(output / "answers.jsonl")}
    assert lines["c"]["note"] == "n"
    assert lines["b"]["scores"] == {"vqa_accuracy": 0.9}
    assert [line["answer"] for line in lines.values()] == ["yes", "Yes.", "two", ""]

    page = (output / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/jpeg;base64,") == 2
    assert "Is it &lt;red&gt;?" in page
    assert "Is it <red>?" not in page
    assert "missing: lost.png" in page
    assert "http://" not in page
    assert "https://" not in page
    assert "src='data:" in page
    assert page.index("多少") < page.index("Blue?") < page.index("How many?")  # worst first


def test_questions_without_a_score_are_last_and_no_control_character_is_in_the_report(call, tmp_path):
    questions = [
        {"id": 1, "prompt": "a colour\0?", "answers": ["red"], "kind": None},
        {"id": 2, "prompt": "is\x1b it?", "answers": ["yes"], "kind": "a|b\x1b[31m\u202e"},
        {"id": 3, "prompt": "is it not\u009b?", "answers": ["no"]},
        {"id": 4, "prompt": "lost?", "answers": ["yes"]},
    ]
    answers = [
        {"id": 1, "answer": "red"},
        {"id": 2, "answer": "yes"},
        {"id": 3, "answer": "\r"},
        {"id": 4, "error": "x"},
    ]
    flags = ["--questions", write(tmp_path / "q.jsonl", questions), "--answers", write(tmp_path / "a.jsonl", answers)]
    out, _ = call(*flags, "--metrics", "pope", "--output", tmp_path / "out")
    assert "| a\\|b\ufffd[31m\ufffd | 1 |" in out
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert not [character for character in page if ord(character) < 32 and character != "\n"]
    assert "\u009b" not in page
    assert "\u202e" not in page
    places = [page.index(text) for text in ("is it not\\u009b?", "lost?", "is\\u001b it?", "a colour\\u0000?")]
    assert places == sorted(places)
    assert "<i>none</i>" in page
    assert "None" not in page


def test_the_bound_of_the_report_leaves_every_kind_in(call, tmp_path):
    questions = [{"id": n, "prompt": "?", "answers": ["a"], "kind": "*" if n == 500 else "often"} for n in range(501)]
    answers = [{"id": n, "answer": "a" if n == 500 else "b"} for n in range(501)]
    flags = ["--questions", write(tmp_path / "q.jsonl", questions), "--answers", write(tmp_path / "a.jsonl", answers)]
    call(*flags, "--output", tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert page.count("class='card ") == 300
    assert page.count('data-kind="*"') == 1
    assert page.count('value="*"') + page.count("value='*'") == 1, "to choose all is no kind"


def test_two_evaluations_are_compared_question_by_question(call, files, tmp_path, monkeypatch):
    for name in ("first", "second"):
        flags = ("--questions", files["questions"], "--answers", files[name], "--output", tmp_path / name)
        call(*flags, "--metrics", "vqa_accuracy")
    out, _ = call("--compare", tmp_path / "first", tmp_path / "second" / "results.json", "--output", tmp_path / "c")
    assert "| vqa_accuracy | 0.7250 | 0.7500 | +0.0250 |" in out
    found = json.loads((tmp_path / "c" / "compare.json").read_text())
    assert (found["better"], found["worse"]) == ({"vqa_accuracy": 2}, {"vqa_accuracy": 1})
    changed = read(tmp_path / "c" / "changed.jsonl")
    assert [line["id"] for line in changed] == ["a", "b", "d"]  # what became worse first
    assert (changed[2]["first_answer"], changed[2]["second_answer"]) == ("", "10")
    out, _ = call("--compare", tmp_path / "first", tmp_path / "first")
    assert "| +0.0000 | +0.0000 to +0.0000 |" in out
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert call("--compare", tmp_path / "first", tmp_path / "first")[0] == "", "the first process reports"


def test_a_missing_answer_is_wrong_and_stays_missing_in_a_comparison(call, tmp_path):
    """POPE takes an empty answer for "yes", which is not what a question without an answer says."""
    questions = write(tmp_path / "q.jsonl", [{"id": n, "prompt": "?", "answers": ["yes"]} for n in range(2)])
    second = {"empty": {"id": 1, "answer": ""}, "missing": {"id": 1, "error": "no such file"}}
    for name, line in second.items():
        answers = write(tmp_path / f"{name}.jsonl", [{"id": 0, "answer": "yes"}, line])
        call("--questions", questions, "--answers", answers, "--metrics", "pope", "--output", tmp_path / name)
    accuracies = [results(tmp_path / name)["metrics"]["pope_accuracy"] for name in second]
    assert accuracies == [1.0, 0.5]
    out, _ = call("--compare", tmp_path / "empty", tmp_path / "missing")
    assert "| pope_accuracy | 1.0000 | 0.5000 | -0.5000 |" in out


def test_the_answers_of_one_evaluation_are_questions_of_another(call, files, tmp_path):
    call("--questions", files["questions"], "--answers", files["first"], "--output", tmp_path / "first")
    again = tmp_path / "first" / "answers.jsonl"
    call("--questions", again, "--answers", again, "--output", tmp_path / "again")
    assert results(tmp_path / "again")["metrics"] == results(tmp_path / "first")["metrics"]
    assert read(tmp_path / "again" / "answers.jsonl") == read(again)


def test_other_questions_are_not_compared(call, files, tmp_path):
    call("--questions", files["questions"], "--answers", files["first"], "--output", tmp_path / "first")
    lines = read(files["questions"])
    lines[0]["answers"] = ["no"] * 10
    call("--questions", write(files["questions"], lines), "--answers", files["first"], "--output", tmp_path / "b")
    err = call("--compare", tmp_path / "first", tmp_path / "b", status=2)[1]
    assert "same questions" in one_line_error(err, "evaluate.py")
    err = call("--compare", tmp_path / "first", tmp_path, status=2)[1]
    assert "results.json" in one_line_error(err, "evaluate.py")
    shutil.copytree(tmp_path / "first", tmp_path / "odd")
    for variants, words in ({"no_such": ""}, "no metric"), ({"pope": ""}, "pope"):
        (tmp_path / "odd" / "results.json").write_text(json.dumps({"variants": variants}))
        write(tmp_path / "odd" / "answers.jsonl", [{"id": 1, "prompt": "?", "answers": ["red"], "answer": "x"}])
        err = call("--compare", tmp_path / "odd", tmp_path / "odd", status=2)[1]
        assert words in one_line_error(err, "evaluate.py")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "--questions"),
        (["--questions", "{questions}"], "--model_weights"),
        (
            ["--questions", "{questions}", "--answers", "{first}", "--model_weights", "x", "--output", "{out}"],
            "--answers",
        ),
        (["--questions", "{questions}", "--answers", "{first}"], "--output"),
        (["--questions", "{questions}", "--answers", "{first}", "--output", "{out}", "--blind"], "--blind"),
        (["--questions", "{questions}", "--answers", "{none}", "--output", "{out}"], "none.jsonl"),
        (["--questions", "{none}", "--answers", "{first}", "--output", "{out}"], "none.jsonl"),
        (["--questions", "{questions}", "--answers", "{first}", "--output", "{out}", "--metrics", "f1"], "f1"),
        (
            ["--questions", "{questions}", "--answers", "{first}", "--output", "{out}", "--image_folder", "{none}"],
            "folder",
        ),
        (["--image_map", "{questions}", "--answers", "{first}", "--output", "{out}"], "--captions_file"),
        *(
            (["--image_map", "m", "--captions_file", "c", "--answers", "{first}", "--output", "{out}", flag, "."], flag)
            for flag in ("--annotations", "--image_folder", "--prompt")
        ),
        (["--questions", "{questions}", "--answers", "{first}", "--output", "{first}"], "is a file"),
        (["--questions", "{questions}", "--answers", "{first}", "--output", "{first}/in"], "can't be created"),
        (["--questions", "{questions}", "--answers", "{first}", "--output", "{out}", "--seed", "-1"], "--seed -1"),
        *(
            (["--questions", "{questions}", "--answers", "{first}", "--output", "{out}", *flags], flags[0])
            for flags in (["--batch_size", "0"], ["--max_new_tokens", "-3"], ["--system", "x"], ["--batch_size", "8"])
        ),
        (["--questions", "{questions}", "--answers", "{first}", "--output", "{out}", "--prompt", "?"], "--prompt"),
        *(
            (["--questions", "{questions}", "--answers", "{first}", "--output", name], "--output")
            for name in ("x" * 300, "x\0y")
        ),
        (["--compare", "a", "b", "--metrics", "pope", "--batch_size=8"], "--batch_size, --metrics"),
        (["--compare", "a", "b", "--questions", "{questions}"], "--questions"),
        (["--questions", "{questions}", "--answers", "{first}", "--output", "{out}", "--no_such_flag"], "no_such_flag"),
        (["--questions", "{questions}", "--model_weights", "{none}", "--output", "{out}"], "none.jsonl"),
    ],
)
def test_what_a_user_can_fix_is_refused_in_a_line(call, files, tmp_path, flags, words):
    places = {**files, "out": tmp_path / "out", "none": tmp_path / "none.jsonl"}
    before = {name: path.read_bytes() for name, path in files.items()}
    err = call(*(flag.format(**places) for flag in flags), status=2)[1]
    assert words in one_line_error(err, "evaluate.py")
    assert {name: path.read_bytes() for name, path in files.items()} == before


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE"])
def test_a_process_number_that_is_none_is_refused_in_a_line(call, monkeypatch, name):
    monkeypatch.setenv(name, "x")
    assert name in one_line_error(call("--help", status=2)[1], "evaluate.py")


def test_without_room_the_results_are_named_and_no_part_is_left(call, files, tmp_path):
    """As on a full disk: files may not grow beyond 100 bytes, and the system's error names none."""
    out, limits = tmp_path / "out", resource.getrlimit(resource.RLIMIT_FSIZE)
    flags = ("--questions", files["questions"], "--answers", files["first"], "--output", out)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        _, err = call(*flags, status=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(out / "answers.jsonl") in one_line_error(err, "evaluate.py")
    assert not list(out.iterdir())


def test_answers_are_not_overwritten_and_one_process_writes(call, files, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    given = shutil.copy(files["first"], output / "answers.jsonl")
    flags = ("--questions", files["questions"], "--output", output)
    assert "overwritten" in call(*flags, "--answers", given, status=2)[1]
    with hold(output):
        assert "is writing to it" in call(*flags, "--answers", files["first"], status=2)[1]
    assert Path(given).read_bytes() == files["first"].read_bytes()


# ---- With a model


@pytest.fixture
def asked(tmp_path, pictures) -> list[dict]:
    """Questions about three pictures, one without a picture, and one about two."""
    names = ("red", "blue", "green", "red")
    about = [{"id": n, "image": str(pictures[name]), "prompt": "What?" + "!" * n} for n, name in enumerate(names)]
    two = {"id": "two", "image": [str(pictures["red"]), str(pictures["blue"])], "prompt": "<|extra_0|>or<|extra_0|>?"}
    other = {
        "id": "owt",
        "image": [str(pictures["blue"]), str(pictures["green"])],
        "prompt": "<|extra_0|>or<|extra_0|>?",
    }
    questions = [*about, {"id": "none", "prompt": "Hello"}, two, other]
    return [{**question, "answers": ["right"]} for question in questions]


def test_a_models_answers_are_those_of_a_batch(call, asked, trained, loaded_once, capsys, tmp_path):
    file = write(tmp_path / "q.jsonl", asked)
    flags = ("--model_weights", trained, "--questions", file, "--output", tmp_path / "out", "--device", "cpu")
    out, err = call(*flags, "--batch_size", 3, "--max_new_tokens", 5)
    batch = ["--batch", file, "--output", tmp_path / "a.jsonl", "--greedy", "--max_new_tokens", 5, "--device", "cpu"]
    assert load_test_py().main(["--model_weights", str(trained), *map(str, batch)]) == 0
    expected = {line["id"]: line["answer"] for line in read(tmp_path / "a.jsonl")}
    lines = read(tmp_path / "out" / "answers.jsonl")
    assert {line["id"]: line["answer"] for line in lines} == expected
    assert [line["id"] for line in lines] == [question["id"] for question in asked]
    assert "7/7" in err
    assert "| exact_match | 0.0000 | " in out
    assert results(tmp_path / "out")["fingerprints"]["model"].keys() >= {"checkpoint", "base models", "settings"}


def test_blind_asks_about_other_pictures(call, asked, trained, loaded_once, tmp_path):
    file = write(tmp_path / "q.jsonl", asked)
    flags = ("--model_weights", trained, "--questions", file, "--output", tmp_path / "out", "--device", "cpu")
    out, _ = call(*flags, "--blind", "--max_new_tokens", 5)
    lines = {line["id"]: line for line in read(tmp_path / "out" / "answers.jsonl")}
    assert lines["none"]["answer"] == lines["none"]["blind_answer"]
    assert any(line["answer"] != line["blind_answer"] for line in lines.values())
    assert "Blind" in out
    assert results(tmp_path / "out")["blind"]["seeing_minus_blind"]["exact_match"] == 0.0
    assert results(tmp_path / "out")["blind"]["with_own_pictures"] == 1
    assert "1 question has no other pictures" in (tmp_path / "out" / "report.html").read_text()
    # What the blind pass was shown gives the same answers if it is asked for openly.
    from model.asking.question_file import read_questions

    swapped = blind_questions(read_questions(file))
    moved = [{**line, "image": [str(path) for path in one.images]} for line, one in zip(asked, swapped, strict=True)]
    call(
        *flags[:3],
        write(tmp_path / "moved.jsonl", moved),
        "--output",
        tmp_path / "b",
        *flags[6:],
        "--max_new_tokens",
        5,
    )
    openly = {line["id"]: line["answer"] for line in read(tmp_path / "b" / "answers.jsonl")}
    assert openly == {index: line["blind_answer"] for index, line in lines.items()}


def test_no_question_keeps_its_picture_when_blind(asked, tmp_path):
    from model.asking.question_file import read_questions

    questions = read_questions(write(tmp_path / "q.jsonl", asked))
    swapped = blind_questions(questions)
    for before, after in zip(questions, swapped, strict=True):
        assert len(before.images) == len(after.images)
        assert before.images != after.images or not before.images
    for alone in ([questions[0], questions[0]], [Question("a", (), "?"), Question("b", (), "?")]):
        with pytest.raises(ValueError, match="--blind"):
            blind_questions(alone)


def test_one_question_that_can_get_no_other_pictures_is_asked_as_it_is():
    a, b, c = (Path(name) for name in "abc")
    sets = [(a,), (b,), (a, b), (b, a), (), (a, b, c)]
    swapped = [one.images for one in blind_questions([Question(at, one, "?") for at, one in enumerate(sets)])]
    assert swapped == [(b,), (a,), (a, b), (b, a), (), (a, b, c)], "two pictures in another order are no others"
    assert number_kept([Question(at, one, "?") for at, one in enumerate(sets)]) == 4
    sets[3] = (c, a)
    assert [one.images for one in blind_questions([Question(at, one, "?") for at, one in enumerate(sets)])][2:4] == [
        (c, a),
        (a, b),
    ]


def test_a_stopped_evaluation_is_resumed(call, asked, trained, loaded_once, tmp_path, monkeypatch):
    from model.evaluation import asking

    file = write(tmp_path / "q.jsonl", asked)
    flags = ("--model_weights", trained, "--questions", file, "--device", "cpu", "--max_new_tokens", 5)
    call(*flags, "--output", tmp_path / "whole")
    part = tmp_path / "out" / asking.PARTS / "seeing-1-of-1.jsonl"
    call(*flags, "--output", tmp_path / "out")
    kept = part.read_bytes().splitlines(keepends=True)[:3]
    part.write_bytes(b"".join(kept) + b'{"id": 3, "ans')  # as a kill leaves it
    _, err = call(*flags, "--output", tmp_path / "out")
    assert "3 of 7 answered already" in err
    names = ["out", "whole"]
    assert len({(tmp_path / name / "answers.jsonl").read_bytes() for name in names}) == 1
    # Answers of other settings are not mixed in.
    err = call(*flags[:-1], 6, "--output", tmp_path / "out", status=2)[1]
    assert "settings" in one_line_error(err, "evaluate.py")


def test_a_question_without_an_answer_is_said_and_counts_as_wrong(call, asked, trained, loaded_once, tmp_path):
    asked[0]["image"] = "nowhere.png"
    file = write(tmp_path / "q.jsonl", asked)
    flags = ("--model_weights", trained, "--questions", file, "--output", tmp_path / "out", "--device", "cpu")
    err = call(*flags, "--max_new_tokens", 3, status=2)[1]
    assert "nowhere.png" in one_line_error(err, "evaluate.py")
    assert results(tmp_path / "out")["counts"]["without_answer"] == 1
    assert read(tmp_path / "out" / "answers.jsonl")[0]["answer"] == ""


def test_pictures_that_are_fixed_later_complete_an_evaluation(call, asked, trained, loaded_once, pictures, tmp_path):
    late = tmp_path / "late.png"
    asked[0]["image"] = "late.png"
    file = write(tmp_path / "q.jsonl", asked)
    flags = ("--model_weights", trained, "--questions", file, "--device", "cpu", "--max_new_tokens", 3, "--blind")
    call(*flags, "--output", tmp_path / "out", status=2)
    shutil.copy(pictures["green"], late)
    err = call(*flags, "--output", tmp_path / "out")[1]
    assert err.count("6 of 7 answered already") == 2
    call(*flags, "--output", tmp_path / "fresh")
    for name in ("answers.jsonl", "report.html"):
        pages = [(tmp_path / folder / name).read_text().replace("/fresh", "/out") for folder in ("out", "fresh")]
        assert pages[0] == pages[1]
    assert len({str(results(tmp_path / folder)["fingerprints"]["model"]) for folder in ("out", "fresh")}) == 1


def test_more_processes_than_gpus_are_refused(monkeypatch, tmp_path):
    from model.evaluation import asking

    monkeypatch.setattr(asking, "has_accelerator", lambda: True)
    monkeypatch.setattr(asking.torch.accelerator, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ValueError, match="1 GPU for 2 processes"):
        asking.ask(argparse.Namespace(device=None), [], tmp_path, 1, 2)


@pytest.mark.slow
def test_two_processes_answer_their_share(call, asked, trained, loaded_once, tmp_path):
    file = write(tmp_path / "q.jsonl", asked)
    flags = ("--model_weights", trained, "--questions", file, "--device", "cpu", "--max_new_tokens", 5, "--blind")
    call(*flags, "--output", tmp_path / "one")
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    done = start(*launcher, ROOT / "evaluate.py", *flags, "--output", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| exact_match | ") == 1
    one, two = (read(tmp_path / name / "answers.jsonl") for name in ("one", "two"))
    assert one == two
    assert len(list((tmp_path / "two" / "parts").glob("*-of-2.jsonl"))) == 4
