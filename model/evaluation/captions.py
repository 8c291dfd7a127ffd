"""Metrics of captions by pycocoevalcap: BLEU, ROUGE-L and CIDEr-D over words, for Chinese over characters too."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
logger = logging.getLogger(__name__)

CAPTION_METRICS = ("bleu", "rouge_l", "cider_d")
PTB = "words of the PTB tokenizer, as papers have them"
PLAIN = "words in lower case without punctuation (Java is missing: not comparable with papers, which use the PTB \
tokenizer)"
JIEBA = "words of jieba, as AI Challenger scores captions"
CHARACTERS = "characters"
_N = 4  # BLEU and CIDEr-D count up to four words in a row
_INSTALL = "pip install -r evaluation-requirements.txt"

Tokenized = tuple[list[str], list[list[str]]]
"""Answers, and references of each, as words between spaces."""


def is_chinese(text: str) -> bool:
    """Return whether a text has a Chinese character."""
    return re.search(r"[\u3400-\u9fff\uf900-\ufaff]", text) is not None


def check_captions(references: Sequence[str]) -> None:
    """Refuse references without a word, and a missing package that captions in their language need."""
    if not any(re.search(r"\w", text) for text in references):
        raise ValueError("--metrics: captions need words, and no reference has one; choose another metric")
    _import("pycocoevalcap.bleu.bleu_scorer")
    if are_chinese(references):
        _import("jieba")


def are_chinese(texts: Sequence[str]) -> bool:
    """Return whether most texts are Chinese, so that characters are counted as well as words."""
    return 2 * sum(map(is_chinese, texts)) > len(texts)


def caption_statistics(
    references: Sequence[Sequence[str]], answers: Sequence[str], families: Sequence[str]
) -> list[dict[str, Any]]:
    """Return what `Scored` needs for each family: of words, and for Chinese of characters as well.

    An answer without a word, such as "..." or a missing one, scores 0 in ROUGE-L and CIDEr-D; in BLEU it adds nothing
    but its references' length.

    Raises:
        ModuleNotFoundError: if pycocoevalcap or jieba is missing.
        ValueError: if no reference has a word.
    """
    texts = [text for group in references for text in group]
    kinds: dict[str, tuple[str, Tokenized]] = {}
    if are_chinese(texts):
        kinds[""] = (JIEBA, _apply(_jieba_words(), references, answers))
        kinds["char_"] = (CHARACTERS, _apply(_characters, references, answers))
    else:
        kinds[""] = _english(references, answers)
    makers = {"bleu": _bleu, "rouge_l": _rouge_l, "cider_d": _cider_d}
    found = []
    for prefix, (words, (hypotheses, known)) in kinds.items():
        if not any(text for group in known for text in group):
            raise ValueError("captions: no reference has a word in it; choose another metric")
        for family in families:
            made: dict[str, Any] = makers[family](prefix, hypotheses, known)
            found.append({**made, "family": prefix + family, "variant": f"{made['variant']}; {words}"})
    return found


# ---- Words


def _apply(split: Callable[[str], str], references: Sequence[Sequence[str]], answers: Sequence[str]) -> Tokenized:
    return [split(text) for text in answers], [[split(text) for text in group] for group in references]


def _jieba_words() -> Callable[[str], str]:
    jieba = _import("jieba")
    jieba.setLogLevel(logging.WARNING)
    return lambda text: " ".join(" ".join(jieba.cut(text.strip().replace("。", ""))).split())


def _characters(text: str) -> str:
    return " ".join("".join(text.replace("。", "").split()))


def _plain_words(text: str) -> str:
    return " ".join(re.findall(r"\w+(?:['’-]\w+)*", text.lower()))


def _english(references: Sequence[Sequence[str]], answers: Sequence[str]) -> tuple[str, Tokenized]:
    if shutil.which("java"):
        tokenizer = _import("pycocoevalcap.tokenizer.ptbtokenizer").PTBTokenizer()
        # The tokenizer works line by line, so that no text may hold anything that it takes for a line's end.
        groups = {0: [{"caption": " ".join(text.split())} for text in answers]}
        groups |= {
            number: [{"caption": " ".join(text.split())} for text in group]
            for number, group in enumerate(references, start=1)
        }
        with contextlib.suppress(OSError), _quiet():  # it writes into its own folder
            words = tokenizer.tokenize(groups)
            if all(len(words.get(number, [])) == len(group) for number, group in groups.items()):
                return PTB, (words[0], [words[number] for number in range(1, len(groups))])
        logger.warning("captions: Java is found, but the PTB tokenizer does not work; plain words are compared instead")
    return PLAIN, _apply(_plain_words, references, answers)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what a started program writes to stderr away: the tokenizer reports its speed."""
    before, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(nowhere)


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = name.split(".")[0]
        raise ModuleNotFoundError(
            f"--metrics: captions need the package {package}, which is missing: {_INSTALL}"
        ) from error


