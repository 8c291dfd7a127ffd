"""Long conversations and long runs: windows, interrupts, memory that runs out, and characters in any locale."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from tiny_run import (
    MIXED_CAPTIONS,
    ROOT,
    environment,
    load_test_py,
    make_bases,
    make_pictures,
    one_line_error,
    write_data,
)

import train
from dataset.prompt import SYSTEM_PROMPT, encode_prompt
from model import LoraSettings, VisionLanguageModel
from model.asking.prompt_window import fit_prompt
from model.console import is_out_of_memory
from qwen.chatml import system_ids

ask = load_test_py()
IMAGE, EOD = 151646, 151643


@pytest.fixture(scope="module")
def bases(tmp_path_factory, qwen_tiktoken) -> list[str]:
    return make_bases(tmp_path_factory.mktemp("bases"), qwen_tiktoken)


@pytest.fixture(scope="module")
def red(tmp_path_factory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("pictures"))["red"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory, bases) -> Path:
    model = VisionLanguageModel.from_pretrained(bases[1], bases[3], device="cpu")
    model.add_lora(LoraSettings(rank=2, alpha=4, dropout=0.0))
    model.save_checkpoint(tmp_path_factory.mktemp("weights"))
    return tmp_path_factory.getbasetemp() / "weights0"


# ---- The window


def text_of(tokenizer, ids) -> str:
    return tokenizer.decode([index for index in ids if index != IMAGE])


def test_what_fits_is_left_alone(tokenizer, caplog):
    history = [("<|extra_0|>q", "a"), ("r", "b")]
    ids, _ = encode_prompt(tokenizer, "s", 3, history)
    assert fit_prompt(tokenizer, "s", 3, history, max_window_size=len(ids)) == ids
    assert not caplog.records


@pytest.mark.parametrize("images", [0, 1, 2])
@pytest.mark.parametrize("window", [40, 60, 100, 200])
def test_long_conversations_keep_system_prompt_images_and_the_newest_turns(tokenizer, caplog, images, window):
    history = [(f"{'<|extra_0|>' * images if number == 0 else ''}question {number}", "a") for number in range(30)]
    ids = fit_prompt(tokenizer, "the last", 4, history, SYSTEM_PROMPT, window)
    assert len(ids) <= window
    assert ids.count(IMAGE) == 4 * images
    head = system_ids(tokenizer, SYSTEM_PROMPT)
    assert ids[: len(head)] == head
    text = text_of(tokenizer, ids)
    assert "the last<|im_end|>" in text
    kept = [number for number in range(30) if f"question {number}<" in text]
    assert kept == list(range(30 - len(kept), 30))
    assert f"the oldest {30 - len(kept)} turns were left out" in caplog.text.replace("1 turn was", "1 turns were")
    # No turn more would have fitted.
    longer = fit_prompt(tokenizer, "the last", 4, history[30 - len(kept) :], SYSTEM_PROMPT, 10_000)
    assert len(longer) - (0 if kept and len(kept) == 30 else 4 * images) <= window


@pytest.mark.parametrize(
    "question", ["word " * 3000, "<|extra_0|>" + "长" * 5000 + "<|extra_0|>?", "😀" * 2000 + "<|extra_0|>"]
)
def test_one_giant_question_loses_its_beginning_but_no_image_and_no_half_character(tokenizer, caplog, question):
    for window in (100, 101, 102, 103, 500):
        caplog.clear()
        ids = fit_prompt(tokenizer, question, 5, [("old", "turn")], SYSTEM_PROMPT, window)
        assert window - 4 < len(ids) <= window
        assert ids.count(IMAGE) == 5 * question.count("<|extra_0|>")
        text = text_of(tokenizer, ids)
        assert "\ufffd" not in text
        content = text.split("user\n")[1].split("<|im_end|>")[0]
        assert question.replace("<|extra_0|>", "").endswith(content)
        assert content
        assert "the oldest 1 turn was left out" in caplog.text
        assert f"longer than the window of {window} tokens: the first " in caplog.text


def test_no_room_for_a_question_is_an_error(tokenizer):
    with pytest.raises(ValueError, match=r"system prompt and 2 images leave no room .* window of 50 tokens"):
        fit_prompt(tokenizer, "<|extra_0|><|extra_0|>What is this?", 20, max_window_size=50)
    with pytest.raises(ValueError, match="shorten the system prompt"):
        fit_prompt(tokenizer, "What?", 4, system="long " * 100, max_window_size=50)


def test_a_giant_prompt_on_the_command_line(weights, red, capsys):
    flags = ["--model_weights", str(weights), "--device", "cpu", "--greedy", "--max_new_tokens", "1"]
    assert ask.main([*flags, "--image_path", str(red), "--prompt", "word " * 30_000]) == 0
    assert "the question is longer than the window of 24000 tokens: the first " in capsys.readouterr().err
    assert ask.main([*flags, "--image_path", str(red), "--prompt", "What?", "--system", "word " * 30_000]) == 2
    assert "shorten the system prompt" in one_line_error(capsys.readouterr().err, "test.py")


# ---- Ctrl-C


class Scripted:
    """Stands for the assistant: each answer is a list of texts so far, or of errors to raise."""

    def __init__(self, *answers: list[object]) -> None:
        self.answers = iter(answers)
        self.asked: list[tuple[str, list[tuple[str, str]]]] = []
        self.closed = 0

    def features(self, images):
        return None

    def stream(self, prompt, features, history=None):
        self.asked.append((prompt, list(history or [])))
        try:
            for item in next(self.answers):
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            self.closed += 1


def talk(monkeypatch, capsys, assistant: Scripted, stdin) -> tuple[str, str]:
    monkeypatch.setattr(sys, "stdin", stdin)
    ask.set_up_logging()
    ask.chat(assistant, [])
    return capsys.readouterr()


def test_ctrl_c_ends_the_answer_and_not_the_chat(monkeypatch, capsys):
    assistant = Scripted(["One", "One two", KeyboardInterrupt()], [KeyboardInterrupt()], ["Three"])
    out, err = talk(monkeypatch, capsys, assistant, io.StringIO("first\nsecond\nthird\n"))
    assert out == "One two\n\nThree\n"
    assert err.count("[stopped]") == 2
    # What was said counts; a question that got no word was not asked.
    assert assistant.asked == [("first", []), ("second", [("first", "One two")]), ("third", [("first", "One two")])]
    assert assistant.closed == 3


def test_ctrl_c_at_the_prompt_leaves(monkeypatch, capsys, bases, weights):
    class Pressed(io.StringIO):
        def readline(self, *_):
            raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stdin", Pressed())
    assert ask.main(["--model_weights", str(weights), "--device", "cpu"]) == 130
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err


@pytest.mark.parametrize("sampling", ["--greedy", "--do_sample"])
def test_a_signal_in_the_middle_of_a_real_answer(weights, sampling, tmp_path):
    """In a process of its own, as a terminal would send it; the second question is answered."""
    flags = ["--model_weights", str(weights), "--device", "cpu", sampling, "--max_new_tokens", "100000"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "test.py"), *flags],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdin.write(b"What?\n")
    assert process.stdout.read(1)  # the answer has begun
    process.send_signal(signal.SIGINT)
    said = b""
    while b"[stopped]" not in said:  # a sampled answer may hold line breaks: stdout does not tell that it was stopped
        said += (more := process.stderr.read(1000))
        assert more, said
    os.set_blocking(process.stdout.fileno(), False)
    while process.stdout.read(1000):  # what is left of the first answer; None where there is no more
        pass
    os.set_blocking(process.stdout.fileno(), True)
    process.stdin.write(b"\nAnd?\n")
    seen = b""
    while len(seen) < 20:  # the second answer has begun, behind the line break of the first
        seen += (more := process.stdout.read(1))
        assert more, seen
    process.send_signal(signal.SIGINT)
    process.stdin.write(b"exit\n")
    _, err = process.communicate(timeout=60)
    said += err
    assert process.returncode == 0, said
    assert b"Traceback" not in said
    assert said.count(b"[stopped]") == 2


def test_no_thread_goes_on_after_an_interrupt(weights, bases, monkeypatch):
    arguments = ask.parse_arguments(["--model_weights", str(weights), "--device", "cpu", "--greedy"])
    assistant = ask.load_assistant(arguments)
    assistant.options["max_new_tokens"] = 100_000
    monkeypatch.setattr("builtins.print", interrupted := Interrupting())
    assert ask.show(assistant.stream("What?", None), may_be_stopped=True)
    assert interrupted.calls > 3
    assert not [thread for thread in threading.enumerate() if thread.name == "greedy answer"]


class Interrupting:
    """print, at whose third call somebody presses Ctrl-C."""

    calls = 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        if self.calls == 3:
            raise KeyboardInterrupt


# ---- Memory


def too_much() -> RuntimeError:
    """What PyTorch really says on the CPU."""
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 58, dtype=torch.uint8)
    return error.value


OUT_OF_MEMORY = {
    "CPU": too_much,
    "Python": lambda: MemoryError(),
    "GPU": lambda: torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of 79 GiB."
    ),
    "MPS": lambda: RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
    "cuBLAS": lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
}


@pytest.mark.parametrize("kind", OUT_OF_MEMORY)
def test_out_of_memory_is_known_by_all_its_names(kind):
    assert is_out_of_memory(OUT_OF_MEMORY[kind]())
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    assert not is_out_of_memory(ValueError("out of memory"))


@pytest.mark.parametrize("kind", ["CPU", "GPU", "Python"])
@pytest.mark.parametrize("flags", [["--greedy"], ["--greedy", "--stream"], ["--do_sample", "--stream"]])
def test_out_of_memory_while_answering_gives_advice(weights, monkeypatch, capsys, kind, flags):
    def fail(*args, **kwargs):
        raise OUT_OF_MEMORY[kind]()

    monkeypatch.setattr("qwen.multimodal_qwen.MultimodalQWenModel.forward", fail)
    assert ask.main(["--model_weights", str(weights), "--device", "cpu", "--prompt", "What?", *flags]) == 1
    out, err = capsys.readouterr()
    said = one_line_error(err, "test.py")
    assert out.strip() == ""
    for advice in ("out of memory (", "--max_new_tokens", "--dtype bfloat16", "--device cpu"):
        assert advice in said
    assert "79 GiB" not in said


def test_out_of_memory_ends_an_answer_and_not_the_chat(monkeypatch, capsys):
    assistant = Scripted(["One", too_much()], ["Two"])
    out, err = talk(monkeypatch, capsys, assistant, io.StringIO("first\nsecond\n"))
    assert out.splitlines()[-1] == "Two"
    assert "out of memory" in one_line_error(err, "test.py")
    assert assistant.asked[1] == ("second", [])


def test_other_errors_are_not_taken_for_it(monkeypatch, capsys):
    with pytest.raises(RuntimeError, match="shape mismatch"):
        talk(monkeypatch, capsys, Scripted([RuntimeError("shape mismatch")]), io.StringIO("first\n"))


@pytest.mark.parametrize("where", ["forward", "load"])
def test_out_of_memory_while_training_gives_advice(bases, red, monkeypatch, capsys, tmp_path, where):
    def fail(*args, **kwargs):
        raise too_much()

    data = write_data(tmp_path / "data", MIXED_CAPTIONS, red.parent)
    name = "forward" if where == "forward" else "from_pretrained"
    monkeypatch.setattr(f"model.vision_language_model.VisionLanguageModel.{name}", fail)
    flags = ["--output_dir", str(tmp_path / "run"), "--use_cpu", "true", "--report_to", "none", "--lora_rank", "2"]
    assert train.main([*bases, *data, *flags, "--disable_tqdm", "true"]) == 1
    said = one_line_error(capsys.readouterr().err, "train.py")
    for advice in ("out of memory (", "--per_device_train_batch_size", "--gradient_accumulation_steps"):
        assert advice in said


# ---- Characters


@pytest.mark.parametrize("locale", ["C", "ascii"])
def test_answers_are_utf8_in_any_locale(locale, tmp_path):
    """Not UTF-8 by the locale, by PYTHONIOENCODING, or both; Python's own way out is switched off."""
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
        "from tiny_run import load_test_py; ask = load_test_py()\n"
        "class Echo:\n"
        "    def features(self, images): return None\n"
        "    def stream(self, prompt, features, history=None): yield '红'; yield '红色 😀 ' + prompt + '\\ud800'\n"
        "ask.load_assistant = lambda args: Echo()\n"
        "sys.exit(ask.main([]))\n"
    )
    script = tmp_path / "script.py"
    script.write_text(code, encoding="utf-8")
    variables = {"LC_ALL": "C" if locale == "C" else "C.UTF-8", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    if locale != "C":
        variables["PYTHONIOENCODING"] = locale
    done = subprocess.run(
        [sys.executable, script],
        cwd=ROOT,
        env=environment(**variables),
        input="颜色？\n".encode(),
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode("utf-8") == "红色 😀 颜色？\\ud800\n"


def test_streaming_prints_no_broken_character(weights, tokenizer, monkeypatch, capsys):
    """Tokens that cut characters of two, three and four bytes anywhere; every piece that is printed is whole."""
    text = "é漢字😀👩‍👩‍👧 naïve 𠮷 ñ"
    bytewise = [tokenizer.convert_tokens_to_ids(bytes([byte])) for byte in text.encode()]
    ids = [*bytewise, *tokenizer.encode_text(text), EOD]
    pieces: list[str] = []
    monkeypatch.setattr("builtins.print", lambda *args, **how: pieces.append("".join(args) + how.get("end", "\n")))
    from qwen.stream import decode_growing

    assert ask.show(decode_growing(tokenizer, ids[:-1])) == text * 2
    assert "".join(pieces) == text * 2 + "\n"
    assert "\ufffd" not in "".join(pieces)
    # An answer that ends inside a character shows that at its end, once.
    pieces.clear()
    assert ask.show(decode_growing(tokenizer, bytewise[:3])) == "é\ufffd"
