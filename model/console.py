"""The programs' messages: to stderr, one line each, without other packages' chatter. Answers go to stdout."""

from __future__ import annotations

import io
import logging
import sys
import warnings

OUR_LOGGERS = ("dataset", "evaluate", "export", "model", "qwen", "test", "train", "visual", "web_demo")


def use_utf8() -> None:
    """Read and write UTF-8 whatever the locale says: answers are Chinese, and must not fail where it is ASCII."""
    for stream, errors in ((sys.stdin, "replace"), (sys.stdout, "backslashreplace"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors=errors)


def set_up_logging(rank: int = 0, world_size: int = 1) -> None:
    """Let our packages log to stderr: everything on the first process, warnings and errors on the others."""
    prefix = "" if world_size == 1 else f"[{rank}] "
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format=f"{prefix}%(message)s", force=True)
    for name in OUR_LOGGERS:
        logging.getLogger(name).setLevel(logging.INFO if rank == 0 else logging.WARNING)
    # PEFT uses deprecated names of transformers, and accelerate reports a default that it has set.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    warnings.filterwarnings("ignore", message="OMP_NUM_THREADS", category=UserWarning)
