"""The chat of test.py: turns, Ctrl-C, memory that runs out, and characters in any locale."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest
from tiny_run import ROOT, environment, load_test_py, one_line_error, too_much_memory

from model.asking.chat import chat
from model.console import set_up_logging

ask = load_test_py()


class Scripted:
    """Stands for the assistant: each answer is a list of texts so far, or of errors to raise."""

    def __init__(self, *answers: list[object]) -> None:
        self.answers = iter(answers)
        self.asked: list[tuple[str, list[tuple[str, str]]]] = []
        self.closed = 0

    def features(self, images):
        return None

    def stream(self, prompt, features, history, cache):
        self.asked.append((prompt, list(history)))
        try:
            for item in next(self.answers):
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            self.closed += 1


@pytest.fixture
def talk(monkeypatch, capsys):
    """Let a person type lines; return stdout and stderr."""

    def run(assistant: Scripted, lines: str, images=()) -> tuple[str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        set_up_logging()
        chat(assistant, images)
        return capsys.readouterr()

    return run


def test_the_first_question_brings_the_images(talk):
    assistant = Scripted(["One"], ["Two"])
    lines = "Two <|extra_0|> of <|extra_0|>?\nWhat\n\n  And why <|extra_0|>? \nexit\nMore\n"
    out, err = talk(assistant, lines, images=["picture"])
    assert out == "One\nTwo\n"
    assert assistant.asked == [("<|extra_0|>What", []), ("And why ?", [("<|extra_0|>What", "One")])]
    assert "2 placeholders" in one_line_error(err, "test.py")  # and the chat went on


# ---- Ctrl-C


def test_ctrl_c_ends_the_answer_and_not_the_chat(talk):
    assistant = Scripted(["One", "One two", KeyboardInterrupt()], [KeyboardInterrupt()], ["Three"])
    out, err = talk(assistant, "first\nsecond\nthird\n")
    assert out == "One two\n\nThree\n"
    assert err.count("[stopped]") == 2
    # What was said counts; a question that got no word was not asked.
    assert assistant.asked == [("first", []), ("second", [("first", "One two")]), ("third", [("first", "One two")])]
    assert assistant.closed == 3


def test_ctrl_c_at_the_prompt_leaves(monkeypatch, capsys, trained):
    class Pressed(io.StringIO):
        def readline(self, *_):
            raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stdin", Pressed())
    assert ask.main(["--model_weights", str(trained), "--device", "cpu"]) == 130
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err


# ---- Memory


@pytest.mark.parametrize("flags", [[], ["--stream"]], ids=["whole", "streamed"])
def test_out_of_memory_while_answering_gives_advice(trained, monkeypatch, capsys, flags):
    def fail(*args, **kwargs):
        raise too_much_memory()

    monkeypatch.setattr("qwen.multimodal_qwen.MultimodalQWenModel.forward", fail)
    assert ask.main(["--model_weights", str(trained), "--device", "cpu", "--prompt", "What?", *flags]) == 1
    out, err = capsys.readouterr()
    said = one_line_error(err, "test.py")
    assert out.strip() == ""
    for advice in ("out of memory (", "--max_new_tokens", "--dtype bfloat16", "--device cpu"):
        assert advice in said


def test_out_of_memory_ends_an_answer_and_not_the_chat_as_other_errors_do(talk):
    assistant = Scripted(["One", too_much_memory()], ["Two"])
    out, err = talk(assistant, "first\nsecond\n")
    assert out.splitlines()[-1] == "Two"
    assert "out of memory" in one_line_error(err, "test.py")
    assert assistant.asked[1] == ("second", [])
    with pytest.raises(RuntimeError, match="shape mismatch"):
        talk(Scripted([RuntimeError("shape mismatch")]), "first\n")


# ---- Characters

ECHO = """
import sys
from tiny_run import load_test_py
ask = load_test_py()
class Echo:
    def features(self, images): return None
    def stream(self, prompt, features, history, cache):
        yield '\\u7ea2'
        yield '\\u7ea2\\u8272 \\U0001f600 ' + prompt + '\\ud800'
ask.load_assistant = lambda args: Echo()
sys.exit(ask.main(["--model_weights", "none", "--device", "cpu"]))
"""


def test_answers_are_utf8_in_any_locale():
    """Not UTF-8 by the locale; Python's own way out is switched off."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    env = environment(PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", PYTHONPATH=path, LC_ALL="C", PYTHONIOENCODING="ascii")
    typed = "颜色？\n".encode()
    done = subprocess.run([sys.executable, "-c", ECHO], env=env, input=typed, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode("utf-8") == "红色 😀 颜色？\\ud800\n"
