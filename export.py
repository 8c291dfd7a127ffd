"""Write a trained model as a folder that other programs load.

    python export.py --model_weights weights/train_V1_5 --output exports/pictures

makes a standard LLaVA, which transformers, vLLM and others run without this repository. Before the folder gets its
name, its answers are compared with those of the trained model; `EXPORT.md` in it says how to serve it. The other
formats are two files for llama.cpp (`gguf`), the language model in its own layout with LoRA merged, and the projector
next to it (`merged`), and what PEFT loads (`peft`). Checkpoints of the original project are exported as well.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from model.console import set_up_logging, use_utf8
from model.device import parse_dtype
from model.errors import OneLineErrors, exit_status
from model.export.gguf_files import check_gguf, write_gguf
from model.export.llama_server import verify_gguf
from model.export.llava import check_llava, write_llava
from model.export.own_layout import check_peft, write_merged, write_peft
from model.export.report import table, write_report
from model.export.shards import parse_size
from model.export.sources import read_sources
from model.export.verify import Comparison, ExportMismatchError, verify
from model.export.writing import UNFINISHED, check_output, new_folder

logger = logging.getLogger("export")


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Read and check the command line.

    Raises:
        ValueError: for flags that do not exist or have an invalid value, or an output folder with files in it.
    """
    parser = OneLineErrors(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--model_weights", help="checkpoint folder, or a run folder (its newest complete checkpoint)")
    add("--output", help="folder to write; it must not exist, or be empty")
    add("--format", default="llava", choices=["llava", "gguf", "merged", "peft"], help="what to write (%(default)s)")
    add("--dtype", help="float32, bfloat16 or float16; default: the one that the checkpoint was trained in")
    add("--max_shard_size", help="the most bytes of weights in a file of llava or merged; default: 5GB")
    add("--base_language_model", help="hub name or folder; default: what the checkpoint was trained on")
    add("--base_value_model", help="hub name or folder of the vision tower; default: likewise")
    add("--no_verify", action="store_true", help="leave out the comparison, which takes 4 bytes of memory a parameter")
    add("--device_map", choices=["auto"], help="compare with one block of the language model at a time in memory; slow")
    for name in (word.split("=")[0] for word in argv):
        if name.startswith("--load_in_"):
            raise ValueError(
                f"{name}: an export is the plain base model with LoRA, whatever it was trained in; leave it out"
            )
    args = parser.parse_args(argv)
    for name in ("model_weights", "output"):
        if getattr(args, name) is None:
            raise ValueError(f"--{name} is missing: give a folder; --help explains the flags")
    args.output = Path(args.output).absolute()
    if args.max_shard_size is not None and args.format not in ("llava", "merged"):
        raise ValueError(f"--max_shard_size: --format {args.format} writes no shards; leave --max_shard_size out")
    if args.dtype is not None and args.format == "peft":
        raise ValueError("--dtype: --format peft writes LoRA as it was trained, in float32; leave --dtype out")
    if args.device_map and args.no_verify:
        raise ValueError("--device_map is for the comparison, and --no_verify leaves it out; leave one of them out")
    args.max_shard_size = parse_size(args.max_shard_size or "5GB")
    args.dtype = None if args.dtype is None else parse_dtype(args.dtype)
    check_output(args.output)
    return args


def run(args: argparse.Namespace) -> None:
    """Export what the flags say.

    Raises:
        ExportMismatchError: if the export does not compute what the trained model does.
        ValueError: for a checkpoint or base model that does not fit, or can't be expressed.
        OSError: for files that are missing or can't be written.
    """
    # Read the checkpoint, and check that it fits its base models and that the format can express it.
    sources = read_sources(args.model_weights, args.base_language_model, args.base_value_model, args.dtype)
    if args.format == "llava":
        check_llava(sources)
    elif args.format == "gguf":
        check_gguf(sources)
    elif args.format == "peft":
        check_peft(sources)

    with new_folder(args.output, keep_on=ExportMismatchError) as folder:
        # Read the base models tensor by tensor, merge LoRA, and write.
        if args.format == "llava":
            write_llava(sources, folder, args.max_shard_size)
        elif args.format == "gguf":
            write_gguf(sources, folder)
        elif args.format == "merged":
            write_merged(sources, folder, args.max_shard_size)
        else:
            write_peft(sources, folder)

        # Ask the export and the trained model the same questions.
        comparisons: Sequence[Comparison] | str = "`--no_verify`"
        if not args.no_verify:
            by_block = args.device_map is not None
            if args.format == "gguf":
                comparisons = verify_gguf(sources, folder, by_block)
            else:
                comparisons = verify(sources, folder, args.format, by_block)
        write_report(sources, folder, args.output.name, args.format, comparisons)
    for line in filter(None, table(comparisons, args.format)):
        logger.info("%s", line)
    logger.info("%s is done; its EXPORT.md says how to ask it", args.output)


def main(argv: Sequence[str] | None = None) -> int:
    """Export; return the exit status: 2 for what the user can fix, 1 for an export that differs, 130 after Ctrl-C."""
    use_utf8()
    set_up_logging()
    try:
        run(parse_arguments(sys.argv[1:] if argv is None else argv))
        return 0
    except ExportMismatchError as error:
        logger.error("export.py: the export differs from the trained model; it stays in *%s: %s", UNFINISHED, error)
        return 1
    except (Exception, KeyboardInterrupt) as error:
        return exit_status(
            error, logger, "export.py", "give --device_map auto or --no_verify, or a machine with more memory"
        )


if __name__ == "__main__":
    sys.exit(main())
