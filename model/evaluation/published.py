"""Published files of questions as they are: VQAv2, POPE, GQA, COCO captions, AI Challenger captions.

VQAv2          {"questions": [{"question_id", "image_id", "question"}, …], "data_subtype": "val2014"}, and
               {"annotations": [{"question_id", "answer_type", "answers": [{"answer"}, …]}, …]}
POPE           a line each: {"question_id", "image", "text", "label"}
GQA            {question id: {"imageId", "question", "answer", "types": {"structural"}}, …}
COCO           {"images": [{"id", "file_name"}, …], "annotations": [{"image_id", "caption"}, …]}
AI Challenger  [{"image_id": file name, "caption": [five sentences]}, …]
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataprocess.ai_challenger import PROMPTS
from dataprocess.messages import format_count, shorten

from ..asking.question_file import Question, resolve_picture
from .files import read_json
from .items import Item, QuestionSet, read_own, split_of, with_suffix

logger = logging.getLogger(__name__)

_KNOWN = 'lines of {"id", "image", "prompt", "answers"}, VQAv2, POPE, GQA, COCO captions, AI Challenger captions'


@dataclass(frozen=True)
class Reading:
    """Settings for reading files of questions."""

    annotations: Path | None = None
    """VQAv2's answers, which are in a file of their own."""
    image_folder: Path | None = None
    """The folder of the pictures; by default next to the file of questions."""
    prompt: str | None = None
    """The question about pictures whose files hold no questions."""
    suffix: str = ""
    """Added to every question, after a line break."""


def read_file(path: Path, reading: Reading) -> QuestionSet:
    """Read a file of questions of any known form.

    Raises:
        ValueError: for a file of another form, or a record that is incomplete.
    """
    value = read_json(path, "--questions")
    source, records = _tell(value, path)
    if reading.prompt is not None and source not in ("coco", "ai_challenger"):
        raise ValueError(f"--prompt: {path} brings its own questions; leave it out, or use --prompt_suffix")
    if (source == "vqav2") != (reading.annotations is not None):
        raise ValueError(
            f"--questions {path}: VQAv2 needs --annotations FILE, which holds its answers"
            if source == "vqav2"
            else f"--annotations {reading.annotations}: {path} is not VQAv2 and brings its own answers; leave it out"
        )
    if source == "questions":
        own = read_own(path, reading.image_folder, records)
        return QuestionSet(source, own.name, [with_suffix(item, reading.suffix) for item in own.items])
    folder = reading.image_folder or path.parent
    maker = {"vqav2": _vqav2, "pope": _pope, "gqa": _gqa, "coco": _coco, "ai_challenger": _ai_challenger}[source]
    items = []
    try:
        for item in maker(records, path, reading):
            images = tuple(
                Path(folder, image) if reading.image_folder else resolve_picture(str(image), folder)
                for image in item.question.images
            )
            question = dataclasses.replace(item.question, id=_id(item.question.id), images=images)
            _text(question.prompt)
            if not item.references:
                raise TypeError("there is no answer")
            items.append(with_suffix(dataclasses.replace(item, question=question), reading.suffix))
    except (KeyError, TypeError, AttributeError) as error:
        number = len(items) + 1
        why = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"--questions {path}: record {number} is not as {source} has them: {why}") from error
    if not items:
        raise ValueError(f"--questions {path}: there is no question with an answer in it")
    return QuestionSet(source, path.stem, items)


def _tell(value: Any, path: Path) -> tuple[str, Any]:
    """Return the source of a file by its content, and its records."""
    if isinstance(value, dict):
        if isinstance(value.get("questions"), list):
            return "vqav2", value
        if "annotations" in value and "images" in value:
            return "coco", value
        if "annotations" in value:
            raise ValueError(f"--questions {path}: this is a file of answers; give it with --annotations")
        first = next(iter(value.values()), None)
        if isinstance(first, dict) and {"imageId", "question"} <= first.keys():
            return "gqa", value
        value = [value]  # a file of one line
    first = value[0] if isinstance(value, list) and value else None
    if isinstance(first, dict):
        if "prompt" in first or "answers" in first:
            return "questions", value
        if {"text", "label"} <= first.keys():
            return "pope", value
        if {"image_id", "caption"} <= first.keys():
            return "ai_challenger", value
    begin = shorten(first if value and isinstance(value, list) else value, 60)
    raise ValueError(f"--questions {path}: not a known form, it begins with {begin}; expected {_KNOWN}")


