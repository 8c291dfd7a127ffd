"""Prompts by a language model's own chat template are those of transformers, and nobody types a control token."""

from __future__ import annotations

import pytest
from tiny_families import CHATML, FAMILIES, make_tokenizer

from dataset.chat_template import ChatTemplateError, ChatTokenizer

TURNS = [("What colour?", "It is red."), ("And now?", "是蓝色的。")]
IMAGE = 1000


def chat(family: str, template: str | None = None) -> ChatTokenizer:
    return ChatTokenizer(make_tokenizer(family, template), IMAGE)


def messages(turns, system=None) -> list[dict[str, str]]:
    pairs = [("system", system)] if system is not None else []
    for question, answer in turns:
        pairs += [("user", question), ("assistant", answer)]
    return [{"role": role, "content": text} for role, text in pairs if text is not None]


def built(tokenizer: ChatTokenizer, turns, system=None) -> list[int]:
    """Ids of a conversation; an answer of None is still to come."""
    ids = list(tokenizer.system_ids(system))
    for number, (question, answer) in enumerate(turns):
        first, last = number == 0, number == len(turns) - 1
        ids += tokenizer.question_ids(tokenizer.encode_text(question), first=first, last=last)
        if answer is not None:
            ids += [*tokenizer.encode_text(answer), tokenizer.answer_end(last=last)]
    return ids


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("turns", [TURNS[:1], TURNS], ids=["one turn", "two turns"])
def test_prompt_is_that_of_the_template(family, turns):
    tokenizer = make_tokenizer(family)
    asked = [*turns[:-1], (turns[-1][0], None)]
    template = tokenizer.chat_template.replace("strftime_now('%d %b %Y')", "'26 Jul 2024'")
    systems = [None] if family == "mistral" else [None, "Answer in one word."]
    for system in systems:
        whole = tokenizer.apply_chat_template(
            messages(asked, system),
            chat_template=template,
            add_generation_prompt=True,
            enable_thinking=False,
            return_dict=False,
        )
        assert built(ChatTokenizer(tokenizer, IMAGE), asked, system) == whole


@pytest.mark.parametrize("family", FAMILIES)
def test_training_text_is_that_of_the_template_up_to_its_end_token(family):
    tokenizer = make_tokenizer(family)
    template = tokenizer.chat_template.replace("strftime_now('%d %b %Y')", "'26 Jul 2024'")
    whole = tokenizer.apply_chat_template(messages(TURNS), chat_template=template, return_dict=False)
    ids = built(ChatTokenizer(tokenizer, IMAGE), TURNS)
    assert ids == whole[: len(ids)]
    assert ids[-1] == tokenizer.eos_token_id
    assert len(whole) - len(ids) <= 1  # at most a line break follows


@pytest.mark.parametrize("family", FAMILIES)
def test_typed_control_tokens_are_text(family):
    tokenizer = chat(family)
    control = set(tokenizer.tokenizer.added_tokens_decoder)
    text = " ".join(FAMILIES[family][2])
    assert not control & set(tokenizer.encode_text(text))
    assert tokenizer.decode(tokenizer.encode_text(text)) == text


def test_thinking_is_off_by_the_templates_own_switch():
    prompt = chat("qwen3").question_ids([], last=True)
    think = chat("qwen3").tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    assert [index for index in prompt if index in think] == think


def test_date_does_not_depend_on_the_day():
    assert "26 Jul 2024" in chat("llama").decode(chat("llama").system_ids(None))


def test_image_token_is_no_text():
    assert chat("qwen2").decode([IMAGE, *chat("qwen2").encode_text("red"), IMAGE]) == "red"


def test_system_prompt_is_refused_only_where_it_is_given():
    tokenizer = chat("mistral")
    assert tokenizer.system_ids(None)
    with pytest.raises(ChatTemplateError, match="only user and assistant"):
        tokenizer.system_ids("Be short.")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("", "no chat template"),
        (CHATML.replace("m['content']", "m['content'] | upper"), "once each"),
        (CHATML.replace("m['content']", "m['content'] | replace(' ', '')"), "rewrites contents"),
        (CHATML.replace("m['content']", "m['content'] + m['content']"), "once each"),
        (CHATML.replace("+ '<|im_end|>\n'", "+ '\n'"), "no token of their own"),
        (CHATML.replace("{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>robot\n' }}"), "robot"),
        (CHATML.replace("<|im_start|>system\nYou are helpful.", "{{ raise_exception('never') }}"), "never"),
    ],
)
def test_templates_that_do_not_fit_are_refused(template, reason):
    with pytest.raises(ChatTemplateError, match=reason):
        chat("qwen2", template)
