"""What holds for any text, conversation and annotation file, tried on generated ones."""

from __future__ import annotations

import json
import shutil
import tempfile
import unicodedata
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dataprocess import process_image
from dataset.prompt import encode_prompt, encode_sample
from qwen import IGNORE_INDEX, make_context

START, END, EOD, IMAGE = 151644, 151645, 151643, 151646
SYSTEM = "你是一位图像理解助手。"
modest = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
few = settings(modest, max_examples=25)
CONTROL = st.sampled_from(["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|extra_0|>", "<|extra_7|>", "<|im_", "|>"])
WORDS = st.sampled_from(["a", " the", "图像", "😀", "\n", "\n\n", "  ", "e\u0301", "12", "\0", "system\n", "<image>"])
TEXTS = st.lists(st.one_of(CONTROL, WORDS, st.text(max_size=6)), max_size=8).map("".join)
"""Any characters but surrogates, and what looks like control tokens."""
PLAIN = TEXTS.map(lambda text: text.replace("<|extra_0|>", ""))
ANSWERS = TEXTS.filter(str.strip)


def nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


# ---- Prompts


def chatml(system: str, turns: list[tuple[str, str]], query: str) -> str:
    text = f"<|im_start|>system\n{nfc(system)}<|im_end|>"
    for question, answer in turns:
        text += f"\n<|im_start|>user\n{nfc(question)}<|im_end|>\n<|im_start|>assistant\n{nfc(answer)}<|im_end|>"
    return text + f"\n<|im_start|>user\n{nfc(query)}<|im_end|>\n<|im_start|>assistant\n"


def frame(turns: int) -> list[int]:
    """The control tokens of a prompt, however its content reads."""
    return [START, END] + [START, END, START, END] * turns + [START, END, START]


@modest
@given(system=TEXTS, turns=st.lists(st.tuples(TEXTS, TEXTS), max_size=3), query=TEXTS)
def test_a_chat_prompt_reads_as_written_and_content_gives_no_control_token(tokenizer, system, turns, query):
    _, ids = make_context(tokenizer, query, turns, system)
    assert tokenizer.decode(ids) == chatml(system, turns, query)
    assert [index for index in ids if index >= EOD] == frame(len(turns))


@modest
@given(turns=st.lists(st.tuples(TEXTS, TEXTS), max_size=3), query=TEXTS, tokens=st.integers(1, 5))
def test_only_placeholders_in_questions_become_image_tokens(tokenizer, turns, query, tokens):
    ids, dropped = encode_prompt(tokenizer, query, tokens, turns, SYSTEM)
    assert dropped == 0
    questions = [*(question for question, _ in turns), query]
    images = sum(question.count("<|extra_0|>") for question in questions)
    assert ids.count(IMAGE) == tokens * images
    assert [index for index in ids if index >= EOD and index != IMAGE] == frame(len(turns))
    if not images:
        assert ids == make_context(tokenizer, query, turns, SYSTEM)[1]


# ---- Labels


@modest
@given(turns=st.lists(st.tuples(TEXTS, ANSWERS), min_size=1, max_size=3), cut=st.integers(0, 12))
def test_labels_are_the_answers_and_their_end_tokens(tokenizer, turns, cut):
    whole = encode_sample(tokenizer, turns, 2, SYSTEM, 100_000)
    expected: list[int] = []
    for number, (_, answer) in enumerate(turns, start=1):
        expected += [*tokenizer.encode_text(answer), EOD if number == len(turns) else END]
    assert [label for label in whole.labels if label != IGNORE_INDEX] == expected
    assert all(label in (IGNORE_INDEX, index) for index, label in zip(whole.input_ids, whole.labels, strict=True))
    prompt, _ = encode_prompt(tokenizer, turns[-1][0], 2, turns[:-1], SYSTEM)
    assert whole.input_ids[: len(prompt)] == prompt, "training sees what answering sees"
    # Cut, it is the same sample but for its end.
    last = len(tokenizer.encode_text(turns[-1][1])) + 1
    if cut < last:
        shorter = encode_sample(tokenizer, turns, 2, SYSTEM, len(whole.input_ids) - cut)
        assert shorter.input_ids == whole.input_ids[: len(whole.input_ids) - cut]
        assert shorter.labels == whole.labels[: len(whole.labels) - cut]
        assert shorter.num_cut == cut


# ---- Preparation

JUNK = st.sampled_from([None, 5, "", " \n", "\ud800", [], {}, True, "q <|extra_0|>", ["a"]])


@few
@given(captions=st.lists(st.lists(st.one_of(TEXTS, JUNK), max_size=4), max_size=4))
def test_every_caption_of_a_photo_comes_out_once_or_is_in_the_list_of_rejects(capfd, captions):
    folder = Path(tempfile.mkdtemp())
    try:
        captions = [["fixed"], *captions]
        records = [{"image_id": f"{index}.jpg", "caption": texts} for index, texts in enumerate(captions)]
        (folder / "label.json").write_text(json.dumps(records))
        config = {"ali_image_path": "images", "ali_image_path_label_file": "label.json"}
        config |= {"output_image_map": "image_map.json", "output_captions": "captions.json"}
        (folder / "config.yaml").write_text(json.dumps(config))
        assert process_image.main(["--config", str(folder / "config.yaml")]) == 0
        lines = (folder / "captions_rejects.jsonl").read_text(encoding="utf-8").splitlines()
        rejected = {(line["record"], line.get("caption")) for line in map(json.loads, lines)}
        out = {int(key): value["a"] for key, value in json.loads((folder / "captions.json").read_text("utf-8")).items()}
        for index, texts in enumerate(captions):
            good = [text for at, text in enumerate(texts) if (index, at) not in rejected]
            if (index, None) in rejected:
                assert index not in out
                assert not [text for text in texts if isinstance(text, str) and text.strip() and text != "\ud800"]
            else:
                assert out[index] == good
    finally:
        shutil.rmtree(folder)
