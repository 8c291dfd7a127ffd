"""The page's texts: both languages have all of them."""

from __future__ import annotations

import re
from pathlib import Path
from string import Formatter

import pytest

from dataprocess.image_io import MAX_PIXELS
from model.web.limits import SAMPLING
from model.web.uploads import too_large
from model.web.words import CHINESE, ENGLISH, Refusal, language_of, say

ROOM = Path(__file__).parents[3] / "model/web"


def test_both_languages_say_the_same_things_with_the_same_values():
    assert ENGLISH.keys() == CHINESE.keys()
    for key in ENGLISH:
        fields = [{name for _, name, _, _ in Formatter().parse(words[key]) if name} for words in (ENGLISH, CHINESE)]
        assert fields[0] == fields[1], key
    assert [key for key, text in CHINESE.items() if not re.search("[一-鿿]", text)] == ["top_p", "top_k"]
    assert [key for key, text in ENGLISH.items() if re.search("[一-鿿]", text)] == []


def test_every_text_that_the_code_names_is_there_and_none_is_left_over():
    code = "".join(file.read_text() for file in ROOM.glob("*.py") if file.name != "words.py").replace("'", '"')
    named = set(re.findall(r'(?:say\([\w.]+, |Refusal\(|i18n\(|Example\()"(\w+)"', code))
    assert len(named) > 20
    assert named - ENGLISH.keys() == set()
    of_settings = {f"about_{name}" for name in SAMPLING} | SAMPLING.keys()  # named by an f-string
    assert {key for key in ENGLISH if f'"{key}"' not in code} - of_settings == set()


@pytest.mark.parametrize(
    ("header", "language"),
    [
        ("zh-CN,zh;q=0.9,en;q=0.8", "zh"),
        ("zh-TW", "zh"),
        ("ZH", "zh"),
        ("en-US,en;q=0.9,zh;q=0.8", "en"),
        ("en;q=0.1,zh;q=0.9", "zh"),
        ("fr,zh;q=0.5", "en"),
        ("zha", "en"),
        ("", "en"),
        (";q=,,;;q=x, zh;q=nope", "en"),
        ("*", "en"),
    ],
)
def test_the_language_is_the_browsers_first_choice(header, language):
    assert language_of(header) == language


def test_the_most_bytes_and_pixels_of_a_picture_are_said():
    assert MAX_PIXELS == 100 * 10**6
    for language, words in (("en", "0.05 MB and 100 megapixels"), ("zh", "0.05 MB、1 亿像素")):
        assert words in too_large("a.png", 50_000).say(language)


def test_a_refusal_is_said_in_the_visitors_language():
    refusal = Refusal("too_fast", most=3, seconds=7)
    for language in ("en", "zh"):
        assert "3" in refusal.say(language)
        assert "7" in refusal.say(language)
        assert refusal.say(language) == say(language, "too_fast", most=3, seconds=7)
