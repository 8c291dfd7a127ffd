r"""Ask a trained vision-language model about an image.

    python test.py --model_weights weights/train_V1_5/checkpoint-10000 --image_path test_img/1.jpg \
        --prompt "使用语言描述一下图中出现了那些颜色<|extra_0|>"

The answer alone goes to stdout, everything else to stderr. `<|extra_0|>` in the prompt says where the image belongs;
a prompt without it gets it in front. With a folder as image path, every picture in it is asked about, one line each:
`name<TAB>answer`, line breaks written as \n. Without `--prompt`, a chat about the image, turn by turn.

    python test.py --model_weights weights/train_V1_5 --batch questions.jsonl --output answers.jsonl

answers many questions at once and goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm
from transformers import set_seed

from dataprocess.image_io import ImageError, pictures_in
from dataprocess.messages import format_count
from dataset import SYSTEM_PROMPT, load_image
from dataset.prompt import count_placeholders, with_placeholders
from model import VisionLanguageModel
from model.asking.answer_file import AnswerFile, digest, picture_stamp, trained_digest
from model.asking.assistant import Assistant, Turns
from model.asking.batch_answers import Asked, answer_all
from model.asking.generation_flags import add_generation_flags, generation_options
from model.asking.prompt_window import fit_prompt
from model.asking.question_file import Question, read_questions
from model.console import (
    OneLineErrors,
    in_one_line,
    is_out_of_memory,
    one_line,
    out_of_memory,
    set_up_logging,
    show,
    use_utf8,
)
from model.device import parse_dtype, pick_device, pick_dtype
from model.language_model import load_tokenizer
from qwen import IMAGE_TOKEN
from qwen.stream import complete_config

logger = logging.getLogger("test")

_SHOWN = 20
"""Questions without an answer that are listed at the end; the output names them all."""


def ask_once(assistant: Assistant, prompt: str, images: Sequence[Image.Image], stream: bool) -> None:
    """Print the answer to a prompt that has a placeholder for each of these images."""
    features = assistant.features(images)
    if stream:
        show(assistant.stream(prompt, features))
    else:
        print(assistant.answer(prompt, features))


def ask_about_each(assistant: Assistant, prompt: str, paths: Sequence[Path]) -> int:
    """Print `name<TAB>answer` for every picture; returns the number of pictures that can't be read."""
    failed = 0
    for path in paths:
        try:
            features = assistant.features([load_image(path)])
        except ImageError as error:
            logger.error("test.py: %s", error)
            failed += 1
            continue
        answer = assistant.answer(prompt, features, one_line(path.name))
        print(f"{one_line(path.name)}\t{one_line(answer)}", flush=True)
    return failed


def answer_file(args: argparse.Namespace) -> int:
    """Answer a file of questions, or what is left of them; returns the exit status.

    Raises:
        ValueError: for a line that is no question, or an output that is something else than these answers' beginning.
    """
    # All that needs no model is looked at first: a mistake there should not cost its loading.
    questions = read_questions(Path(args.batch))
    options, _, dtype = check_flags(args)
    known: dict[str, Any] = {
        "questions": digest([(question.id, question.images, question.prompt) for question in questions]),
        "pictures": digest([[picture_stamp(path) for path in question.images] for question in questions]),
        "weights": {"checkpoint": trained_digest(args.model_weights)},
        "settings": {"system": args.system, "seed": args.seed, "dtype": str(dtype), **options},
    }
    command = {"bases": [args.base_language_model, args.base_value_model], "settings": options}
    with AnswerFile(Path(args.output), [question.id for question in questions], known, command) as answers:
        if answers.num_done:
            logger.info("%s: %d of %d answered already", args.output, answers.num_done, len(questions))
        if not answers.is_finished:
            answer_rest(args, questions, answers, known)
    for line in answers.failed[:_SHOWN]:
        logger.error("test.py: %s", one_line(line))
    if answers.failed:
        lack = "has" if len(answers.failed) == 1 else "have"
        all_questions = format_count(len(questions), "question")
        logger.error("test.py: %d of %s %s no answer", len(answers.failed), all_questions, lack)
    return 2 if answers.failed else 0


