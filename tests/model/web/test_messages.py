"""What visitors type is shown as typed; what models say can't become HTML or load a picture."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.web.messages import ESCAPED, answer_markdown, chat_messages, escape, question_at
from model.web.questions import Asked, Picture

TEXTS = [
    "What color is the shape?",
    "<script>alert(1)</script>",
    "<|im_end|> <|extra_0|> <|endoftext|>",
    "**bold** _it_ `code` $$x^2$$ ~~s~~ | a | b |",
    "![x](http://example.com/a.png)",
    "- list\n+ list\n1. list\n2) list\n# heading\n> quote\n=====",
    "    indented\n\ttab",
    "&lt;b&gt; &amp;",
    "a\\*b \\",
    "שלום 😀 مرحبا 图片",
]


def unescape(markdown: str) -> str:
    """Do in Python what the page does."""
    return re.sub(ESCAPED, r"\1", markdown).replace("\u00a0", " ")


@pytest.mark.parametrize("text", TEXTS)
def test_escaping_can_be_undone(text):
    assert unescape(escape(text)) == text.replace("\t", "    ")


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text(alphabet="ab \\`*_{}[]<>#|~$&-+=.1)\n", max_size=30))
def test_escaping_any_text_can_be_undone(text):
    assert unescape(escape(text)) == text


def test_nothing_that_is_typed_stays_active():
    for text in TEXTS:
        markdown = escape(text)
        for at, character in enumerate(markdown):
            if character in "`*_[]<>#|~$&":
                assert markdown[at - 1] == "\\", markdown
        assert not any(line.startswith(("- ", "+ ", "1. ", "    ", "\t", "=")) for line in markdown.splitlines())


@pytest.mark.parametrize(
    ("answer", "shown"),
    [
        ("a < b and **bold**", "a < b and **bold**"),
        ("<img src=x onerror=alert(1)>", "&lt;img src=x onerror=alert(1)>"),
        ("</div><!-- x --><style>*{}</style>", "&lt;/div>&lt;!-- x -->&lt;style>*{}&lt;/style>"),
        ("![cat](http://example.com/c.png)", "!\\[cat](http://example.com/c.png)"),
        ("`<b>` and ```\n<b>![x](y)\n``` <i>", "`<b>` and ```\n<b>![x](y)\n``` &lt;i>"),
        ("```\n<b> unfinished", "```\n<b> unfinished"),
    ],
)
def test_an_answer_holds_markdown_only(answer, shown):
    assert answer_markdown(answer) == shown


def picture(name: str) -> Picture:
    return Picture(f"data:image/jpeg;base64,{name}", torch.zeros(3, 2, 2))


def test_messages_and_which_question_they_are():
    conversation = [
        Asked("first", [picture("A"), picture("B")], "one"),
        Asked("second", []),
        Asked("third", [picture("C")], "three"),
    ]
    messages = chat_messages(conversation, "en")
    kinds = [(m["role"], m["content"] if isinstance(m["content"], str) else "pictures") for m in messages]
    assert kinds == [
        *[("user", "pictures"), ("user", "first"), ("assistant", "one"), ("user", "second")],
        *[("user", "pictures"), ("user", "third"), ("assistant", "three")],
    ]
    html = [m["content"]["value"] for m in messages if not isinstance(m["content"], str)]
    assert [value.count("<img") for value in html] == [2, 1]
    assert "base64,C" in html[1]
    assert 'alt="picture 3"' in html[1]
    assert [question_at(conversation, index) for index in range(8)] == [None, 0, None, 1, None, 2, None, None]
    for nonsense in (-1, None, "1", 1.5, [1], {}):
        assert question_at(conversation, nonsense) is None
