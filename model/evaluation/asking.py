"""Answers of a model, as `test.py --batch` gives them: in batches, resumable, on one process or several."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from dataprocess.messages import format_count

from ..asking.answer_file import digest, picture_stamp
from ..asking.assistant import Assistant, check_flags, load_assistant
from ..asking.batch_answers import complete_answers
from ..asking.question_file import Question
from ..device import has_accelerator
from .blind import blind_questions, number_kept
from .items import Item

logger = logging.getLogger(__name__)

PARTS = "parts"
"""Folder in the output folder; it holds the answers of each process, and is what a run resumes from."""
_FLAGS_OF_TEST_PY: dict[str, Any] = {
    "batch": "--questions",
    "prompt": None,
    "image_path": [],
    "stream": False,
    "do_sample": False,
    "temperature": None,
    "top_p": None,
    "top_k": None,
    "repetition_penalty": None,
}
"""Those that evaluate.py lacks: it takes the likeliest token each time."""


@dataclass(frozen=True)
class Answered:
    """The answers to all questions, in their order; None where there is none."""

    seeing: list[str | None]
    blind: list[str | None] | None
    errors: list[str]
    made_with: dict[str, Any]
    """All that the answers depend on: fingerprints of checkpoint and base models, settings."""


def ask(args: argparse.Namespace, items: Sequence[Item], output: Path, rank: int, world_size: int) -> Answered | None:
    """Answer the questions with the model that the flags name, each process its share.

    Args:
        args: the flags of evaluate.py.
        items: the questions, the same on every process.
        output: folder for the answers.
        rank: number of this process.
        world_size: number of processes.

    Returns:
        All answers on process 0, None on the others.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if world_size > 1 and args.device is None and has_accelerator():
        if local_rank >= torch.accelerator.device_count():
            found = format_count(torch.accelerator.device_count(), "GPU")
            raise ValueError(f"--device: {found} for {world_size} processes; start as many as GPUs, or name a device")
        torch.accelerator.set_device_index(local_rank)  # what `pick_device` then takes
    flags = argparse.Namespace(**{**vars(args), **_FLAGS_OF_TEST_PY, "output": str(output)})
    check_flags(flags)
    passes = {"seeing": [item.question for item in items]}
    if args.blind:
        passes["blind"] = blind_questions(passes["seeing"])
        if kept := number_kept(passes["seeing"]):
            said = format_count(kept, "question has", "questions have")
            logger.info("--blind: %s no other pictures to be asked with, and the same answer in both columns", said)
    load = functools.cache(functools.partial(load_assistant, flags))  # once for both passes
    parts = output / PARTS
    parts.mkdir(parents=True, exist_ok=True)
    if rank == 0 and any(_parts_of_others(parts, world_size)):
        logger.warning("%s: holds answers of another number of processes; start that many to resume them", parts)
    with _meeting(world_size):
        for name, questions in passes.items():
            _answer_share(flags, questions[rank::world_size], _part(parts, name, rank, world_size), load, name)
    if rank > 0:
        return None
    lines = {name: _read_parts(parts, name, world_size) for name in passes}
    answers = {name: [lines[name][item.question.id].get("answer") for item in items] for name in passes}
    note = json.loads(_part(parts, "seeing", 0, world_size).with_suffix(".jsonl.made_with.json").read_text("utf-8"))
    del note["questions"]  # those of this process; evaluate.py has the whole files'
    note["pictures"] = digest([picture_stamp(path) for item in items for path in item.question.images])
    errors = [
        f"{index}: {line['error']}" for found in lines.values() for index, line in found.items() if "error" in line
    ]
    return Answered(answers["seeing"], answers.get("blind"), errors, note)


def _answer_share(
    flags: argparse.Namespace, share: Sequence[Question], output: Path, load: Callable[[], Assistant], title: str
) -> None:
    if share:  # there may be more processes than questions
        complete_answers(flags, share, output, load, title)


def _parts_of_others(parts: Path, world_size: int) -> Iterator[Path]:
    return (path for path in parts.glob("*-of-*.jsonl") if not path.name.endswith(f"-of-{world_size}.jsonl"))


def _part(parts: Path, name: str, rank: int, world_size: int) -> Path:
    return parts / f"{name}-{rank + 1}-of-{world_size}.jsonl"


def _read_parts(parts: Path, name: str, world_size: int) -> dict[str | int, dict[str, Any]]:
    lines: dict[str | int, dict[str, Any]] = {}
    for rank in range(world_size):
        path = _part(parts, name, rank, world_size)
        for raw in path.read_bytes().splitlines() if path.exists() else []:
            line = json.loads(raw)
            lines[line["id"]] = line
    return lines


@contextlib.contextmanager
def _meeting(world_size: int) -> Iterator[None]:
    """Let every process leave the block once all have; torchrun stops all if one fails."""
    yield
    if world_size > 1:
        distributed.init_process_group("gloo", timeout=datetime.timedelta(days=7))  # the slowest may take that long
        distributed.barrier()
        distributed.destroy_process_group()