def _vqav2(value: Any, path: Path, reading: Reading) -> Iterator[Item]:
    answers = _vqav2_answers(reading.annotations or path)
    missing = [record["question_id"] for record in value["questions"] if record["question_id"] not in answers]
    if missing:
        lack = format_count(len(missing), "question has", "questions have")
        first = shorten(missing[0], 40)
        raise ValueError(f"--annotations {reading.annotations}: {lack} no answers there, the first is {first}")
    for record in value["questions"]:
        found = answers[record["question_id"]]
        image = Path(f"COCO_{value['data_subtype']}_{record['image_id']!s:0>12}.jpg")
        further = {key: found.get(key, "") for key in ("question_type", "answer_type")}
        question = Question(record["question_id"], (image,), record["question"], further)
        yield Item(question, tuple(_text(answer["answer"]) for answer in found["answers"]), str(further["answer_type"]))


def _vqav2_answers(path: Path) -> dict[Any, Any]:
    value = read_json(path, "--annotations")
    if not isinstance(value, dict) or not isinstance(value.get("annotations"), list):
        raise ValueError(f'--annotations {path}: expected VQAv2\'s {{"annotations": [...]}}')
    answers: dict[Any, Any] = {}
    for number, record in enumerate(value["annotations"], start=1):
        index = record.get("question_id") if isinstance(record, dict) else None
        if not isinstance(index, str | int):
            raise ValueError(f"--annotations {path}, record {number}: no question_id in {shorten(record, 60)}")
        if index in answers:
            raise ValueError(f"--annotations {path}, record {number}: the id {shorten(index, 40)} occurs twice")
        answers[index] = record
    return answers


def _pope(records: Any, path: Path, reading: Reading) -> Iterator[Item]:
    split = split_of(path)
    for record in records:
        question = Question(record["question_id"], (Path(_text(record["image"])),), _text(record["text"]))
        yield Item(question, (_text(record["label"]),), split, split)


def _gqa(value: Any, path: Path, reading: Reading) -> Iterator[Item]:
    for index, record in value.items():
        types = record.get("types") or {}
        question = Question(index, (Path(f"{record['imageId']}.jpg"),), _text(record["question"]), {"types": types})
        yield Item(question, (_text(record["answer"]),), str(types.get("structural") or ""))


def _coco(value: Any, path: Path, reading: Reading) -> Iterator[Item]:
    captions: dict[Any, list[str]] = {}
    for record in value["annotations"]:
        captions.setdefault(record["image_id"], []).append(_text(record["caption"]))
    pictures = [(record["id"], record["file_name"], captions.get(record["id"], [])) for record in value["images"]]
    yield from _captioned(pictures, reading.prompt or "Describe the image in one sentence.", path)


def _ai_challenger(records: Any, path: Path, reading: Reading) -> Iterator[Item]:
    pictures = [(record["image_id"], record["image_id"], record["caption"]) for record in records]
    yield from _captioned(pictures, reading.prompt or PROMPTS[0], path)


def _captioned(pictures: Iterable[tuple[Any, str, list[str]]], prompt: str, path: Path) -> Iterator[Item]:
    without = 0
    for index, name, captions in pictures:
        if not isinstance(captions, list):
            raise TypeError(f"expected a list of captions, got {shorten(captions, 40)}")
        usable = tuple(caption for caption in map(_text, captions) if caption.strip())
        without += not usable
        if usable:
            yield Item(Question(index, (Path(_text(name)),), prompt), usable)
    if without:
        logger.warning("%s: left out: %s no caption", path, format_count(without, "picture has", "pictures have"))


def _id(value: Any) -> str | int:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise TypeError(f"expected an id, got {shorten(value, 40)}")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected text, got {shorten(value, 40)}")
    return value
