"""Show a trained model in a web page, where visitors chat with it about their pictures.

    pip install -r web-requirements.txt
    python web_demo.py --model_weights weights/train_V1_5

The page is at http://127.0.0.1:7860/, for this machine alone: `--host 0.0.0.0` shows it to the network, `--auth` asks
for a password, `--share` makes a public link through gradio.live. Nothing else leaves the machine, and nothing of a
visitor is kept. Ctrl-C ends it.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from model.asking.model_flags import add_model_flags
from model.console import set_up_logging, use_utf8
from model.errors import OneLineErrors, exit_status
from model.web.limits import Limits
from model.web.serving import check_installed, check_port, read_login, serve

logger = logging.getLogger("web_demo")

LIMITS = ("max_visitors", "questions_per_minute", "max_picture_bytes", "max_pictures", "max_characters")


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line; refuse flags that do not exist or have an invalid value."""
    from model.asking.assistant import add_generation_flags, check_flags  # loads torch

    raw = argparse.RawDescriptionHelpFormatter
    parser = OneLineErrors(description=__doc__, formatter_class=raw, allow_abbrev=False)
    add, limits = parser.add_argument, Limits()
    add_model_flags(parser)
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: all of this machine's (%(default)s)")
    add("--port", type=int, default=7860, help="port to listen on; 0: a free one (%(default)s)")
    add("--auth", metavar="USER:PASSWORD_FILE", help="ask for a login; the password is the first line of the file")
    add("--share", action="store_true", help="make a public link through gradio.live")
    add("--max_visitors", type=int, default=limits.max_visitors, help="pages in use at once (%(default)s)")
    add(
        "--questions_per_minute",
        type=int,
        default=limits.questions_per_minute,
        help="of one page (%(default)s); ten times as many of one network address or login",
    )
    add("--max_picture_bytes", type=int, default=limits.max_picture_bytes, help="of one file (%(default)s)")
    add("--max_pictures", type=int, default=limits.max_pictures, help="in one conversation (%(default)s)")
    add("--max_characters", type=int, default=limits.max_characters, help="in one question (%(default)s)")
    add("--system", help="system prompt; default: as test.py has it")
    add("--seed", type=int, default=42, help="seed of sampling (%(default)s)")
    add_generation_flags(parser)
    args = parser.parse_args(argv)
    for name in LIMITS:
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: must be at least 1")
    # What test.py has besides, and a page has not.
    args.batch = args.output = args.prompt = None
    args.image_path, args.stream, args.batch_size = [], False, 1
    return check_flags(args)


def run(args: argparse.Namespace) -> None:
    """Show the page until the program is told to end."""
    # Look at everything that can be wrong before the model is loaded.
    from model.checkpoints.checkpoint import resolve_checkpoint

    args.model_weights = resolve_checkpoint(args.model_weights)
    args.login = None if args.auth is None else read_login(args.auth)
    args.port = check_port(args.host, args.port)
    check_installed()

    # Load both base models, and merge the checkpoint's LoRA into the language model.
    from transformers import set_seed

    from model.asking.assistant import load_assistant
    from model.web.questions import longest_answer

    assistant = load_assistant(args)
    set_seed(args.seed)

    # The page; it runs until Ctrl-C or SIGTERM.
    limits = {name: getattr(args, name) for name in LIMITS}
    serve(args, assistant, Limits(**limits, max_new_tokens=longest_answer(assistant)))


def main(argv: Sequence[str] | None = None) -> int:
    """Show the page; return the exit status: 2 for what the user can fix, 1 if memory ran out, 130 after Ctrl-C."""
    use_utf8()
    set_up_logging()
    try:
        run(parse_arguments(sys.argv[1:] if argv is None else argv))
    except (Exception, KeyboardInterrupt) as error:
        return exit_status(error, logger, "web_demo.py", "load half the bytes with --dtype bfloat16")
    return 0


if __name__ == "__main__":
    sys.exit(main())
