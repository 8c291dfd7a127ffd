"""Answer samples of the evaluation set at each evaluation of a run, and measure the answers (`--eval_generate`).

The model is asked as evaluate.py asks it, with its LoRA layers as they are. Nothing of training changes: answers are
greedy, so that no random number is drawn, and the model is in `eval()` as for the evaluation's loss.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import time
from typing import Any

import numpy as np
from accelerate.utils import gather_object
from transformers.integrations import TensorBoardCallback

from dataprocess.image_io import ImageError, load_image
from dataprocess.messages import format_count
from dataset import ImageCaptionDataset
from dataset.prompt import Tokenizer

from ..arguments import DataArguments
from ..asking.assistant import Assistant
from ..asking.batch_answers import answer_all, check_settings
from .items import Item, QuestionSet
from .metrics import check_families, choose_families, score, value_names
from .samples import first_question, has_all_pictures_first

logger = logging.getLogger(__name__)

_MOST_SHOWN = 16
"""Samples that TensorBoard shows."""
_SIDE = 336
"""Longest side of the pictures there, in pixels."""


class AnswerSamples:
    """Answers the same samples at each call.

    Args:
        trainer: the `VLMTrainer` whose model is asked.
        tokenizer: of its language model.
        eval_set: the evaluation set.
        data_args: `eval_generate` and `eval_max_new_tokens` count.

    Raises:
        ValueError: if there is nothing to ask, settings can't be used, or `--metric_for_best_model` is not measured.
        ModuleNotFoundError: if a package of the metrics is missing.
    """

    def __init__(
        self, trainer: Any, tokenizer: Tokenizer, eval_set: ImageCaptionDataset, data_args: DataArguments
    ) -> None:
        self.trainer = trainer
        options = {"do_sample": False, "num_beams": 1, "max_new_tokens": data_args.eval_max_new_tokens}
        self.assistant = Assistant(trainer.model, tokenizer, None, options)
        check_settings(self.assistant)
        self.skips_bad = eval_set.skips_bad
        # What the first process can read is asked on all of them.
        self.items: list[Item] = gather_object([choose_samples(eval_set, data_args.eval_generate or 0)])[0]
        self.families = choose_families(["auto"], [QuestionSet("samples", "", self.items)], self.items)
        self.notes = ""
        """How many samples were answered, and the rule of each metric; since the first call, on the first process."""
        self._begun = False
        try:
            check_families(self.items, self.families)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(str(error).replace("--metrics", "--eval_generate", 1)) from error
        self._names = value_names(self.items, self.families)
        measured = ["loss", *self._names]
        best = trainer.args.metric_for_best_model
        if best is not None and best.removeprefix("eval_") not in measured:
            raise ValueError(f"--metric_for_best_model {best}: not measured; give one of {', '.join(measured)}")

    def __call__(self) -> dict[str, float]:
        """Answer all samples, each process its share, and return the metrics, the same on every process.

        If none can be answered, they are NaN.

        Raises:
            ImageError: in that case, with `--on_bad_sample error`.
        """
        args, begin = self.trainer.args, time.monotonic()
        share = range(len(self.items))[args.process_index :: args.world_size]
        questions = [self.items[at].question for at in share]
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.trainer.accelerator.autocast())
            if args.shard_model:
                from ..scaling.sharding import calls_together

                stack.enter_context(calls_together(self.trainer.model.qwen))
            lines = list(answer_all(self.assistant, questions, args.eval_batch_size, args.seed))
        together = dict(gather_object(list(zip(share, lines, strict=True))))
        answers = {at: together[at]["answer"] for at in sorted(together) if "answer" in together[at]}
        failed = [f"{line['id']}: {line['error']}" for line in together.values() if "error" in line]
        if not answers and not self.skips_bad:
            raise ImageError(f"--eval_generate: no sample can be answered; {failed[0]}")
        metrics = dict.fromkeys(self._names, math.nan)
        if args.process_index == 0:  # one process: PTB's tokenizer could fail on another
            if answers:
                metrics = self._measure(answers)
                self._show(answers)
            if failed and not (self._begun and answers):
                logger.warning("--eval_generate: %d left out; the first: %s", len(failed), failed[0])
            logger.info("%s in %.1f s", format_count(len(answers), "answer"), time.monotonic() - begin)
        self._begun = True
        shared: dict[str, float] = gather_object([metrics])[0]
        return shared

    def _measure(self, answers: dict[int, str]) -> dict[str, float]:
        """Score answers, given by the position of their sample."""
        scored = score([self.items[at] for at in answers], list(answers.values()), self.families)
        rules = [f"- {one.family}: {one.variant}\n" for one in scored]
        for rule in rules:
            if rule not in self.notes:
                logger.info("--eval_generate: %s", rule[2:-1])
        said = f"{len(answers):,} of {format_count(len(self.items), 'sample')} answered"
        self.notes = f"\nMetrics over {said}:\n\n{''.join(rules)}"
        return {name: value for one in scored for name, value in one.total.items()}

    def _show(self, answers: dict[int, str]) -> None:
        """Show some of the answers in TensorBoard, if it is used; the pictures once, with the first of them."""
        step = self.trainer.state.global_step
        for callback in self.trainer.callback_handler.callbacks:
            writer = callback.tb_writer if isinstance(callback, TensorBoardCallback) else None
            if writer is None:
                continue
            for at in list(answers)[:: -(-len(answers) // _MOST_SHOWN)]:
                item = self.items[at]
                tag = f"answers/{item.question.id}"
                texts = {"Question": item.question.prompt, "Answer": answers[at]}
                texts["References"] = "\n".join(item.references)
                parts = [f"**{name}**\n\n{_literal(text)}" for name, text in texts.items()]
                writer.add_text(tag, "\n\n".join(parts), step)
                for number, path in enumerate(() if self._begun else item.question.images, start=1):
                    with contextlib.suppress(ImageError):  # the file may have gone since
                        image = load_image(path)
                        image.thumbnail((_SIDE, _SIDE))
                        writer.add_image(f"{tag}/{number}", np.asarray(image), step, dataformats="HWC")


def _literal(text: str) -> str:
    """Indent a text, so that Markdown shows it as it is."""
    return "\n".join(f"    {line}" for line in text.splitlines() or [""])


def choose_samples(eval_set: ImageCaptionDataset, number: int) -> list[Item]:
    """Return the first questions of so many samples, spread evenly over the set; of all, if there are fewer.

    Samples whose later questions bring pictures are passed over. With `--on_bad_sample skip`, so are those whose
    pictures can't be read, and others take their place.

    Raises:
        ImageError: if a picture can't be read, and samples are not to be skipped, or none is left.
        ValueError: if no sample has all its pictures in its first question.
    """
    annotations = eval_set.annotations
    usable = [at for at in range(len(annotations)) if has_all_pictures_first(annotations[at])]
    if not usable:
        raise ValueError("--eval_generate: no sample of the evaluation set has all its pictures in its first question")
    if number > len(usable):
        logger.info("--eval_generate %d: there are %s, all are answered", number, format_count(len(usable), "sample"))
        number = len(usable)
    spread = [place * len(usable) // number for place in range(number)]
    others = sorted(set(range(len(usable))) - set(spread))
    chosen: dict[int, Item] = {}  # by their place among the usable ones
    bad: list[str] = []
    for place in itertools.chain(spread, others):
        if len(chosen) == number:
            break
        sample = annotations[usable[place]]
        try:
            item = first_question(sample, eval_set.allow_links)
            for path in item.question.images:
                load_image(path)
            chosen[place] = item
        except ImageError as error:
            bad.append(f"sample {sample.id}: {error}")
            if not eval_set.skips_bad:
                raise ImageError(bad[0]) from error
    if not chosen:
        raise ImageError(f"--eval_generate: no sample can be asked; the first: {bad[0]}")
    if bad:
        logger.info("--eval_generate: %s passed over; the first: %s", format_count(len(bad), "sample"), bad[0])
    return [chosen[place] for place in sorted(chosen)]
