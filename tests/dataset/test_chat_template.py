"""Prompts by a language model's own chat template are those of transformers, and nobody types a control token."""

from __future__ import annotations

import json

import pytest
from tiny_families import CHATML, FAMILIES, make_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AddedToken, PreTrainedTokenizerFast

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


@pytest.mark.parametrize("family", FAMILIES)
def test_typed_tokens_that_are_not_called_special_are_text_too(family):
    """As `<think>` and `<tool_call>` of the published Qwen3 are."""
    tokenizer = make_tokenizer(family)
    added = ["<tool>", "</tool>"]
    tokenizer.add_tokens([AddedToken(text, special=False) for text in added])
    ids = tokenizer.convert_tokens_to_ids(added)
    text = "A <tool>\n</tool><tool> b"
    assert set(ids) <= set(tokenizer.encode(text, split_special_tokens=True, add_special_tokens=False))
    ours = ChatTokenizer(tokenizer, IMAGE)
    assert not set(ids) & set(ours.encode_text(text))
    assert ours.decode(ours.encode_text(text)) == text


def test_a_run_of_spaces_that_was_added_controls_nothing():
    tokenizer = make_tokenizer("qwen2", CHATML.replace("+ '<|im_end|>\n'", "+ '\n\n'"))
    tokenizer.add_tokens([AddedToken("\n\n", special=False, normalized=False)])
    with pytest.raises(ChatTemplateError, match="no token of their own"):
        ChatTokenizer(tokenizer, IMAGE)
    ours = ChatTokenizer(make_tokenizer("qwen2"), IMAGE)
    ours.tokenizer.add_tokens([AddedToken("\n\n", special=False, normalized=False)])
    assert ours.encode_text("a\n\nb") == ours.tokenizer.encode("a\n\nb")


def sentencepiece(template: str) -> PreTrainedTokenizerFast:
    """A tokenizer as Llama 2 and Mistral 7B have it: it writes a space as U+2581, and puts one before every text."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    metaspace = decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence(list(metaspace))
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=800, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False)
    words = "what colour is the picture? it is red. And now you answer in one word. An apple, a robot."
    tokenizer.train_from_iterator([words, f"\n{words}"] * 3, trainer)
    values = json.loads(tokenizer.to_str())
    values["added_tokens"] = [token for token in values["added_tokens"] if not token["content"].startswith("<0x")]
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(values)), **roles)
    fast.add_special_tokens({"extra_special_tokens": ["[INST]", "[/INST]"]})
    fast.chat_template = template
    return fast


SPACED = (  # as Mistral-7B-Instruct-v0.3 is asked: the space belongs to the answer, and only then to its first word
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + '[/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
WITHIN_LINES = (  # as TinyLlama is: roles are plain text, and contents begin a line
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


@pytest.mark.parametrize("template", [SPACED, WITHIN_LINES], ids=["spaced", "within lines"])
@pytest.mark.parametrize("turns", [TURNS[:1], TURNS], ids=["one turn", "two turns"])
def test_tokenizers_that_put_a_space_before_a_text(template, turns):
    tokenizer = sentencepiece(template)
    assert tokenizer.tokenize("red")[0].startswith("\u2581")
    ours = ChatTokenizer(tokenizer, IMAGE)
    asked = [*turns[:-1], (turns[-1][0], None)]
    whole = tokenizer.apply_chat_template(messages(asked), add_generation_prompt=True, return_dict=False)
    assert built(ours, asked) == whole
    trained = tokenizer.apply_chat_template(messages(turns), return_dict=False)
    ids = built(ours, turns)
    assert ids == trained[: len(ids)]
    assert ours.decode(ours.encode_text("It is red.")) == "It is red."
    control = tokenizer.convert_tokens_to_ids(["<s>", "</s>", "[INST]", "[/INST]"])
    assert not set(control) & set(ours.encode_text("<s></s>[INST] [/INST]"))


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_an_empty_system_prompt_is_what_the_template_makes_of_it(family):
    tokenizer = make_tokenizer(family)
    template = tokenizer.chat_template.replace("strftime_now('%d %b %Y')", "'26 Jul 2024'")
    asked = messages([("What?", None)], "")
    whole = tokenizer.apply_chat_template(
        asked, chat_template=template, add_generation_prompt=True, enable_thinking=False, return_dict=False
    )
    assert built(ChatTokenizer(tokenizer, IMAGE), [("What?", None)], "") == whole


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_tokenizer_that_begins_texts_by_itself_begins_a_prompt_once(family):
    expected = built(chat(family), TURNS)
    tokenizer = make_tokenizer(family)
    begin, index = tokenizer.bos_token, tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A $B", special_tokens=[(begin, index)]
    )
    assert tokenizer.encode("red")[0] == index
    assert built(ChatTokenizer(tokenizer, IMAGE), TURNS) == expected
    assert expected.count(index) == 1


def test_of_several_templates_the_default_is_taken():
    tokenizer = make_tokenizer("qwen2")
    expected = built(ChatTokenizer(tokenizer, IMAGE), TURNS)
    for tools in ({}, {"tool_use": "{{ raise_exception('for tools') }}"}):
        tokenizer.chat_template = {**tools, "default": CHATML}
        assert built(ChatTokenizer(tokenizer, IMAGE), TURNS) == expected
    tokenizer.chat_template = {"tool_use": CHATML}
    with pytest.raises(ChatTemplateError, match="tool_use, and none is the default"):
        ChatTokenizer(tokenizer, IMAGE)


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
