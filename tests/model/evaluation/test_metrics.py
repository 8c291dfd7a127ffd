"""POPE, exact match, values by kind and split, intervals and differences, on numbers computed by hand."""

from __future__ import annotations

import numpy as np
import pytest

from model.asking.question_file import Question
from model.evaluation.intervals import differences, intervals
from model.evaluation.items import Item, QuestionSet
from model.evaluation.metrics import check_families, choose_families, says_yes, score, value_names


def item(number: int, *references: str, split: str = "", kind: str = "") -> Item:
    return Item(Question(number, (), "?"), references, kind, split)


def metrics(items, answers, *families: str) -> dict[str, float]:
    return {name: value for one in score(items, answers, families) for name, value in one.total.items()}


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Yes", True),
        ("", True),
        ("No", False),
        ("No, there is not.", False),
        ("There is no dog", False),
        ("It is not", False),
        ("Yes. There is no cat.", True),  # the first sentence only
        ("NO", True),  # as the official program has it
        ("Nothing", True),
        ("no\n", True),  # words are split at spaces alone
        (",no", False),
        ("no,", False),
        ("No!", True),  # only commas and what follows a full stop are taken away
        ("There isn't a dog", True),  # a contraction is another word
        ("Zero dogs", True),
        ("A no", False),
    ],
)
def test_pope_reads_an_answer_as_the_official_program(answer, expected):
    assert says_yes(answer) is expected


def test_pope_by_hand():
    items = [item(n, label) for n, label in enumerate(["yes"] * 4 + ["no"] * 6)]
    answers = ["Yes", "yes", "Yes", "No", "yes", "no", "No", "no.", "not at all", "yes"]
    # yes to "yes": 3, yes to "no": 2, no to "no": 4, no to "yes": 1
    found = metrics(items, answers, "pope")
    expected = {"accuracy": 0.7, "precision": 3 / 5, "recall": 3 / 4, "f1": 2 / 3, "yes_share": 0.5}
    assert found == pytest.approx({f"pope_{name}": value for name, value in expected.items()})


@pytest.mark.parametrize("references", [["yes", "no"], list("abcdefghij"), ["yes", "yes", "maybe"]])
def test_pope_needs_references_that_agree(references):
    assert score([item(0, *references), item(1, "Yes", " yes")], ["yes", "yes"], ["pope"])[0].rows == [1]


def test_pope_of_several_splits_is_their_mean():
    items = [item(0, "yes", split="random"), item(1, "no", split="random"), item(2, "no", split="popular")]
    found = metrics(items, ["Yes", "No", "Yes"], "pope")
    assert found["pope_random_f1"] == 1.0
    assert found["pope_popular_f1"] == found["pope_popular_precision"] == 0.0  # a share of nothing is 0
    assert found["pope_f1"] == 0.5
    assert found["pope_accuracy"] == 0.5  # of the splits, not of the questions
    assert found["pope_yes_share"] == pytest.approx((1 / 2 + 1) / 2)


@pytest.mark.parametrize("label", ["yes", "no", ""])
def test_a_missing_answer_is_wrong_in_every_metric(label):
    """Even where an empty answer would be right: POPE takes it for "yes", and a reference may be empty."""
    items = [item(n, *[label] * 4) for n in range(2)]
    families = ["vqa_accuracy", "exact_match", *(["pope"] if label else [])]
    missing, right = score(items, [None, None], families), score(items, [label, None], families)
    assert [one.each for one in missing] == [[0.0, 0.0]] * len(families)
    assert [one.each for one in right] == [[1.0, 0.0]] * len(families)
    if label:
        values = metrics(items, [None, None], "pope")
        assert {values[f"pope_{name}"] for name in ("accuracy", "precision", "recall", "f1")} == {0.0}
        assert metrics(items, ["", ""], "pope")["pope_accuracy"] == (label == "yes")


def test_each_metric_counts_the_questions_that_it_is_defined_for(caplog):
    items = [item(0, "yes"), item(1, "two", "2", "2", "2"), item(2, "red")]  # "yes" alone is POPE's
    families = ["vqa_accuracy", "exact_match", "pope"]
    check_families(items, families)
    vqa, exact, pope = score(items, ["no", "2", " red\n"], families)
    assert (vqa.rows, exact.rows, pope.rows) == ([1], [0, 1, 2], [0])
    assert vqa.total["vqa_accuracy"] == pytest.approx((1 + 3 * 2 / 3) / 4)
    assert exact.total["exact_match"] == pytest.approx(2 / 3)
    assert exact.each == [0.0, 1.0, 1.0]
    assert "1 question of 3" in caplog.text
    for family in ("vqa_accuracy", "pope"):
        with pytest.raises(ValueError, match=family):
            check_families([item(0, "red")], [family])


