"""Metrics as functions of sums: each question gives a row of numbers, and a value is computed from their sums.

So the value of any part of the questions, and of any resample of them, is one sum away. Shape legend: Q questions,
S numbers of a question; `...` stands for resamples, if there are any.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dataprocess.messages import format_count

from .captions import (
    CAPTION_METRICS,
    are_chinese,
    caption_statistics,
    check_captions,
    is_chinese,
    mean_rows,
    mean_values,
)
from .items import Item, QuestionSet
from .vqa_rules import vqa_accuracy

logger = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]
Values = dict[str, Array]

_POPE = ("accuracy", "precision", "recall", "f1", "yes_share")
FAMILIES = ("vqa_accuracy", "exact_match", "pope", *CAPTION_METRICS)
_VALUES = {"pope": [f"pope_{name}" for name in _POPE], "bleu": [f"bleu_{n}" for n in range(1, 5)]}
"""The values of families that have several; the others have one of their own name."""
NAMES = {
    **{name: (name,) for name in FAMILIES},
    **{name: (family,) for family, names in _VALUES.items() for name in names},
    "captions": CAPTION_METRICS,
}
"""The names that --metrics takes, and the families that each stands for."""
_BY_SOURCE = {
    "vqav2": ["vqa_accuracy"],
    "pope": ["pope"],
    "gqa": ["exact_match"],
    "coco": list(CAPTION_METRICS),
    "ai_challenger": list(CAPTION_METRICS),
}
_SHORT = 3  # words, or twice as many Chinese characters
VARIANTS = {
    "vqa_accuracy": "VQA accuracy by the official rule, mean over leave-one-out (visualqa.org/evaluation.html)",
    "exact_match": "share of answers that equal a reference, but for white space at the ends",
    "pope": 'POPE by its official reading of an answer: up to the first ".", without commas; "No", "not" or "no" among '
    "its words means no, everything else yes (github.com/AoiDragon/POPE)",
}


@dataclass(frozen=True)
class Scored:
    """A family of metrics over the questions that it is defined for."""

    family: str
    main: str  # the name of the value that a question is judged by
    rows: list[int]  # positions of those questions
    statistics: Array  # (Q, S)
    values: Callable[[Array], Values]  # (..., S) -> name: (...)
    variant: str

    @property
    def total(self) -> dict[str, float]:
        """Return the values over all questions."""
        return self.of(range(len(self.rows)))

    def of(self, chosen: Sequence[int]) -> dict[str, float]:
        """Return the values over some of the rows."""
        return {name: float(value) for name, value in self.values(self.statistics[list(chosen)].sum(0)).items()}

    @functools.cached_property
    def each(self) -> list[float]:
        """Return the main value of every question alone, (Q,)."""
        return [float(value) for value in self.values(self.statistics)[self.main]]


def choose_families(names: Sequence[str], sets: Sequence[QuestionSet], items: Sequence[Item]) -> list[str]:
    """Return the families that `--metrics` names, in their fixed order; `auto` decides by the file.

    Raises:
        ValueError: for a name that is not known.
    """
    unknown = [name for name in names if name != "auto" and name not in NAMES]
    if unknown:
        raise ValueError(f"--metrics {unknown[0]}: not known; choose from auto, {', '.join(NAMES)}")
    chosen = {family for name in names if name != "auto" for family in NAMES[name]}
    if "auto" in names:
        chosen |= set(_BY_SOURCE.get(sets[0].source) or _fitting(items))
    return [family for family in FAMILIES if family in chosen]


def _fitting(items: Sequence[Item]) -> list[str]:
    """Choose for questions of our own form: by how many references there are, and how long they are."""
    texts = [text for item in items for text in item.references]
    if sum(map(_is_short, texts)) < 0.9 * len(texts):
        return list(CAPTION_METRICS)
    if all(len(item.references) == 10 for item in items):
        return ["vqa_accuracy", "exact_match"]
    return ["exact_match", "pope"] if all(_label(item) is not None for item in items) else ["exact_match"]


def _is_short(text: str) -> bool:
    return len(text.split()) <= _SHORT and (not is_chinese(text) or len(text) <= 2 * _SHORT)


def check_families(items: Sequence[Item], families: Sequence[str]) -> None:
    """Refuse a family that is defined for none of the questions, or whose packages are missing; log what is left out.

    Raises:
        ValueError: if there is such a family.
        ModuleNotFoundError: if a package is missing.
    """
    if "vqa_accuracy" in families and not _rows("vqa_accuracy", items):
        raise ValueError("--metrics vqa_accuracy: no question has several references; choose another metric")
    if "pope" in families and not _rows("pope", items):
        raise ValueError('--metrics pope: no question has the reference "yes" or "no"; choose another metric')
    if set(families) & set(CAPTION_METRICS):
        check_captions([text for item in items for text in item.references])
    for family in families:
        number = len(_rows(family, items))
        if number < len(items):
            logger.warning("%s: over %s of %d", family, format_count(number, "question"), len(items))
    few = sum(1 < len(item.references) < 4 for item in items)
    if "vqa_accuracy" in families and few:
        said = format_count(few, "question has", "questions have")
        logger.warning("vqa_accuracy: %s fewer than four references, so that no answer reaches 1", said)


def _rows(family: str, items: Sequence[Item]) -> list[int]:
    """Return the positions of the questions that a family is defined for."""
    if family == "vqa_accuracy":
        return [at for at, item in enumerate(items) if len(item.references) > 1]
    if family == "pope":
        return [at for at, item in enumerate(items) if _label(item) is not None]
    return list(range(len(items)))


def score(items: Sequence[Item], answers: Sequence[str | None], families: Sequence[str]) -> list[Scored]:
    """Score answers, each family over the questions that it is defined for; see `check_families`.

    None is a missing answer, which is wrong, whatever an empty one would be.
    """
    makers = {"vqa_accuracy": _vqa, "exact_match": _exact, "pope": _pope}
    found = [makers[family](items, answers) for family in families if family in makers]
    captions = [family for family in families if family in CAPTION_METRICS]
    if captions:
        texts = [item.references for item in items]
        for statistics in caption_statistics(texts, [answer or "" for answer in answers], captions):
            found.append(Scored(rows=list(range(len(items))), **statistics))
    return found


def value_names(items: Sequence[Item], families: Sequence[str]) -> list[str]:
    """Return the names of the values that `score` gives, but for those of single splits of POPE."""
    names = [name for family in families for name in _VALUES.get(family, [family])]
    captions = {name for name in names if NAMES[name][0] in CAPTION_METRICS}
    if captions and are_chinese([text for item in items for text in item.references]):
        names += [f"char_{name}" for name in names if name in captions]
    return names


def _vqa(items: Sequence[Item], answers: Sequence[str | None]) -> Scored:
    rows = _rows("vqa_accuracy", items)
    pairs = [(answers[at], items[at].references) for at in rows]
    scores = [0.0 if answer is None else vqa_accuracy(answer, references) for answer, references in pairs]
    return _mean("vqa_accuracy", rows, scores)


def _exact(items: Sequence[Item], answers: Sequence[str | None]) -> Scored:
    hits = []
    for item, answer in zip(items, answers, strict=True):
        hits.append(float(answer is not None and answer.strip() in {text.strip() for text in item.references}))
    return _mean("exact_match", _rows("exact_match", items), hits)


def _mean(family: str, rows: list[int], scores: list[float]) -> Scored:
    return Scored(family, family, rows, mean_rows(scores), functools.partial(mean_values, family), VARIANTS[family])


def says_yes(answer: str) -> bool:
    """Read an answer as POPE's official program does."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return not {"No", "not", "no"} & set(words)


