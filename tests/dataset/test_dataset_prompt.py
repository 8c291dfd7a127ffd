"""Prompts, input ids and labels, token by token; test_properties.py tries generated ones."""

from __future__ import annotations

import pytest

from dataset.prompt import SYSTEM_PROMPT, SampleError, encode_prompt, encode_sample
from qwen import IGNORE_INDEX

START, END, EOD, IMAGE = 151644, 151645, 151643, 151646
HEAD = [START, 8948, 198, 56568, 109182, 107553, 101128, 110498, 1773, END]  # 你是一位图像理解助手。
ASK = [198, START, 872, 198]
REPLY = [END, 198, START, 77091, 198]

DESCRIBE = [43288, 99708, 107553, 53481, 34187, 99245, 11319]  # 这幅图像描述了什么？
A_DOG = [102292, 100737]  # 一只狗
HELLO = [9707, 11, 1879, 0]  # Hello, world!
TWO_DOGS = [64, 6548, 315, 1378, 12590]  # a photo of two dogs


@pytest.mark.parametrize(
    ("question", "answer", "asked", "answered"),
    [
        ("这幅图像描述了什么？<|extra_0|>", "一只狗", [*DESCRIBE, IMAGE, IMAGE], A_DOG),
        ("<|extra_0|>Hello, world!", "a photo of two dogs", [IMAGE, IMAGE, *HELLO], TWO_DOGS),
        ("A", "B", [32], [33]),
        ("A<|extra_0|>B<|extra_0|>", "A", [32, IMAGE, IMAGE, 33, IMAGE, IMAGE], [32]),
        ("<|extra_0|><|extra_0|>", "A", [IMAGE] * 4, [32]),
    ],
    ids=["Chinese", "English", "no image", "two images", "neighbours"],
)
def test_a_question_and_its_answer(tokenizer, question, answer, asked, answered):
    sample = encode_sample(tokenizer, [(question, answer)], num_image_tokens=2)
    prompt = [*HEAD, *ASK, *asked, *REPLY]
    assert sample.input_ids == [*prompt, *answered, EOD]
    assert sample.labels == [-100] * len(prompt) + [*answered, EOD]
    assert sample.num_cut == 0


def test_every_answer_of_a_conversation_is_supervised(tokenizer):
    turns = [("<|extra_0|>A", "一只狗"), ("B", "a photo of two dogs"), ("Hello, world!", "A")]
    sample = encode_sample(tokenizer, turns, num_image_tokens=1, system="")
    expected = [
        *((token, False) for token in [START, 8948, 198, END, *ASK, IMAGE, 32, *REPLY]),
        *((token, True) for token in [*A_DOG, END]),
        *((token, False) for token in [*ASK, 33, *REPLY]),
        *((token, True) for token in [*TWO_DOGS, END]),
        *((token, False) for token in [*ASK, *HELLO, *REPLY]),
        *((token, True) for token in [32, EOD]),
    ]
    assert sample.input_ids == [token for token, _ in expected]
    assert sample.labels == [token if supervised else -100 for token, supervised in expected]


def test_the_last_token_stays_at_the_length_limit(tokenizer):
    turns = [("A", "a photo of two dogs")]
    length = len(HEAD) + len(ASK) + 1 + len(REPLY)
    whole = encode_sample(tokenizer, turns, 1, max_length=length + 6)
    assert whole.input_ids[length:] == [*TWO_DOGS, EOD]
    assert whole.num_cut == 0
    for kept in range(5, 0, -1):
        cut = encode_sample(tokenizer, turns, 1, max_length=length + kept)
        assert cut.input_ids[length:] == cut.labels[length:] == TWO_DOGS[:kept]
        assert cut.input_ids[:length] == whole.input_ids[:length]
        assert cut.num_cut == 6 - kept
    with pytest.raises(SampleError, match=rf"{length} tokens .* max_length = {length}"):
        encode_sample(tokenizer, turns, 1, max_length=length)


def test_images_are_never_cut(tokenizer):
    turns = [("<|extra_0|>", "B"), ("<|extra_0|>", "A " * 100)]
    sample = encode_sample(tokenizer, turns, num_image_tokens=20, max_length=80)
    assert len(sample.input_ids) == 80
    assert sample.input_ids.count(IMAGE) == 40
    with pytest.raises(SampleError, match="an image is among those to be lost"):
        encode_sample(tokenizer, turns, num_image_tokens=40, max_length=80)
    with pytest.raises(SampleError, match="before the first answer"):
        encode_sample(tokenizer, turns, num_image_tokens=70, max_length=80)


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([], "no question and answer"),
        ([("A", " \n")], "answer 1 of 1 is empty"),
        ([("A", "B"), ("A", "")], "answer 2 of 2 is empty"),
    ],
)
def test_nothing_to_learn_is_an_error(tokenizer, turns, message):
    with pytest.raises(SampleError, match=message):
        encode_sample(tokenizer, turns, 1)


def test_image_tokens_count_towards_the_window(tokenizer):
    history = [("<|extra_0|>", "A"), ("A", "B")]
    ids, dropped = encode_prompt(tokenizer, "A", 100, history=history, max_window_size=100)
    assert (dropped, ids.count(IMAGE)) == (1, 0)
    ids, dropped = encode_prompt(tokenizer, "A", 100, history=history, max_window_size=200)
    assert (dropped, ids.count(IMAGE)) == (0, 100)
    assert ids[: len(HEAD)] == HEAD
    assert SYSTEM_PROMPT == "你是一位图像理解助手。"


def test_a_long_conversation_loses_whole_turns_from_its_end(tokenizer):
    turns = [("a", "long " * 5), ("b", "long " * 50), ("c", "d")]
    full = encode_sample(tokenizer, turns, 4)
    for max_length in range(21, len(full.input_ids) + 1):
        cut = encode_sample(tokenizer, turns, 4, max_length=max_length)
        size = len(cut.input_ids)
        assert size <= max_length
        assert (cut.input_ids, cut.labels) == (full.input_ids[:size], full.labels[:size])
        assert cut.labels[-1] != IGNORE_INDEX  # no question without an answer at the end
        assert not any(label != IGNORE_INDEX for label in full.labels[size:max_length])  # no answer lost that had room
        assert cut.num_cut == sum(label != IGNORE_INDEX for label in full.labels[size:])