def test_exact_match_is_exact():
    items = [item(n, "red", "dark red") for n in range(5)]
    assert metrics(items, ["red", " dark red ", "Red", "red.", ""], "exact_match") == {"exact_match": 0.4}


@pytest.mark.parametrize(
    ("source", "items", "expected"),
    [
        ("vqav2", [item(0, "a", "b")], ["vqa_accuracy"]),
        ("pope", [item(0, "yes")], ["pope"]),
        ("coco", [item(0, "yes")], ["bleu", "rouge_l", "cider_d"]),
        ("questions", [item(0, *["two"] * 10)], ["vqa_accuracy", "exact_match"]),
        ("questions", [item(0, "yes"), item(1, "no")], ["exact_match", "pope"]),
        ("questions", [item(0, "yes"), item(1, "红色")], ["exact_match"]),
        ("samples", [item(0, "A man plays a ball game.")], ["bleu", "rouge_l", "cider_d"]),
        ("samples", [item(0, "一个人在打篮球。")], ["bleu", "rouge_l", "cider_d"]),
    ],
)
def test_auto_chooses_by_the_file(source, items, expected):
    assert choose_families(["auto"], [QuestionSet(source, "", items)], items) == expected


def test_metrics_are_named_by_their_families_or_values():
    assert choose_families(["pope_f1", "bleu_3", "bleu_1"], [], []) == ["pope", "bleu"]
    assert choose_families(["captions", "exact_match"], [], []) == ["exact_match", "bleu", "rouge_l", "cider_d"]
    with pytest.raises(ValueError, match="vqa_acc"):
        choose_families(["vqa_acc"], [], [])


def test_interval_of_a_mean_is_that_of_the_binomial():
    items = [item(n, "yes") for n in range(400)]
    (one,) = score(items, ["yes"] * 100 + ["no"] * 300, ["exact_match"])
    low, high = intervals(one, seed=1)["exact_match"]
    half = 1.96 * np.sqrt(0.25 * 0.75 / 400)
    assert (low, high) == (pytest.approx(0.25 - half, abs=0.01), pytest.approx(0.25 + half, abs=0.01))
    assert intervals(one, seed=1) == intervals(one, seed=1)
    assert intervals(one, seed=2) != intervals(one, seed=1)


def test_the_interval_of_a_small_split_is_over_the_resamples_that_have_it():
    items = [item(0, "yes", split="popular"), *(item(n, "yes", split="random") for n in range(1, 9))]
    (one,) = score(items, ["yes"] * 9, ["pope"])
    assert intervals(one, seed=0)["pope_popular_accuracy"] == [1.0, 1.0]
    assert differences(one, one, seed=0)["pope_popular_f1"]["interval"] == [0.0, 0.0]


@pytest.mark.parametrize(
    ("items", "families"),
    [
        ([item(0, "yes"), item(1, "no")], ["exact_match", "pope"]),
        ([item(0, *"abcd")], ["vqa_accuracy"]),
        ([item(0, "A man plays a ball game.")], ["bleu", "rouge_l", "cider_d"]),
        ([item(0, "一个人在打篮球。")], ["bleu", "cider_d"]),
    ],
)
def test_values_are_known_by_name_before_there_are_answers(items, families):
    if "bleu" in families:
        pytest.importorskip("pycocoevalcap")
        pytest.importorskip("jieba")
    assert value_names(items, families) == list(metrics(items, ["yes"] * len(items), *families))


def test_a_difference_is_paired():
    """Two models that agree on all but ten questions differ by much less than two that are independent."""
    items = [item(n, "yes") for n in range(400)]
    base = (["yes", "no"] * 200)[:400]
    better = ["yes"] * 20 + base[20:]
    (first,), (second,) = (score(items, answers, ["exact_match"]) for answers in (base, better))
    found = differences(first, second, seed=0)["exact_match"]
    assert found["difference"] == pytest.approx(10 / 400)
    low, high = found["interval"]
    assert 0.005 < low < 0.025 < high < 0.045
    assert differences(first, first, seed=0)["exact_match"]["interval"] == [0.0, 0.0]