def _label(item: Item) -> str | None:
    """Return the one label that all references give, yes or no; None if they give another or both."""
    labels = {text.strip().lower() for text in item.references}
    return labels.pop() if labels in ({"yes"}, {"no"}) else None


def _pope(items: Sequence[Item], answers: Sequence[str | None]) -> Scored:
    rows = _rows("pope", items)
    splits = sorted({items[at].split for at in rows})
    statistics = np.zeros((len(rows), len(splits), 4))  # true and false yes, true and false no
    for number, at in enumerate(rows):
        answer, should = answers[at], _label(items[at]) == "yes"
        is_yes = says_yes(answer) if answer is not None else not should  # a missing one counts as the wrong one
        statistics[number, splits.index(items[at].split), (0 if should else 1) if is_yes else (3 if should else 2)] = 1
    values = functools.partial(pope_values, splits)
    return Scored("pope", "pope_accuracy", rows, statistics.reshape(len(rows), -1), values, VARIANTS["pope"])


def pope_values(splits: Sequence[str], sums: Array) -> Values:
    """Return POPE's five values from (..., 4 per split); with several splits, the means and each split's own.

    A share of nothing is 0; a split without a question does not count, and its own values are NaN.
    """
    counts = sums.reshape(*sums.shape[:-1], len(splits), 4)
    yes, wrong_yes, no, wrong_no = (counts[..., k] for k in range(4))  # (..., splits)
    total = counts.sum(-1)
    precision, recall = _share(yes, yes + wrong_yes), _share(yes, yes + wrong_no)
    found = {
        "accuracy": _share(yes + no, total),
        "precision": precision,
        "recall": recall,
        "f1": _share(2 * precision * recall, precision + recall),
        "yes_share": _share(yes + wrong_yes, total),
    }
    there = (total > 0).sum(-1)
    values = {f"pope_{name}": value.sum(-1) / there for name, value in found.items()}
    if len(splits) > 1:
        parts = [(number, split or "other") for number, split in enumerate(splits)]
        known = {name: np.where(total > 0, value, np.nan) for name, value in found.items()}
        values |= {f"pope_{split}_{name}": known[name][..., number] for number, split in parts for name in _POPE}
    return values


def _share(part: Array, whole: Array) -> Array:
    return np.divide(part, whole, out=np.zeros(np.shape(part)), where=whole > 0)
