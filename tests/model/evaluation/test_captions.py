"""BLEU, ROUGE-L and CIDEr-D: by hand, and equal to what pycocoevalcap computes by itself."""

from __future__ import annotations

import math
import shutil
import sys

import pytest

from model.asking.question_file import Question
from model.evaluation import captions
from model.evaluation.items import Item
from model.evaluation.metrics import Scored, check_families, score

pytest.importorskip("pycocoevalcap.bleu.bleu_scorer", reason="pip install -r evaluation-requirements.txt")

FAMILIES = ["bleu", "rouge_l", "cider_d"]
CHINESE = ["一个人在打篮球。", "两只狗在草地上奔跑。"]


@pytest.fixture
def no_java(monkeypatch):
    monkeypatch.setattr(captions.shutil, "which", lambda name: None)


def scored(references: list[list[str]], answers: list[str]) -> dict[str, Scored]:
    items = [Item(Question(n, (), "?"), tuple(group)) for n, group in enumerate(references)]
    return {one.family: one for one in score(items, answers, FAMILIES)}


def values(references: list[list[str]], answers: list[str]) -> dict[str, float]:
    return {name: value for one in scored(references, answers).values() for name, value in one.total.items()}


def test_bleu_and_rouge_by_hand(no_java):
    found = values([["The cat sat on the mat."], ["Two dogs run in the snow"]], ["The cat sat on mat", ""])
    # Five words of twelve, all of them right; three of four pairs, two of three triples, one of two fours.
    penalty = math.exp(1 - 12 / 5)
    assert found["bleu_1"] == pytest.approx(penalty)
    assert found["bleu_2"] == pytest.approx(penalty * (3 / 4) ** (1 / 2))
    assert found["bleu_3"] == pytest.approx(penalty * (3 / 4 * 2 / 3) ** (1 / 3))
    assert found["bleu_4"] == pytest.approx(penalty * (3 / 4 * 2 / 3 * 1 / 2) ** (1 / 4))
    recall, precision = 5 / 6, 1.0
    f = (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision)
    assert found["rouge_l"] == pytest.approx(f / 2)


@pytest.mark.parametrize("java", [True, False])
@pytest.mark.parametrize("references", [["A dog runs.", "..."], ["一只狗在跑。", "。"]])
def test_an_answer_without_a_word_scores_nothing(monkeypatch, java, references):
    """Missing, empty, or punctuation alone; even for a reference that is nothing else."""
    if not java:
        monkeypatch.setattr(captions.shutil, "which", lambda name: None)
    known = [references, references[:1]]
    found = [scored(known, [answer, references[0]]) for answer in (None, "", references[1])]
    for one in found:
        for family, result in one.items():
            assert result.total == pytest.approx(found[0][family].total)
            if family.endswith("rouge_l"):
                assert result.each == [0, 1]
            assert result.each[0] == 0
    # In BLEU the reference that is closest in length to no word is "...", which has none either.
    assert found[0]["bleu"].total["bleu_1"] == pytest.approx(1)


def test_cider_of_the_references_themselves_is_10(no_java):
    references = [["a man rides a horse"], ["two dogs run in snow"]]
    assert values(references, [group[0] for group in references])["cider_d"] == pytest.approx(10)
    assert values(references, [references[1][0], references[0][0]])["cider_d"] == 0


def test_chinese_is_counted_by_words_and_by_characters():
    pytest.importorskip("jieba", reason="pip install -r evaluation-requirements.txt")
    found = scored([[text] for text in CHINESE], ["一个人在踢足球", "两只狗在草地上奔跑。"])
    assert set(found) == {*FAMILIES, *(f"char_{name}" for name in FAMILIES)}
    assert "jieba" in found["bleu"].variant
    # 一个 人 在 踢足球: three of four words; 一 个 人 在 … 球: five of seven characters; the full stop does not count.
    assert found["bleu"].of([0])["bleu_1"] == pytest.approx(3 / 4)
    assert found["char_bleu"].of([0])["char_bleu_1"] == pytest.approx(5 / 7)
    assert found["char_bleu"].of([1])["char_bleu_4"] == pytest.approx(1)


def test_values_are_those_of_the_package_itself(no_java):
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    references = [
        ["a red bus on a street", "a bus"],
        ["two cats sleep on a sofa", "cats"],
        ["a man", "one man with hat"],
    ]
    answers = ["a red bus drives on the street", "two dogs sleep", "a man with a hat and a bag"]
    known, given = dict(enumerate(references)), {number: [answer] for number, answer in enumerate(answers)}
    found = values(references, answers)
    bleu, _ = Bleu(4).compute_score(known, given, verbose=0)
    assert [found[f"bleu_{n}"] for n in range(1, 5)] == pytest.approx(bleu)
    assert found["rouge_l"] == pytest.approx(Rouge().compute_score(known, given)[0])
    assert found["cider_d"] == pytest.approx(Cider().compute_score(known, given)[0])


def test_the_report_says_how_words_were_found(monkeypatch, capfd):
    references, answers = [["It isn't a dog.", "x"], ["A cat"]], ["A\u2028dog", ""]
    monkeypatch.setattr(captions.shutil, "which", lambda name: None)
    assert "not comparable" in scored(references, answers)["bleu"].variant
    monkeypatch.undo()
    if shutil.which("java") is None:
        pytest.skip("Java is not installed")
    words, (given, known) = captions._english(references, answers)
    assert words == captions.PTB
    assert capfd.readouterr().err == ""
    assert (given, known) == (["a dog", ""], [["it is n't a dog", "x"], ["a cat"]])


def test_a_tokenizer_that_fails_is_said(monkeypatch, caplog):
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    monkeypatch.setattr(captions.shutil, "which", lambda name: "/usr/bin/java")
    monkeypatch.setattr(PTBTokenizer, "tokenize", lambda self, texts: {})
    assert "not comparable" in scored([["a dog"]], ["a dog"])["bleu"].variant
    assert "PTB tokenizer does not work" in caplog.text


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "jieba", None)
    items = [Item(Question(n, (), "?"), (text,)) for n, text in enumerate(CHINESE)]
    with pytest.raises(ModuleNotFoundError, match=r"jieba.*evaluation-requirements\.txt"):
        check_families(items, ["bleu"])
