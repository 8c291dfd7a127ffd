"""ChatML prompts, token by token."""

from __future__ import annotations

from qwen.conversation import build_prompt, make_context

START, END, EOD = 151644, 151645, 151643
SYSTEM, USER, ASSISTANT, NEWLINE = 8948, 872, 77091, 198
HELLO = 108386


def test_an_empty_system_prompt_still_writes_its_block(tokenizer):
    text, ids = make_context(tokenizer, "你好")
    assert text == "<|im_start|>system\n<|im_end|>\n<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n"
    assert ids == [
        *(START, SYSTEM, NEWLINE, END),
        *(NEWLINE, START, USER, NEWLINE, HELLO, END),
        *(NEWLINE, START, ASSISTANT, NEWLINE),
    ]


def test_history_and_system_prompt(tokenizer):
    text, ids = make_context(tokenizer, "你好", history=[("A", "B")], system="你好")
    assert text == (
        "<|im_start|>system\n你好<|im_end|>"
        "\n<|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\nB<|im_end|>"
        "\n<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n"
    )
    assert ids == [
        *(START, SYSTEM, NEWLINE, HELLO, END),
        *(NEWLINE, START, USER, NEWLINE, 32, END, NEWLINE, START, ASSISTANT, NEWLINE, 33, END),
        *(NEWLINE, START, USER, NEWLINE, HELLO, END, NEWLINE, START, ASSISTANT, NEWLINE),
    ]
    assert ids == tokenizer.encode(text), "for text without special tokens the prompt tokenised whole is the same"


def test_the_newest_turns_are_kept_up_to_the_last_token(tokenizer):
    history = [("A", "A"), ("B", "B"), ("你好", "B")]
    fixed, turn = 14, 12
    for window, kept in ((fixed + 3 * turn, 3), (fixed + 3 * turn - 1, 2), (fixed + turn, 1), (fixed + turn - 1, 0)):
        _, expected = make_context(tokenizer, "你好", history=history[len(history) - kept :])
        text, ids = make_context(tokenizer, "你好", history=history, max_window_size=window)
        assert ids == expected
        assert len(ids) == fixed + kept * turn
        assert text.count("user") == kept + 1
        assert build_prompt(tokenizer, "你好", history, max_window_size=window) == (ids, 3 - kept)
    assert make_context(tokenizer, "你好", history=history, max_window_size=1)[1][-6:-4] == [HELLO, END]


def test_a_long_turn_ends_the_history_even_if_older_ones_would_fit(tokenizer):
    _, ids = make_context(tokenizer, "A", history=[("A", "A"), ("B " * 50, "B"), ("A", "B")], max_window_size=60)
    assert ids == make_context(tokenizer, "A", history=[("A", "B")])[1]
