"""A chat reads every token once, and answers as if it had read all of them for every turn."""

from __future__ import annotations

import pytest
import torch
from tiny_qwen import tiny_model

from dataset.prompt import encode_prompt
from qwen import IMAGE_TOKEN_ID, MultimodalQWenLMHeadModel
from qwen.answering import answer_ids, decode
from qwen.prompt_cache import PromptCache
from qwen.sampling_loop import library_decode
from qwen.streaming import stream_ids

QUESTIONS = ("<|extra_0|>What is it?", "And 颜色?", "Why", "Are you sure of it?")
SETTINGS = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "top_p": 0.9, "top_k": 0},
    "penalty": {"do_sample": True, "repetition_penalty": 1.4, "temperature": 1.3},
}


@pytest.fixture(scope="module")
def model():
    return tiny_model(MultimodalQWenLMHeadModel, vocab_size=151936)


@pytest.fixture(scope="module")
def features():
    return torch.randn(4, 16, generator=torch.Generator().manual_seed(1))


class Chat:
    """The same turns with and without what was kept; every answer has to be the same."""

    def __init__(self, model, tokenizer, features, stream=True, **options):
        self.model, self.tokenizer, self.features, self.stream = model, tokenizer, features, stream
        self.options = {"max_new_tokens": 8, **options}
        self.cache = PromptCache()
        self.history: list[tuple[str, str]] = []

    def ask(self, question: str, stop_after: int | None = None) -> int:
        """Returns how many tokens of the prompt had been kept."""
        ids, _ = encode_prompt(self.tokenizer, question, 4, self.history)
        ids = torch.tensor([ids])
        images = {} if self.features is None else {"image_features": (self.features,)}
        torch.manual_seed(7)
        expected = answer_ids(self.model, self.tokenizer, ids, **images, **self.options)
        torch.manual_seed(7)
        kept = {"prompt_cache": self.cache, **images, **self.options}
        if not self.stream:
            answer = answer_ids(self.model, self.tokenizer, ids, **kept)
        elif stop_after is None:
            answer = list(stream_ids(self.model, self.tokenizer, ids, **kept))[-1]
        else:
            texts = stream_ids(self.model, self.tokenizer, ids, **kept)
            answer = [next(texts) for _ in range(stop_after)][-1]
            texts.close()
            assert expected.startswith(answer)
            expected = answer
        assert answer == expected
        self.history.append((question, answer))
        return self.cache.num_reused


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("stream", [True, False])
def test_answers_are_the_same_over_several_turns_about_an_image(model, tokenizer, features, name, stream):
    chat = Chat(model, tokenizer, features, stream, **SETTINGS[name])
    reused = [chat.ask(question) for question in QUESTIONS]
    lengths = [len(encode_prompt(tokenizer, q, 4, chat.history[:i])[0]) for i, q in enumerate(QUESTIONS)]
    assert reused[0] == 0
    # All that was read before is kept; of the answer, what comes back as the same tokens.
    assert all(kept >= before for kept, before in zip(reused[1:], lengths, strict=False))


@pytest.mark.parametrize("loop", [decode, library_decode])
def test_every_token_is_read_once(model, tokenizer, features, loop):
    """The answer's last token was drawn, but never read; the prompt's last token is read again, to get the next one."""
    cache, settings = PromptCache(), {"max_new_tokens": 5, "do_sample": True, "eos_token_id": 151643}
    prompt = [5, IMAGE_TOKEN_ID, IMAGE_TOKEN_ID, IMAGE_TOKEN_ID, IMAGE_TOKEN_ID, 6]
    images = {"image_features": (features,)}
    torch.manual_seed(7)
    answer = model.generate(torch.tensor([prompt]), **settings, **images)[0, 6:].tolist()
    reused = []
    for then in ([], [], [*answer, 8], [*answer[:4], 9], [*answer[:2], 8]):
        torch.manual_seed(7)
        ids = torch.tensor([prompt + then])
        list(stream_ids(model, tokenizer, ids, prompt_cache=cache, loop=loop, **images, **settings))
        reused.append(cache.num_reused)
    assert reused == [0, 5, 10, 10, 8]


def test_an_answer_that_was_stopped(model, tokenizer, features):
    chat = Chat(model, tokenizer, features, **SETTINGS["penalty"], eos_token_id=[151643])
    first = len(encode_prompt(tokenizer, QUESTIONS[0], 4)[0])
    chat.ask(QUESTIONS[0], stop_after=2)
    assert chat.ask(QUESTIONS[1]) >= first
    chat.ask(QUESTIONS[2], stop_after=1)
    assert chat.ask(QUESTIONS[3]) > first


def test_past_the_trained_length_it_is_read_anew_where_the_angles_change(tokenizer, features):
    model = tiny_model(MultimodalQWenLMHeadModel, vocab_size=151936, seq_length=64)
    chat = Chat(model, tokenizer, features, **SETTINGS["sampled"])
    reused, factors = [], []
    for number in range(9):
        reused.append(chat.ask(QUESTIONS[min(number, 1)]))
        factors.append(chat.cache._alpha)
    assert len(set(factors)) > 2
    for number in range(1, 9):
        assert (reused[number] == 0) == (factors[number] != factors[number - 1])


def test_turns_that_are_dropped_and_other_images(model, tokenizer, features):
    chat = Chat(model, tokenizer, features, do_sample=False)
    for question in QUESTIONS[:3]:
        chat.ask(question)
    image = encode_prompt(tokenizer, QUESTIONS[0], 4)[0].index(IMAGE_TOKEN_ID)
    chat.history = [("<|extra_0|>" + chat.history[1][0], chat.history[1][1])]  # as the window leaves it
    assert image + 4 <= chat.ask(QUESTIONS[3]) < image + 8
    chat.features = features.flip(0)
    assert chat.ask(QUESTIONS[2]) == image
    chat.features, chat.history = None, []
    assert 0 < chat.ask(QUESTIONS[2]) <= image
    chat.features, chat.history = features, []
    assert chat.ask(QUESTIONS[0]) <= image


def test_a_fault_in_the_middle_of_the_model(model, tokenizer, features, monkeypatch):
    """In whatever layer it comes, at the prompt or at a token, the next answers are right."""
    chat = Chat(model, tokenizer, features, do_sample=True)
    chat.ask(QUESTIONS[0])
    for calls in (1, 3):
        ids = torch.tensor([encode_prompt(tokenizer, QUESTIONS[1], 4, chat.history)[0]])
        texts = stream_ids(
            model, tokenizer, ids, prompt_cache=chat.cache, image_features=(features,), max_new_tokens=9, do_sample=True
        )
        with monkeypatch.context() as patch:
            mlp, left = model.transformer.h[1].attn, [calls]
            forward = mlp.forward

            def fail(*args, forward=forward, left=left, **kwargs):
                left[0] -= 1
                if not left[0]:
                    raise KeyboardInterrupt
                return forward(*args, **kwargs)

            patch.setattr(mlp, "forward", fail)
            with pytest.raises(KeyboardInterrupt):
                list(texts)
        assert chat.ask(QUESTIONS[1]) > 0
        chat.history.pop()
