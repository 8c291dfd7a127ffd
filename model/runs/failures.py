"""How train.py fails: one line for what the user can fix, an exit status, and a word to torchrun."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import TrainingArguments

from dataprocess.image_io import ImageError
from dataprocess.messages import format_count
from dataset import SampleError
from dataset.bad_samples import BadSamples

from ..checkpoints.folder import CheckpointError
from ..errors import in_one_line, is_out_of_memory, out_of_memory

logger = logging.getLogger("train")

MOST_SKIPPED = 50
"""Steps in a row that may overflow under fp16. A scale of 2**16 that halves each time is then 2**-34, with which no
gradient of sane size overflows."""
HOW_TO_RESUME = "resume with the same command and --resume_from_checkpoint auto"
_LESS_MEMORY = (
    "lower --per_device_train_batch_size and raise --gradient_accumulation_steps by as much, which leaves the steps as "
    "they are, or try --gradient_checkpointing true, --bf16 true, a smaller --max_length or --lora_rank; "
    "--resume_from_checkpoint auto resumes from the last checkpoint"
)
_AFTER_TORCHRUN = """
import os, select, sys
torchrun, message, next_attempt = sys.argv[1:]
try:
    ended = os.pidfd_open(int(torchrun))
    for second in range(600):
        if os.path.exists(next_attempt):
            sys.exit()  # it has started the processes again
        if select.select([ended], [], [], 1)[0]:
            break
except ProcessLookupError:
    pass
os.write(2, os.fsencode(message + chr(10)))
"""


class NotFiniteError(RuntimeError):
    """A loss or a gradient that is not finite; the step was not taken."""


def not_finite(what: str, step: int, ids: list[int], args: TrainingArguments) -> NotFiniteError:
    """Describe a loss or a gradient that is not finite, with the IDs of the step's samples."""
    named = f"have the IDs {', '.join(map(str, ids))}"
    if what == "gradient" and args.fp16:
        return NotFiniteError(
            f"the gradients of {MOST_SKIPPED} steps in a row, up to step {step}, were not finite in fp16, however "
            f"small their scale; none of these steps was taken. The last samples {named}. Try --bf16 true or "
            "--fp16 false, or lower --learning_rate and --feature_proj_lr; checkpoints since step "
            f"{step - MOST_SKIPPED} hold the same weights"
        )
    return NotFiniteError(
        f"the {what} of step {step} is not finite; the step was not taken. Its samples {named}. Look at them, or "
        f"lower --learning_rate and --feature_proj_lr; checkpoints in {args.output_dir} are unchanged"
    )


class TooManyBadSamplesError(ValueError):
    """More of a data set is bad than `--max_bad_fraction` allows."""


def check_bad_samples(bad: BadSamples, where: str | None = None) -> None:
    """Refuse more bad samples than are allowed, naming the file that lists them, or the first unreadable one."""
    total = len(bad.flags) + len(bad.unreadable)
    if len(bad) > bad.max_fraction * total:
        which = f"{where} lists them" if where else f"the first: {bad.unreadable[0]}"
        raise TooManyBadSamplesError(
            f"{len(bad):,} of {format_count(total, 'sample')} {'is' if len(bad) == 1 else 'are'} bad, more than "
            f"--max_bad_fraction {bad.max_fraction:g} allows; {which}; "
            "fix the data (or --max_length, if it is too small), or raise the fraction"
        )


def report_failure(error: BaseException, *, has_begun: bool) -> int:
    """Log an error that the user can do something about in one line; any other is raised again.

    Returns:
        The exit status: 2 for a mistake in what the user gave, 1 for a run that failed once it had begun, 130 for
        Ctrl-C.
    """
    if isinstance(error, KeyboardInterrupt):  # between the first step and the last, it is waited for
        return fail("stopped by SIGINT before or after the steps; checkpoints are unchanged", 128 + signal.SIGINT)
    if is_out_of_memory(error):
        return fail(out_of_memory(error, _LESS_MEMORY), 1)
    if isinstance(error, NotFiniteError):
        return fail(in_one_line(error), 1)
    if lost := lost_connection(error):
        return fail(
            f"lost the connection to another process ({lost}); if torchrun does not restart the run, {HOW_TO_RESUME}", 1
        )
    if isinstance(error, OSError) and has_begun:
        return fail(f"{in_one_line(error)}; fix that, and {HOW_TO_RESUME}", 1)
    of_data = (SampleError, ImageError, TooManyBadSamplesError, CheckpointError, ImportError)
    if isinstance(error, of_data if has_begun else (ValueError, OSError, ImportError)):
        return fail(in_one_line(error), 2)
    raise error


def lost_connection(error: BaseException) -> str:
    """Return how the connection to another process was lost, or an empty string if that is not what happened."""
    if not isinstance(error, RuntimeError) or not torch.distributed.is_initialized():
        return ""
    said = " ".join(str(error).split())
    # Gloo has no class of its own for its errors; NCCL's are DistBackendError.
    is_lost = isinstance(error, torch.distributed.DistError) or "gloo/transport" in said
    return said.split("] ", 1)[-1].split(". ")[0][:200] if is_lost else ""


def fail(message: str, status: int) -> int:
    """Log why the program ends, tell torchrun, and return the exit status."""
    message = f"train.py: {message}"
    logger.error(message)
    if error_file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        _tell_torchrun(message, Path(error_file))
    return status


def _tell_torchrun(message: str, error_file: Path) -> None:
    """Put the message into torchrun's report, and have a process of its own print it again after torchrun has ended."""
    note = {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}
    try:
        error_file.write_text(json.dumps({"message": note}), encoding="utf-8")
        (error_file.parent.parent / "said").touch(exist_ok=False)  # once for all ranks
        if hasattr(os, "pidfd_open"):  # Linux
            attempt = error_file.parent.parent  # …/attempt_0
            next_attempt = attempt.with_name(f"attempt_{int(attempt.name.rpartition('_')[2]) + 1}")
            command = [sys.executable, "-S", "-c", _AFTER_TORCHRUN, str(os.getppid()), message, str(next_attempt)]
            quiet = subprocess.DEVNULL
            subprocess.Popen(command, stdin=quiet, stdout=quiet, start_new_session=True)
    except OSError as error:
        logger.debug("torchrun could not be told: %s", error)
