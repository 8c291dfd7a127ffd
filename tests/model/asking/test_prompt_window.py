"""Conversations that are longer than the model's window."""

from __future__ import annotations

import pytest

from dataset.prompt import SYSTEM_PROMPT, encode_prompt
from model.asking.prompt_window import fit_prompt

IMAGE = 151646


def text_of(tokenizer, ids) -> str:
    return tokenizer.decode([index for index in ids if index != IMAGE])


def test_what_fits_is_left_alone(tokenizer, caplog):
    history = [("<|extra_0|>q", "a"), ("r", "b")]
    ids, _ = encode_prompt(tokenizer, "s", 3, history)
    assert fit_prompt(tokenizer, "s", 3, history, SYSTEM_PROMPT, len(ids)) == ids
    assert not caplog.records


@pytest.mark.parametrize("images", [0, 2])
@pytest.mark.parametrize("window", [40, 200])
def test_long_conversations_keep_system_prompt_images_and_the_newest_turns(tokenizer, caplog, images, window):
    history = [(f"{'<|extra_0|>' * images if number == 0 else ''}question {number}", "a") for number in range(30)]
    ids = fit_prompt(tokenizer, "the last", 4, history, SYSTEM_PROMPT, window)
    assert len(ids) <= window
    assert ids.count(IMAGE) == 4 * images
    head = tokenizer.system_ids(SYSTEM_PROMPT)
    assert ids[: len(head)] == head
    text = text_of(tokenizer, ids)
    assert "the last<|im_end|>" in text
    kept = [number for number in range(30) if f"question {number}<" in text]
    assert kept == list(range(30 - len(kept), 30))
    assert f"oldest {30 - len(kept)} turn" in caplog.text
    # One turn more would not have fitted.
    longer, _ = encode_prompt(tokenizer, "the last", 4, history[29 - len(kept) :], SYSTEM_PROMPT, 10_000)
    assert len(longer) + 4 * images > window


@pytest.mark.parametrize("left", [0, 1, 2])
def test_images_of_a_dropped_turn_move_in_front_of_the_oldest_question_left(tokenizer, left):
    history = [("<|extra_0|>first " + "word " * 99, "a"), ("second<|extra_0|>", "b"), ("third", "c")]
    turns = [*history, ("the last", "")]
    moved = "<|extra_0|>" * sum(question.count("<|extra_0|>") for question, _ in turns[: 3 - left])
    (oldest, answer), *later = turns[3 - left :]
    *expected, (query, _) = [(moved + oldest, answer), *later]
    ids, _ = encode_prompt(tokenizer, query, 4, expected)
    assert fit_prompt(tokenizer, "the last", 4, history, SYSTEM_PROMPT, len(ids)) == ids


@pytest.mark.parametrize(
    "question", ["word " * 3000, "<|extra_0|>" + "长" * 5000 + "<|extra_0|>?", "😀" * 2000 + "<|extra_0|>"]
)
@pytest.mark.parametrize("window", [100, 101, 102, 103])
def test_one_giant_question_loses_its_beginning_but_no_image_and_no_half_character(tokenizer, caplog, question, window):
    ids = fit_prompt(tokenizer, question, 5, [("old", "turn")], SYSTEM_PROMPT, window, "picture.png")
    assert window - 4 < len(ids) <= window
    assert ids.count(IMAGE) == 5 * question.count("<|extra_0|>")
    text = text_of(tokenizer, ids)
    assert "\ufffd" not in text
    content = text.split("user\n")[1].split("<|im_end|>")[0]
    assert content
    assert question.replace("<|extra_0|>", "").endswith(content)
    num_cut = len(encode_prompt(tokenizer, question, 5)[0]) - len(ids)
    for message, number in zip(caplog.messages, (1, num_cut), strict=True):
        assert message.startswith("picture.png: ")
        assert f"{window} tokens" in message
        assert f" {number:,} " in message


def test_no_room_for_a_question_is_an_error(tokenizer):
    with pytest.raises(ValueError, match=r"2 images .* 50 tokens"):
        fit_prompt(tokenizer, "<|extra_0|><|extra_0|>What is this?", 20, [], SYSTEM_PROMPT, 50)
    with pytest.raises(ValueError, match="system prompt"):
        fit_prompt(tokenizer, "What?", 4, [], "long " * 100, 50)