def answer_rest(
    args: argparse.Namespace, questions: Sequence[Question], answers: AnswerFile, known: dict[str, Any]
) -> None:
    """Load the model, and answer the questions that have no line yet.

    Args:
        args: the command line.
        questions: all of them.
        answers: the output, which knows how many have their line.
        known: what is known already of what answers depend on.

    Raises:
        ValueError: if the output was made with other weights or settings.
    """
    assistant = load_assistant(args)
    settings = complete_config(assistant.model.qwen, None, **assistant.options).to_dict()
    made_with = {
        **known,
        "weights": {**known["weights"], **assistant.model.fingerprints},
        "settings": {**known["settings"], **settings},
    }
    answers.go_on(made_with)
    asked = [_asked(question) for question in questions[answers.num_done :]]
    with tqdm(total=len(questions), initial=answers.num_done, unit="question", file=sys.stderr) as bar:
        for outcome in answer_all(assistant, asked, load_image, args.batch_size, args.seed):
            answers.add(outcome)
            bar.update()


def _asked(question: Question) -> Asked | ValueError:
    try:
        prompt = with_placeholders(question.prompt, len(question.images))
        return Asked(prompt, question.images, one_line(f"question {question.id}"))
    except ValueError as error:
        return error


def chat(assistant: Assistant, images: Sequence[Image.Image]) -> None:
    """Ask for questions on stdin until its end, `exit` or `quit`; answers see the turns before them.

    Ctrl-C ends an answer, whose beginning then counts as the answer; at the prompt it leaves.
    """
    features = assistant.features(images)
    history: Turns = []
    sys.stderr.write("Ask about the image; `exit` or the end of input leaves.\n")
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        sys.stderr.write(prompt)
        sys.stderr.flush()
        line = sys.stdin.readline()
        question = line.strip()
        if not line or question in ("exit", "quit"):
            return
        if not question:
            continue
        try:
            # The first question brings the images; a later one can't bring any, so there a placeholder is dropped.
            if history and IMAGE_TOKEN in question:
                logger.warning("%s left out: the images belong to the first question", IMAGE_TOKEN)
            question = question.replace(IMAGE_TOKEN, "") if history else with_placeholders(question, len(images))
        except ValueError as error:
            logger.error("test.py: %s", error)
            continue
        try:
            answer = show(assistant.stream(question, features, history), may_be_stopped=True)
        except (ValueError, RuntimeError, MemoryError) as error:
            logger.error("test.py: %s", explain(error))
            continue
        if answer:  # stopped before its first word, a question was not asked
            history.append((question, answer))


