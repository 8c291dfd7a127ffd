r"""Ask a trained vision-language model about an image.

    python test.py --model_weights weights/train_V1_5/checkpoint-10000 --image_path test_img/1.jpg \
        --prompt "使用语言描述一下图中出现了那些颜色<|extra_0|>"

Only the answer goes to stdout, everything else to stderr. `<|extra_0|>` in the prompt marks the place of the image; a
prompt without it gets it in front. With a folder as image path, the question is asked about every picture in it, and
each answer is one line: `name<TAB>answer`, line breaks written as \n. Without `--prompt` you chat about the image.

    python test.py --model_weights weights/train_V1_5 --batch questions.jsonl --output answers.jsonl

answers a file of questions, and resumes where it was stopped.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

import transformers

from dataset import SYSTEM_PROMPT, load_image
from model.asking.assistant import add_generation_flags, check_flags, load_assistant, with_placeholders
from model.asking.batch_answers import answer_questions
from model.asking.chat import chat, explain, show
from model.asking.folder import ask_about_each, check_folder, pictures_in
from model.asking.model_flags import add_model_flags
from model.console import set_up_logging, use_utf8
from model.errors import OneLineErrors, is_out_of_memory
from qwen import IMAGE_TOKEN

logger = logging.getLogger("test")


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line; refuse flags that do not exist, have an invalid value, or do not go together."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = OneLineErrors(description=__doc__, formatter_class=raw, allow_abbrev=False)
    add = parser.add_argument
    add_model_flags(parser)
    add("--image_path", nargs="+", default=[], metavar="PATH", help="a picture, several, or a folder of pictures")
    add("--prompt", help=f"the question; {IMAGE_TOKEN} stands for an image. Without it: a chat")
    add("--batch", metavar="FILE", help='answer a file of questions, a line each: {"id": …, "image": …, "prompt": …}')
    add("--output", metavar="FILE", help="where the answers to --batch go; resumes if the file already has answers")
    add("--batch_size", type=int, default=8, help="questions of --batch that are answered together (%(default)s)")
    add("--system", help=f"system prompt; default for QWen: {SYSTEM_PROMPT}, for others that of their chat template")
    add("--stream", action="store_true", help="print the answer while it is generated, as a chat always does")
    add("--seed", type=int, default=42, help="seed of sampling (%(default)s)")
    add_generation_flags(parser)
    args = check_flags(parser.parse_args(argv))
    if args.folder is not None:
        check_folder(args)
    return args


def run(args: argparse.Namespace) -> int:
    """Ask what the flags say; return the exit status."""
    # A file of questions brings its own pictures and prompts.
    if args.batch is not None:
        return answer_questions(args)

    # Open the pictures and look at the prompt first: a mistake there should not cost the loading of the model.
    paths = pictures_in(args.folder) if args.folder else args.image_path
    images = [] if args.folder else [load_image(path) for path in paths]
    num_images = 1 if args.folder else len(images)
    prompt = None if args.prompt is None else with_placeholders(args.prompt, num_images)

    # Load both base models, and merge the checkpoint's LoRA into the language model.
    assistant = load_assistant(args)

    # Ask: the same of every picture in a folder, question by question, or once.
    transformers.set_seed(args.seed)
    if args.folder:
        return 2 if ask_about_each(assistant, prompt, paths, args.seed) else 0
    if prompt is None:
        chat(assistant, images)
    elif args.stream:
        show(assistant.stream(prompt, assistant.features(images)))
    else:
        print(assistant.answer(prompt, assistant.features(images)))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Ask; return the exit status: 2 for what the user can fix, 1 if memory ran out, 130 after Ctrl-C."""
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
