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
        return _pick(paths[0], items)
    if len(paths) != len(sets):
        given = f"{len(paths)} files for {format_count(len(sets), 'file')} of questions"
        raise ValueError(f"--answers: {given}; give one file, or one for each")
    return [answer for path, one in zip(paths, sets, strict=True) for answer in _pick(path, one.items)]


def _pick(path: Path, items: Sequence[Item]) -> list[str | None]:
    value = read_json(path, "--answers")
    records: list[Any] = value if isinstance(value, list) else [value]
    if records and all(map(_is_popes, records)):
        return _in_order(path, records, items)
    answers: dict[str, str | None] = {}
    for number, record in enumerate(records, start=1):
        index = next((record[name] for name in _ID if name in record), None) if isinstance(record, dict) else None
        if isinstance(index, bool) or not isinstance(index, str | int):
            raise _refusal(path, number, record)
        if str(index) in answers:
            raise ValueError(f"--answers {path}, record {number}: the id {shorten(index, 40)} occurs twice")
        answers[str(index)] = _answer(path, number, record)
    # AI Challenger's questions name a picture with its extension, its results without.
    ids = [item.question.id for item in items]
    keys = [str(index) if str(index) in answers else str(index).removesuffix(".jpg") for index in ids]
    missing = [index for index, key in zip(ids, keys, strict=True) if key not in answers]
    if missing:
        lack = f"{format_count(len(missing), 'question')} of {len(ids):,} without an answer"
        raise ValueError(f"--answers {path}: {lack}, the first has the id {shorten(missing[0], 40)}; complete the file")
    if len(answers) > len(ids):
        surplus = format_count(len(answers) - len(ids), "answer belongs", "answers belong")
        logger.warning("%s: %s to no question", path, surplus)
    return [answers[key] for key in keys]


def _is_popes(record: Any) -> bool:
    return isinstance(record, dict) and "question" in record and not record.keys() & set(_ID)


def _in_order(path: Path, records: Sequence[Any], items: Sequence[Item]) -> list[str | None]:
    """Return the answers of a file in POPE's form, which has no ids: line for line, in the order of the questions."""
    if len(records) != len(items):
        raise ValueError(f"--answers {path}: {len(records):,} answers without ids, for {len(items):,} questions")
    for number, (record, item) in enumerate(zip(records, items, strict=True), start=1):
        asked = str(record["question"]).strip()
        if not item.question.prompt.lower().startswith(asked.lower()):
            got = f"{shorten(asked, 60)}, expected {shorten(item.question.prompt, 60)}"
            raise ValueError(f"--answers {path}, record {number}: got the question {got}; the order must be the same")
    return [_answer(path, number, record) for number, record in enumerate(records, start=1)]


def _answer(path: Path, number: int, record: Any) -> str | None:
    answer = next((record[name] for name in _ANSWER if name in record), None)
    if "error" in record and not answer:
        return None
    if not isinstance(answer, str):
        raise _refusal(path, number, record)
    return answer


def _refusal(path: Path, number: int, record: Any) -> ValueError:
    return ValueError(
        f'--answers {path}, record {number}: got {shorten(record, 60)}; expected {{"id": …, "answer": "…"}}'
    )
