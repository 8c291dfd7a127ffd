"""How long a run will be: steps and evaluations, counted as Trainer counts them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..arguments import VLMTrainingArguments


@dataclass(frozen=True)
class RunLength:
    """The length of a training run."""

    steps_per_epoch: int  # optimizer steps that go through the data once
    steps: int  # optimizer steps of the whole run
    eval_batches: int  # batches of one evaluation, as every process counts them; 0 without an evaluation set
    num_evaluations: int  # evaluations in the whole run


def run_length(args: VLMTrainingArguments, num_samples: int, num_eval_samples: int) -> RunLength:
    """Count the steps of a run over so many samples, evaluated on so many."""
    batches = math.ceil(num_samples / (args.per_device_train_batch_size * args.world_size))
    steps_per_epoch = max(math.ceil(batches / args.gradient_accumulation_steps), 1)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_per_epoch)
    eval_batches = math.ceil(num_eval_samples / (args.per_device_eval_batch_size * args.world_size))
    evaluations = _num_evaluations(args, steps, steps / steps_per_epoch) if num_eval_samples else 0
    return RunLength(steps_per_epoch, steps, eval_batches, evaluations)


def _num_evaluations(args: VLMTrainingArguments, steps: int, epochs: float) -> int:
    strategy = str(getattr(args.eval_strategy, "value", args.eval_strategy))
    moments: list[float] = []
    if strategy == "steps":
        every = args.eval_steps or args.logging_steps
        every = math.ceil(every * steps) if every < 1 else int(every)  # below 1 it is a share of the run
        moments = [*range(every, steps, every), steps]
    elif strategy == "epoch":
        moments = [min(epoch, epochs) for epoch in range(1, math.ceil(epochs) + 1)]
    return sum(moment >= args.eval_delay for moment in moments) + bool(args.eval_on_start)
