"""Many questions, in batches: their answers come in the order of the questions."""

from __future__ import annotations

import argparse
import functools
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from dataprocess.file_lock import hold
from dataprocess.image_io import load_image
from dataprocess.messages import format_count
from dataset import SYSTEM_PROMPT
from qwen.answering import complete_settings, decode, start_decoding

from ..checkpoints.checkpoint import resolve_checkpoint
from ..errors import in_one_line, one_line
from .answer_file import AnswerFile, digest, picture_stamp, trained_digest
from .assistant import Assistant, load_assistant, with_placeholders
from .question_file import Question, read_questions

logger = logging.getLogger(__name__)

_WINDOW = 4
"""Batches that are sorted by the length of their prompts together, so that little of a batch is padding."""
_SHOWN = 20
"""Questions without an answer that are listed at the end; the output names them all."""

Outcome = str | ValueError
"""An answer, or why there is none."""


def answer_questions(args: argparse.Namespace) -> int:
    """Answer the questions in the file `--batch` that have no line in `--output` yet; return the exit status."""
    questions = read_questions(Path(args.batch))
    lines = complete_answers(args, questions, Path(args.output), functools.partial(load_assistant, args))
    failed = [lines[question.id] for question in questions if "error" in lines[question.id]]
    for line in failed[:_SHOWN]:
        logger.error("test.py: %s", one_line(f"{line['id']}: {line['error']}"))
    if failed:
        lack = f"{format_count(len(questions), 'question')} {'has' if len(failed) == 1 else 'have'} no answer"
        logger.error("test.py: %d of %s", len(failed), lack)
    return 2 if failed else 0


def complete_answers(
    args: argparse.Namespace,
    questions: Sequence[Question],
    output: Path,
    load: Callable[[], Assistant],
    title: str | None = None,
) -> dict[str | int, dict[str, Any]]:
    """Answer the questions that have no line in an output yet, or an error about a picture that has changed since.

    All lines are returned, by id.

    Args:
        args: the flags of test.py, checked.
        questions: with different ids.
        output: the file of answers; one that is unfinished is resumed.
        load: loads the model, if there is something left to answer.
        title: stands before the progress bar.
    """
    args.model_weights = resolve_checkpoint(args.model_weights)  # a run may save a newer one meanwhile
    made_with = {
        "questions": digest([(question.id, len(question.images), question.prompt) for question in questions]),
        "checkpoint": trained_digest(args.model_weights),
        "settings": {
            "system": SYSTEM_PROMPT if args.system is None else args.system,
            "seed": args.seed,
            "dtype": str(args.dtype),
            **({} if args.quantisation is None else {"quantisation": args.quantisation}),
            **args.options,
        },
    }
    pictures = {question.id: digest([picture_stamp(path) for path in question.images]) for question in questions}
    with hold(output):
        answers = AnswerFile(output, pictures, made_with)
        left = [question for question in questions if question.id not in answers.lines]
        if answers.lines:
            logger.info("%s: %d of %d answered already", output, len(answers.lines), len(questions))
        # A checkpoint knows its base models; if others are named, they are compared even if nothing is left to answer.
        if left or args.base_language_model or args.base_value_model:
            assistant = load()
            check_settings(assistant)
            generation = assistant.model.qwen.generation_config.to_diff_dict()
            generation.pop("transformers_version", None)
            answers.begin({"base models": assistant.model.fingerprints, "generation settings": generation})
            done, shown = len(answers.lines), logger.isEnabledFor(logging.INFO)  # one bar for several processes
            with tqdm(
                desc=title, total=len(questions), initial=done, unit="question", file=sys.stderr, disable=not shown
            ) as bar:
                for line in answer_all(assistant, left, args.batch_size, args.seed):
                    answers.add(line)
                    bar.update()
    return answers.lines


def check_settings(assistant: Assistant) -> None:
    """Refuse settings under which no question can be answered: `generate` gets ready for an answer, and draws none."""
    model = assistant.model.qwen
    try:
        config, inputs = complete_settings(model, assistant.tokenizer, None, assistant.options)
        # Whether a prompt leaves room within `max_length` is a matter of the prompt.
        config.max_new_tokens, config.max_length = config.max_new_tokens or config.max_length, None
        start_decoding(decode, model, [[assistant.tokenizer.eod_id]], [None], [None], config, inputs)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"the generation settings can't be used: {error}; correct the generation_config.json of "
            f"{assistant.model.base_language_model}, or give flags in its place"
        ) from error


def answer_all(
    assistant: Assistant, questions: Sequence[Question], batch_size: int, seed: int
) -> Iterator[dict[str, Any]]:
    """Answer questions, so many together, each as it would be answered alone under this seed.

    Yields:
        `{"id": …, "answer": …}` or `{"id": …, "error": …}` in the order of the questions, each as soon as it and all
        before it are there.
    """
    for start in range(0, len(questions), batch_size * _WINDOW):
        window = questions[start : start + batch_size * _WINDOW]
        outcomes: dict[int, Outcome] = {}  # by the question's position in the window
        prompts: dict[int, list[int]] = {}
        for at, question in enumerate(window):
            try:
                prompt = with_placeholders(question.prompt, len(question.images))
                prompts[at] = assistant.prompt_ids(prompt, name=one_line(f"question {question.id}"))
            except ValueError as error:
                outcomes[at] = error
        order = sorted(prompts, key=lambda at: len(prompts[at]))
        for at, question in enumerate(window):
            while at not in outcomes:
                batch, order = order[:batch_size], order[batch_size:]
                outcomes |= _answer_batch(assistant, {at: window[at] for at in batch}, prompts, seed)
            outcome = outcomes[at]
            said = {"answer": outcome} if isinstance(outcome, str) else {"error": in_one_line(outcome)}
            yield {"id": question.id, **said}


def _answer_batch(
    assistant: Assistant, questions: dict[int, Question], prompts: dict[int, list[int]], seed: int
) -> dict[int, Outcome]:
    """Answer the questions of one batch, given and returned by their position in the window."""
    outcomes: dict[int, Outcome] = {}
    pictures: dict[Path, Image.Image] = {}
    for at, question in questions.items():
        try:
            pictures |= {path: load_image(path) for path in dict.fromkeys(question.images) if path not in pictures}
        except ValueError as error:
            outcomes[at] = error
    live = [at for at in questions if at not in outcomes]
    try:
        found = assistant.features(list(pictures.values()))  # the tower sees every picture once
        by_path = {} if found is None else dict(zip(pictures, found, strict=True))
        rows = [[by_path[path] for path in questions[at].images] for at in live]
        features = [torch.stack(row) if row else None for row in rows]
        answers = assistant.answer_rows([prompts[at] for at in live], features, seed)
        return outcomes | dict(zip(live, answers, strict=True))
    except ValueError as error:
        if len(live) == 1:
            return outcomes | {live[0]: error}
    for at in live:  # one of them can't be answered; each is asked alone to see which one
        outcomes |= _answer_batch(assistant, {at: questions[at]}, prompts, seed)
    return outcomes
