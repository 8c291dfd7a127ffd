"""VQA accuracy by the official rule, on vectors computed by hand."""

from __future__ import annotations

import pytest

from model.evaluation.vqa_rules import plain_words, vqa_accuracy, without_punctuation


@pytest.mark.parametrize(
    ("answer", "references", "expected"),
    [
        ("yes", ["yes"] * 10, 1.0),
        ("", ["yes"] * 10, 0.0),
        ("", [""] * 10, 1.0),
        # Ten equal references: nothing but white space is touched, on either side.
        ("Yes", ["yes"] * 10, 0.0),
        ("yes.", ["yes"] * 10, 0.0),
        ("\tyes\n", ["yes"] * 10, 1.0),
        ("two", ["2"] * 10, 0.0),
        # References that differ: without the own one, three of ten must agree for a full score.
        ("Yes.", ["yes"] * 9 + ["no"], 1.0),
        ("no", ["yes"] * 9 + ["no"], 9 * (1 / 3) / 10),
        ("no", ["yes"] * 8 + ["no"] * 2, (8 * 2 / 3 + 2 * 1 / 3) / 10),
        ("no", ["yes"] * 7 + ["no"] * 3, (7 * 1 + 3 * 2 / 3) / 10),
        ("no", ["yes"] * 6 + ["no"] * 4, 1.0),
        ("c", list("abcdefghij"), 9 * (1 / 3) / 10),
        ("z", list("abcdefghij"), 0.0),
        ("No, there is not", ["no"] * 9 + ["yes"], 0.0),  # the whole answer counts, unlike in POPE
        ("No, there is not", ["no there is not"] * 9 + ["no"], 1.0),
        ("", list("abcdefghij"), 0.0),
        ("", [""] * 3 + ["a"] * 7, (3 * 2 / 3 + 7 * 1) / 10),
        # Digits and articles on the answer alone: what it says is looked for as it stands in the references.
        ("two", ["2"] * 9 + ["3"], 1.0),
        ("two", ["two"] * 9 + ["3"], 0.0),
        ("The dog", ["dog"] * 9 + ["cat"], 1.0),
        ("dog", ["the dog"] * 9 + ["cat"], 0.0),
        ("dog", ["Dog"] * 9 + ["cat"], 0.0),
        # Punctuation on both sides.
        ("t-shirt", ["t shirt"] * 9 + ["shirt"], 1.0),
        ("t shirt", ["t-shirt"] * 9 + ["shirt"], 1.0),
        ("dont know", ["don't know"] * 9 + ["yes"], 1.0),
    ],
)
def test_accuracy(answer, references, expected):
    assert vqa_accuracy(answer, references) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("red/blue", "red blue"),
        ("red, blue", "red blue"),
        ("1,000", "1000"),
        ("1,000 (a-b)", "1000 ab"),  # a comma in a number: every mark is dropped, none becomes a space
        ("u.s.a.", "usa"),
        ("3.5", "3.5"),
        ("a .5", "a .5"),
        ("what?", "what "),
        ("it's: 5", "it's: 5"),  # neither apostrophe nor colon is a mark
        ("." * 40 + "x", "." * 8 + "x"),
    ],
)
def test_punctuation(text, expected):
    assert without_punctuation(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("None", "0"),
        ("ten  Zero", "10 0"),
        ("eleven", "eleven"),
        ("a an THE", ""),
        ("couldnt've couldn'tve", "couldn't've couldn't've"),
        ("Isnt y'allll 'ows'at", "isn't y'all'll 'ow's'at"),
        ("somebody'd somebodyd've", "somebodyd somebody'd've"),
        ("Im lets shes", "im lets shes"),  # the official table has these in capitals or not at all
    ],
)
def test_numbers_articles_contractions(text, expected):
    assert plain_words(text) == expected
