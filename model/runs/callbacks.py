"""Callbacks that stop a run in good order: signals, numbers that are not finite, too many bad samples; and its log.

All processes of a run stop at the same step, so what they tell each other comes first.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate.utils import gather, gather_object
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import in_one_line
from .bad_sample_list import list_bad_samples
from .failures import MOST_SKIPPED, not_finite

RUN_CONFIG = "train_config.json"
BAD_SAMPLES = "bad_samples.jsonl"
BAD_EVAL_SAMPLES = "bad_eval_samples.jsonl"
LOSS_FIGURE = "loss.png"
MODEL_CARD = "MODEL_CARD.md"
CARD_MARK = "# train.py replaces this file at every checkpoint; delete this line to keep your edits"


# ---- What processes tell each other


def gather_rows(values: list[int], args: TrainingArguments) -> Tensor:
    """Gather k whole numbers of each process on every process: (processes, k) int64, on the CPU."""
    own = torch.tensor([values], dtype=torch.int64)  # (1, k)
    return gather(own.to(args.device)).cpu() if args.world_size > 1 else own


def first_problem(work: Callable[[], object], takes_part: bool = True) -> str:
    """Let every process that takes part do its share of writing something, and return what went wrong first.

    Returns:
        The same text on every process, once all are done; empty if all went well.
    """
    problem = ""
    try:
        if takes_part:
            work()
    except (OSError, RuntimeError) as error:  # RuntimeError: PyTorch's, for a file that it can't write
        problem = in_one_line(error) or type(error).__name__
    return next(filter(None, gather_object([problem])), "")


# ---- Callbacks


def parameter_counts(model: Any) -> dict[str, tuple[int, int]]:
    """Count the parameters of each part of a model, all and trainable; LoRA layers are a part of their own."""
    counts = {"vision_tower": (0, 0), "projector": (0, 0), "language_model": (0, 0), "lora": (0, 0), "all": (0, 0)}
    for name, parameter in model.named_parameters():
        for part in ("lora" if "lora_" in name else name.split(".", 1)[0], "all"):
            total, trainable = counts[part]
            number = parameter.numel() * (2 if parameter.dtype == torch.uint8 else 1)  # two 4-bit weights are a byte
            counts[part] = (total + number, trainable + number * parameter.requires_grad)
    return counts


class StopOnSignal(TrainerCallback):
    """On SIGTERM or SIGINT, finishes the step, saves and stops, on all processes at the same step.

    A second signal of either kind ends the process at once.

    Attributes:
        received: the signal's number, or 0. Known to every process once the run has stopped.
    """

    def __init__(self) -> None:
        self.received = 0
        self._stops = False
        self._previous: dict[int, Any] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            os._exit(128 + number)
        self.received = number
        name = signal.Signals(number).name
        # Not through logging: the signal may have come while it, or a progress bar, was writing.
        os.write(2, f"\n{name}: finishing this step, then saving; a second signal quits at once\n".encode())

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Take the signals over."""
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask all processes whether one was told to stop."""
        if args.logging_strategy != "no":  # so that a short run has losses for its figure, and a first checkpoint
            control.should_log |= control.should_training_stop or (control.should_save and not state.log_history)
        signals = gather_rows([self.received], args)
        if signals.any():  # only then: another signal may come at any moment
            self.received = int(signals.max())
            control.should_save = True
            control.should_training_stop = True
            self._stops = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep Trainer from logging, evaluating and saving as at the end of an epoch if the run stops in its middle."""
        if self._stops and (state.epoch or 0) % 1:
            control.should_log = control.should_evaluate = control.should_save = False
        elif args.logging_strategy != "no":
            control.should_log |= control.should_save and not state.log_history

    def restore(self) -> None:
        """Restore the earlier signal handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}


class StopOnNonFinite(TrainerCallback):
    """Raises before an optimizer step whose loss or gradient is not finite, on all processes.

    Under fp16 a gradient may overflow: the gradient scaler then skips the step and halves its scale. That may happen
    in fewer than `MOST_SKIPPED` steps in a row.
    """

    def __init__(self) -> None:
        self.gradient_norm: Any = 0.0
        """Norm of the step's gradient before it was clipped; one that is too large for fp32 is not finite either."""
        self.losses: list[Tensor] = []
        """Detached, one for each batch of the step."""
        self.ids: list[int] = []
        """The step's samples."""
        self._num_skipped = 0

    def on_pre_optimizer_step(self, args: TrainingArguments, state: TrainerState, *others: Any, **kwargs: Any) -> None:
        """Check the step; raises `NotFiniteError`."""
        finite = bool(torch.stack([loss.isfinite().all() for loss in self.losses]).all())
        finite_gradient = bool(torch.as_tensor(self.gradient_norm).isfinite().all())
        # The norm tells, and not accelerate: a fused optimizer is called in skipped steps, too.
        self._num_skipped = 0 if finite_gradient else self._num_skipped + 1
        may_continue = finite_gradient or (args.fp16 and self._num_skipped < MOST_SKIPPED)
        rows = gather_rows([finite, may_continue], args)
        ids, self.ids, self.losses = self.ids, [], []
        if not rows.all():
            what = "gradient" if rows[:, 0].all() else "loss"
            raise not_finite(what, state.global_step + 1, sorted(set(gather_object(ids))), args)


class WatchBadSamples(TrainerCallback):
    """Counts the samples that could not be read, lists them, and stops the run if they are too many.

    Args:
        dataset: has `bad`, as `ImageCaptionDataset` has.
    """

    list_name = BAD_SAMPLES
    """File in the output folder that lists them."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self._known = 0
        self._listed: set[str] = set()

    def on_train_begin(self, args: TrainingArguments, *others: Any, **kwargs: Any) -> None:
        """Begin the list with what the two files already showed to be bad, and with what a resumed run had found."""
        if args.process_index == 0:
            Path(str(args.output_dir), self.list_name).unlink(missing_ok=True)  # it could be a link
        self.on_step_end(args)

    def on_step_end(self, args: TrainingArguments, *others: Any, **kwargs: Any) -> None:
        """Look for new ones; raises `TooManyBadSamplesError`."""
        counts = gather_rows([len(self.dataset.bad)], args)  # (processes, 1)
        if (counts != self._known).any():
            list_bad_samples(self.dataset, Path(str(args.output_dir), self.list_name), self._listed, args)
            self._known = len(self.dataset.bad)

    on_evaluate = on_step_end  # a loss over what is left of an evaluation set may mean little
