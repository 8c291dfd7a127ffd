"""How long a run will be: steps and evaluations, as Trainer counts them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..arguments import VLMTrainingArguments


@dataclass(frozen=True)
class Plan:
    """A training run, as far as its length goes."""

    num_samples: int
    """Samples of the data set."""
    rows: int
    """Samples per process and batch."""
    accumulation: int
    """Batches per step."""
    processes: int
    """Processes."""
    epochs: float
    """Epochs."""
    max_steps: int
    """Steps that overrule the epochs, or -1."""
    max_length: int
    """The most tokens of a sample."""

    @classmethod
    def of(cls, args: VLMTrainingArguments, num_samples: int, max_length: int) -> Plan:
        """What the flags say."""
        return cls(
            num_samples=num_samples,
            rows=args.per_device_train_batch_size,
            accumulation=args.gradient_accumulation_steps,
            processes=args.world_size,
            epochs=args.num_train_epochs,
            max_steps=args.max_steps,
            max_length=max_length,
        )

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps that go through the data once."""
        batches = math.ceil(self.num_samples / (self.rows * self.processes))
        return max(math.ceil(batches / self.accumulation), 1)

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.max_steps if self.max_steps > 0 else math.ceil(self.epochs * self.steps_per_epoch)


@dataclass(frozen=True)
class EvaluationPlan:
    """What a run evaluates on, and how often."""

    num_samples: int
    """Samples of the evaluation set."""
    rows: int
    """Samples per process and batch."""
    processes: int
    """Processes."""
    times: int
    """Evaluations in the whole run."""

    @classmethod
    def of(cls, args: VLMTrainingArguments, num_samples: int, plan: Plan) -> EvaluationPlan:
        """What the flags say.

        Args:
            args: the flags.
            num_samples: of the evaluation set.
            plan: the run.
        """
        strategy = str(getattr(args.eval_strategy, "value", args.eval_strategy))
        moments: list[float] = []
        if strategy == "steps":
            every = args.eval_steps or args.logging_steps
            every = math.ceil(every * plan.steps) if every < 1 else int(every)  # a share of the run
            moments = [*range(every, plan.steps, every), plan.steps]
        elif strategy == "epoch":
            epochs = plan.steps / plan.steps_per_epoch
            moments = [min(epoch, epochs) for epoch in range(1, math.ceil(epochs) + 1)]
        times = sum(moment >= args.eval_delay for moment in moments) + bool(args.eval_on_start)
        return cls(num_samples, args.per_device_eval_batch_size, args.world_size, times)

    @property
    def steps(self) -> int:
        """Batches of one evaluation, as every process counts them."""
        return math.ceil(self.num_samples / (self.rows * self.processes))
