"""Answers that exist already, of any model: lines of `{"id", "answer"}`, or the published forms of results."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dataprocess.messages import format_count, shorten

from .files import read_json
from .items import Item, QuestionSet

logger = logging.getLogger(__name__)

_ID = ("id", "question_id", "questionId", "image_id")
_ANSWER = ("answer", "caption", "prediction", "text")
"""The names that a results file may give them: ours, VQA's, GQA's, COCO's; LLaVA calls an answer `text`."""


def read_answers(paths: Sequence[Path], sets: Sequence[QuestionSet], items: Sequence[Item]) -> list[str | None]:
    """Return one answer for each question, None where the file says that there is none.

    Args:
        paths: one file, or one for each file of questions, in their order.
        sets: the files of questions.
        items: all their questions together.

    Raises:
        ValueError: for a file that is not of that form, an id that is there twice, or a question without a line.
    """
    if len(paths) == 1:
        return _pick(paths[0], [item.question.id for item in items])
    if len(paths) != len(sets):
        given = f"{len(paths)} files for {format_count(len(sets), 'file')} of questions"
        raise ValueError(f"--answers: {given}; give one file, or one for each")
    pairs = zip(paths, sets, strict=True)
    return [answer for path, one in pairs for answer in _pick(path, [item.question.id for item in one.items])]


def _pick(path: Path, ids: Sequence[str | int]) -> list[str | None]:
    answers = _read(path)
    missing = [index for index in ids if str(index) not in answers]
    if missing:
        lack = f"{format_count(len(missing), 'question')} of {len(ids):,} without an answer"
        raise ValueError(f"--answers {path}: {lack}, the first has the id {shorten(missing[0], 40)}; complete the file")
    if len(answers) > len(ids):
        surplus = format_count(len(answers) - len(ids), "answer belongs", "answers belong")
        logger.warning("%s: %s to no question", path, surplus)
    return [answers[str(index)] for index in ids]


def _read(path: Path) -> dict[str, str | None]:
    value = read_json(path, "--answers")
    records: list[Any] = value if isinstance(value, list) else [value]
    answers: dict[str, str | None] = {}
    for number, record in enumerate(records, start=1):
        keys = record.keys() if isinstance(record, dict) else ()
        index = next((record[name] for name in _ID if name in keys), None)
        answer = next((record[name] for name in _ANSWER if name in keys), None)
        answer = None if "error" in keys and not answer else answer
        is_answer = isinstance(answer, str) or "error" in keys
        if isinstance(index, bool) or not isinstance(index, str | int) or not is_answer:
            raise ValueError(
                f'--answers {path}, record {number}: got {shorten(record, 60)}; expected {{"id": …, "answer": "…"}}'
            )
        if str(index) in answers:
            raise ValueError(f"--answers {path}, record {number}: the id {shorten(index, 40)} occurs twice")
        answers[str(index)] = answer
    return answers