# ---- Metrics


def _bleu(prefix: str, answers: list[str], references: list[list[str]]) -> dict[str, Any]:
    scorer = _import("pycocoevalcap.bleu.bleu_scorer").BleuScorer(n=_N)
    for answer, known in zip(answers, references, strict=True):
        scorer += (answer, known)
    rows = []
    for counts in scorer.ctest:
        length = counts["testlen"]
        closest = min((abs(known - length), known) for known in counts["reflen"])[1]
        rows.append([*counts["correct"], *counts["guess"], length, closest])
    return {
        "main": f"{prefix}bleu_4",
        "statistics": np.array(rows, dtype=float),  # (Q, 10)
        "values": functools.partial(bleu_values, prefix),
        "variant": "corpus BLEU, closest reference length, without smoothing (pycocoevalcap)",
    }


def bleu_values(prefix: str, sums: Array) -> dict[str, Array]:
    """Return BLEU-1 to BLEU-4 from sums (..., 10): right and given n-grams, length, closest reference length."""
    small, tiny = 1e-9, 1e-15  # as pycocoevalcap has them
    precisions = (sums[..., :_N] + tiny) / (sums[..., _N : 2 * _N] + small)
    ratio = (sums[..., -2] + tiny) / (sums[..., -1] + small)
    penalty = np.exp(np.minimum(0, 1 - 1 / ratio))
    means = np.cumprod(precisions, axis=-1) ** (1 / np.arange(1, _N + 1))
    return {f"{prefix}bleu_{n}": means[..., n - 1] * penalty for n in range(1, _N + 1)}


def _rouge_l(prefix: str, answers: list[str], references: list[list[str]]) -> dict[str, Any]:
    scorer = _import("pycocoevalcap.rouge.rouge").Rouge()
    pairs = zip(answers, references, strict=True)
    scores = [scorer.calc_score([answer], known) if answer else 0.0 for answer, known in pairs]
    return _mean(f"{prefix}rouge_l", scores, "ROUGE-L, F with beta 1.2, best reference (pycocoevalcap)")


def _cider_d(prefix: str, answers: list[str], references: list[list[str]]) -> dict[str, Any]:
    cider = _import("pycocoevalcap.cider.cider").Cider()
    numbers = range(len(answers))
    with contextlib.redirect_stdout(io.StringIO()):
        _, scores = cider.compute_score(dict(enumerate(references)), {number: [answers[number]] for number in numbers})
    said = "CIDEr-D, 10 at most, document frequencies of these references, also in the intervals (pycocoevalcap)"
    return _mean(f"{prefix}cider_d", list(scores), said)


def _mean(name: str, scores: list[float], variant: str) -> dict[str, Any]:
    values = functools.partial(mean_values, name)
    return {"main": name, "statistics": mean_rows(scores), "values": values, "variant": variant}


def mean_rows(scores: Sequence[float]) -> Array:
    """Return the rows (Q, 2) whose sums give a mean: scores, and ones."""
    return np.stack([np.asarray(scores, dtype=float), np.ones(len(scores))], axis=-1)


def mean_values(name: str, sums: Array) -> dict[str, Array]:
    """Return a mean from the sums (..., 2) of scores and of ones."""
    return {name: sums[..., 0] / sums[..., 1]}