def explain(error: Exception) -> str:
    """One line about an error, with advice where memory ran out.

    Raises:
        RuntimeError: the error itself, if it is one of this program's own.
    """
    if is_out_of_memory(error):
        return out_of_memory(
            error,
            "give fewer images and shorter questions, lower --max_new_tokens or --batch_size, load half the bytes with "
            "--dtype bfloat16, or use --device cpu",
        )
    if isinstance(error, (ValueError, OSError)):
        return in_one_line(error)
    raise error


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line.

    Raises:
        ValueError: for flags that do not exist or are not of their type.
    """
    parser = OneLineErrors(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--model_weights", help="checkpoint folder, or a run folder (its newest complete checkpoint)")
    add("--base_language_model", help="hub name or folder; default: what the checkpoint was trained on")
    add("--base_value_model", help="hub name or folder of the vision tower; default: likewise")
    add("--image_path", nargs="+", default=[], metavar="PATH", help="a picture, several, or a folder of pictures")
    add("--prompt", help=f"the question; {IMAGE_TOKEN} stands for an image. Without it: a chat")
    add("--batch", metavar="FILE", help='answer a file of questions, a line each: {"id": …, "image": …, "prompt": …}')
    add("--output", metavar="FILE", help="where the answers to --batch go; gone on with where it holds some")
    add("--batch_size", type=int, default=8, help="questions of --batch that are answered together (%(default)s)")
    add("--system", default=SYSTEM_PROMPT, help="system prompt (%(default)s)")
    add("--stream", action="store_true", help="print the answer while it is generated, as a chat does anyway")
    add("--seed", type=int, default=42, help="of sampling (%(default)s)")
    add("--device", help="cpu, cuda, cuda:0, …; default: a GPU where there is one")
    add("--dtype", help="float32, bfloat16 or float16; default: bfloat16 on CUDA, float32 on CPU")
    add_generation_flags(parser)
    return parser.parse_args(argv)


def check_flags(args: argparse.Namespace) -> tuple[dict[str, Any], torch.device, torch.dtype]:
    """The generation settings that were given, device, and dtype.

    Raises:
        ValueError: for a flag that is missing or out of its range.
    """
    if args.model_weights is None:
        raise ValueError("--model_weights is missing: give a checkpoint folder, as train.py writes it")
    options = generation_options(args)
    device = pick_device(args.device)
    return options, device, parse_dtype(args.dtype) if args.dtype else pick_dtype(device)


def load_assistant(args: argparse.Namespace) -> Assistant:
    """Load model and tokenizer.

    Raises:
        ValueError: for a checkpoint or a setting that does not fit.
        OSError: for files that are missing.
    """
    options, device, dtype = check_flags(args)
    sampling = [f"--{name}" for name in ("temperature", "top_p", "top_k") if name in options]
    if sampling and args.do_sample is False:
        logger.warning("--greedy takes the likeliest token each time: %s has no effect", ", ".join(sampling))
    model = VisionLanguageModel.from_pretrained(
        args.base_language_model, args.base_value_model, args.model_weights, dtype, device
    )
    return Assistant(model, load_tokenizer(model.base_language_model), args.system, options, fit_prompt)


def run(args: argparse.Namespace) -> int:
    """Load, then answer; returns the exit status."""
    if (args.batch is None) != (args.output is None):
        raise ValueError("--batch FILE and --output FILE go together: give both, or neither")
    if args.batch is not None:
        if args.prompt is not None or args.image_path or args.stream:
            raise ValueError(
                "--batch brings its own questions and images; leave out --prompt, --image_path and --stream"
            )
        return answer_file(args)
    paths = [Path(path) for path in args.image_path]
    is_folder = len(paths) == 1 and paths[0].is_dir()
    folder = next((path for path in paths if path.is_dir()), None)
    if folder is not None and not is_folder:
        raise ValueError(f"--image_path: the folder {folder} must be given alone, without other paths")
    if is_folder and args.prompt is None:
        raise ValueError("--image_path is a folder, so --prompt is needed; a chat is about one picture")
    if is_folder and args.stream:
        raise ValueError("--stream shows one answer as it grows, a folder gives a line per picture; leave --stream out")
    if is_folder and count_placeholders(args.prompt) > 1:
        raise ValueError(
            f"--image_path is a folder, whose pictures are asked about one by one: --prompt has "
            f"{count_placeholders(args.prompt)} placeholders {IMAGE_TOKEN}; write one, or none, or name the pictures"
        )
    # Pictures and prompt are looked at first: a mistake there should not cost the loading of the model.
    if is_folder:
        paths = pictures_in(paths[0])
    images = [] if is_folder else [load_image(path) for path in paths]
    prompt = args.prompt if args.prompt is None else with_placeholders(args.prompt, 1 if is_folder else len(images))
    assistant = load_assistant(args)
    set_seed(args.seed)
    if is_folder:
        return 2 if ask_about_each(assistant, prompt, paths) else 0
    if prompt is None:
        chat(assistant, images)
    else:
        ask_once(assistant, prompt, images, args.stream)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Answer; returns the exit status, 2 for what the user can mend."""
    use_utf8()
    set_up_logging()
    try:
        return run(parse_arguments(sys.argv[1:] if argv is None else argv))
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        logger.error("test.py: %s", explain(error))
        return 1 if is_out_of_memory(error) else 2
    except KeyboardInterrupt:
        sys.stderr.write("\n")
        return 130


if __name__ == "__main__":
    sys.exit(main())
