"""Questions with reference answers: files of our own form, and several files together."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataprocess.messages import shorten

from ..asking.question_file import Question, make_questions
from .files import read_json

SPLITS = ("random", "popular", "adversarial")
"""POPE's, by how the objects that are not in the picture were chosen."""


@dataclass(frozen=True)
class Item:
    """A question and its reference answers."""

    question: Question
    references: tuple[str, ...]  # at least one
    kind: str = ""  # what the report's tables and filter group by
    split: str = ""  # POPE's, if it has one


@dataclass(frozen=True)
class QuestionSet:
    """The questions of one file."""

    source: str  # vqav2, pope, gqa, coco, ai_challenger, questions, samples
    name: str  # of the file, without its extension
    items: list[Item]


def with_suffix(item: Item, suffix: str) -> Item:
    """Return a question with a text added after a line break, if there is one to add."""
    if not suffix:
        return item
    question = dataclasses.replace(item.question, prompt=f"{item.question.prompt}\n{suffix}")
    return dataclasses.replace(item, question=question)


def read_own(path: Path, image_folder: Path | None = None, records: list[Any] | None = None) -> QuestionSet:
    """Read lines of `{"id": …, "image": …, "prompt": …, "answers": [...]}`, which may have further keys.

    Args:
        path: the file.
        image_folder: where relative image paths count from.
        records: what the file holds, if it was read already.
    """
    name, items = f"--questions {path}", []
    values = read_json(path, "--questions") if records is None else records
    values = values if isinstance(values, list) else [values]  # a file of one line
    places = [(f"{name}, record {at}", value) for at, value in enumerate(values, start=1)]
    for question in make_questions(places, name, path.parent, image_folder):
        references: Any = question.further.get("answers")
        references = [references] if isinstance(references, str) else references
        if not isinstance(references, list) or not references or not all(isinstance(text, str) for text in references):
            got = shorten(references, 40) if "answers" in question.further else "missing"
            raise ValueError(
                f'--questions {path}, question {shorten(question.id, 40)}: the answers are {got}; expected "answers": '
                "a list of the right answers, each of them text"
            )
        split = question.further.get("split") or question.further.get("category")
        kinds = [question.further.get(key) for key in ("kind", "category", "split")]
        kind = next((value for value in kinds if value not in (None, "")), "")
        known = split if isinstance(split, str) and ("split" in question.further or split in SPLITS) else ""
        items.append(Item(question, tuple(references), str(kind), known))
    return QuestionSet("questions", path.stem, items)


def split_of(path: Path) -> str:
    """Return POPE's split by the name of its file, the name itself for others."""
    found = re.search("|".join(SPLITS), path.stem)
    return found[0] if found else path.stem


def gather(sets: Sequence[QuestionSet]) -> list[Item]:
    """Return the questions of all sets; where ids occur in several, each begins with its set's split or name.

    Raises:
        ValueError: if the sets are of different sources, or ids are not unique within one.
    """
    if len({one.source for one in sets}) > 1:
        listed = ", ".join(f"{one.name} ({one.source})" for one in sets)
        raise ValueError(f"--questions: the files are of different forms: {listed}; evaluate them one by one")
    for one in sets:
        (name, times), *_ = Counter(str(item.question.id) for item in one.items).most_common(1)
        if times > 1:
            raise ValueError(f"--questions {one.name}: the id {name} occurs {times} times; ids must be unique")
    items = [item for one in sets for item in one.items]
    if len({str(item.question.id) for item in items}) == len(items):
        return items
    renamed = []
    for one in sets:
        for item in one.items:
            index = f"{item.split or one.name}/{item.question.id}"
            renamed.append(dataclasses.replace(item, question=dataclasses.replace(item.question, id=index)))
    if len({item.question.id for item in renamed}) < len(renamed):
        raise ValueError("--questions: two of the files have the same name and ids; give each file once")
    return renamed
