"""The official rules of VQA accuracy (https://visualqa.org/evaluation.html), oddities included.

Published numbers depend on the oddities: an answer is compared as it is where all references are equal ("Yes" is wrong
for ten times "yes"); each mark of punctuation goes or becomes a space by what surrounds it anywhere in the text; and
some words keep a form that looks like a mistake.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")
_MOST_FULL_STOPS = 32
"""The official program passes a flag where the number of replacements is expected, and this is the flag's value."""
_COUNTED = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0", **{word: str(number) for number, word in enumerate(_COUNTED)}}
_ARTICLES = {"a", "an", "the"}
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""

_APOSTROPHES = {
    right[:at] + right[at + 1 :]: right
    for right in _CONTRACTIONS.split()
    for at, letter in enumerate(right)
    if letter == "'"
}
_APOSTROPHES["somebody'd"] = "somebodyd"  # the other way round in the official table


def without_punctuation(text: str) -> str:
    """Drop punctuation: marks next to a space (all of them if a number holds a comma), others become a space."""
    has_number = _COMMA_IN_NUMBER.search(text) is not None
    changed = text
    for mark in _MARKS:
        is_apart = has_number or f"{mark} " in text or f" {mark}" in text
        changed = changed.replace(mark, "" if is_apart else " ")
    return _FULL_STOP.sub("", changed, count=_MOST_FULL_STOPS)


def plain_words(text: str) -> str:
    """Write a text in lower case, numbers up to ten as digits, without articles, and with its apostrophes."""
    words = [_NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(_APOSTROPHES.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """Return the accuracy of an answer, 0 to 1: the mean, over all references but one, of min(equal ones / 3, 1).

    Args:
        answer: as the model gave it.
        references: ten in VQAv2; with fewer than four, no answer reaches 1.
    """
    answer = _one_line(answer)
    known = [_one_line(text) for text in references]
    if len(set(known)) > 1:
        known = [without_punctuation(text) for text in known]
        answer = plain_words(without_punctuation(answer))
    equal = [text == answer for text in known]
    return sum(min((sum(equal) - own) / 3, 1) for own in equal) / len(equal)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()
