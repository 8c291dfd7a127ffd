"""List the samples of a run that turned out bad, and stop it if they are too many."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import TrainingArguments

from dataprocess.messages import format_count

from .failures import check_bad_samples

logger = logging.getLogger(__name__)


def list_bad_samples(dataset: Any, path: Path, listed: set[str], args: TrainingArguments) -> None:
    """Tell all processes which samples of a data set are bad, and add the messages that are not `listed` yet to a file.

    Raises:
        TooManyBadSamplesError: if they are too many.
    """
    if args.world_size > 1:
        flags = dataset.bad.flags.to(args.device)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        dataset.bad.flags.copy_(flags)
    number = len(dataset.bad)
    if args.process_index == 0:
        new = [message for message in dataset.bad.all_messages(dataset) if message not in listed]
        listed.update(new)
        try:
            _append(path, new)
        except OSError as error:  # a full disk, say; that is no reason to lose the run
            logger.error("%s could not be written: %s", path, error)
        verb = "was" if number == 1 else "were"
        logger.warning("%s %s left out so far; see %s", format_count(number, "bad sample"), verb, path)
    check_bad_samples(dataset.bad, str(path))


def _append(path: Path, messages: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW  # a link may have come since
    with os.fdopen(os.open(path, flags, 0o666), "a", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(json.dumps({"reason": message}, ensure_ascii=False) + "\n" for message in messages)
