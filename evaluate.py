"""Measure how good a model's answers are, by the metrics that others report.

    python evaluate.py --model_weights weights/train_V1_5 --questions questions.jsonl --output results/mine
    python evaluate.py --questions questions.jsonl --answers answers.jsonl --metrics vqa_accuracy --output results/other
    python evaluate.py --compare results/mine results/other

The first command asks the model; if it is stopped, run it again to resume. The second scores answers that exist
already, of any model. The third compares two output folders. A file of questions has a line for each, `{"id": …,
"image": …, "prompt": …, "answers": [...]}`, or is a published one as it is: VQAv2, POPE, GQA, COCO captions, AI
Challenger captions. The output folder gets results.json, answers.jsonl and report.html; the table goes to stdout.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from dataprocess.file_lock import hold
from dataprocess.messages import format_count
from model.asking.model_flags import add_model_flags
from model.console import use_utf8
from model.errors import OneLineErrors, exit_status, one_line
from model.evaluation.answers import read_answers
from model.evaluation.compare import compare, comparison_rows, write_comparison
from model.evaluation.flags import check_flags, make_folder
from model.evaluation.items import QuestionSet, gather
from model.evaluation.metrics import check_families, choose_families, score
from model.evaluation.processes import enter_process
from model.evaluation.published import Reading, read_file
from model.evaluation.results import Evaluation, file_digest, markdown, markdown_rows, write_results

logger = logging.getLogger("evaluate")


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line; refuse flags that do not exist, are missing, or do not go together."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = OneLineErrors(description=__doc__, formatter_class=raw, allow_abbrev=False)
    add = parser.add_argument
    add("--questions", nargs="+", type=Path, metavar="FILE", help="questions with reference answers; several for POPE")
    add("--annotations", type=Path, metavar="FILE", help="the answers of VQAv2")
    add("--image_map", type=Path, metavar="FILE", help="in place of --questions: process_image.py's, as for training")
    add("--captions_file", type=Path, metavar="FILE", help="the captions that belong to --image_map")
    add("--image_folder", type=Path, help="where the pictures of --questions are; default: next to its file")
    add("--prompt", help="what is asked about the pictures of a captions file; there is a default for each")
    add("--prompt_suffix", help='added to every question, such as "Answer with one word."')
    add("--answers", nargs="+", type=Path, metavar="FILE", help="score these answers, without a model")
    add("--metrics", nargs="+", default=["auto"], metavar="NAME", help="auto (default): by the file; or names")
    add("--compare", nargs=2, type=Path, metavar="FOLDER", help="compare two output folders of this program")
    add("--blind", action="store_true", help="ask everything again with another question's picture")
    add("--output", type=Path, help="folder for the results; if it has a part of the answers, the rest is added")
    add_model_flags(parser)
    add("--batch_size", type=int, default=8, help="questions that are answered together (%(default)s)")
    add("--max_new_tokens", type=int, help="length limit of an answer, in tokens; default: the model's")
    add("--system", help="system prompt; default: as test.py has it")
    add("--seed", type=int, default=42, help="seed of the intervals (%(default)s)")
    return check_flags(parser.parse_args(argv), argv)


def read_questions(args: argparse.Namespace) -> list[QuestionSet]:
    """Read all questions with their reference answers."""
    if args.image_map is not None:
        from model.evaluation.samples import read_samples  # loads torch

        return [read_samples(args.image_map, args.captions_file, args.prompt_suffix or "")]
    reading = Reading(args.annotations, args.image_folder, args.prompt, args.prompt_suffix or "")
    return [read_file(path, reading) for path in args.questions]


def run(args: argparse.Namespace, rank: int, world_size: int) -> int:
    """Evaluate what the flags say; return the exit status."""
    if args.compare is not None:
        if rank > 0:
            return 0
        result, changed = compare(*args.compare, args.seed)
        if args.output is not None:
            make_folder(args.output)
            write_comparison(args.output, result, changed)
        print(markdown([comparison_rows(result)]))
        return 0

    # Read the questions, and decide what is measured: a mistake there should not cost the answers.
    sets = read_questions(args)
    items = gather(sets)
    families = choose_families(args.metrics, sets, items)
    files = [*(args.questions or [args.image_map, args.captions_file]), *filter(None, [args.annotations])]
    made_of = {"questions": {str(path): file_digest(path) for path in files}}
    check_families(items, families)

    # Take the answers from a file, or ask the model; under torchrun each process asks its share, the first one reports.
    make_folder(args.output)
    blind, errors = None, []
    if args.answers is not None:
        if rank > 0:
            return 0
        answers = read_answers(args.answers, sets, items)
        made_of["answers"] = {str(path): file_digest(path) for path in args.answers}
    else:
        from model.evaluation.asking import ask  # loads torch

        answered = ask(args, items, args.output, rank, world_size)
        if answered is None:
            return 0
        answers, blind, errors = answered.seeing, answered.blind, answered.errors
        made_of["model"] = answered.made_with

    # Score them, and write the results.
    scored = score(items, answers, families)
    scored_blind = None if blind is None else score(items, blind, families)
    done = Evaluation(items, answers, scored, blind, scored_blind, args.seed, made_of)
    with hold(args.output):
        results = write_results(args.output, done)
    print(markdown(markdown_rows(results)))
    for name, text in results["variants"].items():
        logger.info("%s: %s", name, text)
    if missing := results["counts"]["without_answer"]:
        logger.warning("%s no answer, which counts as wrong", format_count(missing, "question has", "questions have"))
    for error in errors[:20]:
        logger.error("evaluate.py: %s", one_line(error))
    logger.info("%s: results.json, answers.jsonl, report.html", args.output)
    return 2 if errors else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate; return the exit status: 2 for what the user can fix, 1 if memory ran out, 130 after Ctrl-C."""
    use_utf8()
    try:
        rank, world_size = enter_process()
        return run(parse_arguments(sys.argv[1:] if argv is None else argv), rank, world_size)
    except (Exception, KeyboardInterrupt) as error:
        return exit_status(error, logger, "evaluate.py", "lower --batch_size or --max_new_tokens")


if __name__ == "__main__":
    sys.exit(main())
