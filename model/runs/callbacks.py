"""Callbacks that stop a run in good order: signals, numbers that are not finite, too many bad samples; and its log.

All processes of a run stop at the same step, so what they tell each other comes first.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dataprocess.messages import format_count

logger = logging.getLogger(__name__)

BAD_SAMPLES = "bad_samples.jsonl"
BAD_EVAL_SAMPLES = "bad_eval_samples.jsonl"
MOST_SKIPPED = 50
"""Steps in a row that may overflow under fp16. A scale of 2**16 that halves each time is then 2**-34, with which no
gradient of sane size overflows."""


# ---- What processes tell each other


def is_distributed() -> bool:
    """Return whether there are other processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def gather_rows(values: list[float], device: torch.device) -> Tensor:
    """Gather k numbers of each process on every process.

    Args:
        values: k numbers of this process.
        device: where the process group computes.

    Returns:
        (processes, k) float64, on the CPU.
    """
    if not is_distributed():
        return torch.tensor([values], dtype=torch.float64)
    own = torch.tensor(values, dtype=torch.float64, device=device)
    rows = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, own)
    return torch.stack(rows).cpu()


def gather_objects(value: Any) -> list[Any]:
    """Gather an object of each process on every process, in the order of ranks."""
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def first_problem(work: Callable[[], object]) -> str:
    """Let every process do its part of writing something, and return what went wrong first.

    Returns:
        The same text on every process, once all are done; empty if all went well.
    """
    problem = ""
    try:
        work()
    except (OSError, RuntimeError) as error:  # RuntimeError: PyTorch's, for a file that it can't write
        problem = " ".join(str(error).split()) or type(error).__name__
    return next(filter(None, gather_objects(problem)), "")


# ---- Callbacks


class NotFiniteError(RuntimeError):
    """A loss or a gradient that is not finite; the step was not taken."""


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

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the signals over."""
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask all processes whether one was told to stop."""
        signals = gather_rows([float(self.received)], args.device)
        if signals.any():
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
        self._losses: list[Tensor] = []
        self._ids: list[int] = []
        self._num_skipped = 0

    def remember(self, loss: Tensor, ids: list[int] | None) -> None:
        """Note loss and samples of a batch of the step."""
        self._losses.append(loss.detach())
        self._ids += ids or []

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the step.

        Raises:
            NotFiniteError: naming step and samples.
        """
        finite = torch.stack([loss.isfinite().all() for loss in self._losses]).all()
        finite_gradient = bool(torch.as_tensor(self.gradient_norm).isfinite().all())
        # The norm tells, and not accelerate: a fused optimizer is called in skipped steps, too.
        self._num_skipped = 0 if finite_gradient else self._num_skipped + 1
        may_continue = finite_gradient or (args.fp16 and self._num_skipped < MOST_SKIPPED)
        rows = gather_rows([float(finite), float(may_continue)], args.device)
        ids, self._ids, self._losses = self._ids, [], []
        if rows.all():
            return
        all_ids = sorted({number for numbers in gather_objects(ids) for number in numbers})
        step, named = state.global_step + 1, f"have the IDs {', '.join(map(str, all_ids))}"
        what = "loss" if not rows[:, 0].all() else "gradient"
        if what == "gradient" and args.fp16:
            raise NotFiniteError(
                f"the gradients of {MOST_SKIPPED} steps in a row, up to step {step}, were not finite in fp16, however "
                f"small their scale; none of these steps was taken. The last samples {named}. Try --bf16 true or "
                "--fp16 false, or lower --learning_rate and --feature_proj_lr; checkpoints since step "
                f"{step - MOST_SKIPPED} hold the same weights"
            )
        raise NotFiniteError(
            f"the {what} of step {step} is not finite; the step was not taken. Its samples {named}. Look at them, or "
            f"lower --learning_rate and --feature_proj_lr; checkpoints in {args.output_dir} are unchanged"
        )


class WatchBadSamples(TrainerCallback):
    """Counts the samples that could not be read, lists them, and stops the run if they are too many.

    Args:
        dataset: has `bad`, as `ImageCaptionDataset` has.
        list_name: file in the output folder that lists them.
    """

    def __init__(self, dataset: Any, list_name: str = BAD_SAMPLES) -> None:
        self.dataset = dataset
        self.list_name = list_name
        self._known = 0
        self._listed: set[str] = set()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin the list with what the two files already showed to be bad, and with what a resumed run had found."""
        if args.process_index == 0:
            Path(str(args.output_dir), self.list_name).unlink(missing_ok=True)
        self.on_step_end(args, state, control)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Look for new ones.

        Raises:
            TooManyBadSamplesError: if they are too many.
        """
        counts = gather_rows([float(len(self.dataset.bad))], args.device)
        if int(counts.max()) == self._known and bool((counts == counts[0]).all()):
            return
        if is_distributed():
            flags = self.dataset.bad.flags.to(args.device)
            dist.all_reduce(flags, dist.ReduceOp.MAX)
            self.dataset.bad.flags.copy_(flags)
        self._known = len(self.dataset.bad)
        path = Path(str(args.output_dir), self.list_name)
        if args.process_index == 0:
            try:
                self._append_new(path)
            except OSError as error:  # a full disk, say; that is no reason to lose the run
                logger.error("%s could not be written: %s", path, error)
            verb = "was" if self._known == 1 else "were"
            logger.warning("%s %s left out so far; see %s", format_count(self._known, "bad sample"), verb, path)
        self.dataset.bad.check(str(path))

    on_evaluate = on_step_end  # a loss over what is left of an evaluation set may mean little

    def _append_new(self, path: Path) -> None:
        new = [message for message in self.dataset.bad.all_messages(self.dataset) if message not in self._listed]
        self._listed.update(new)
        text = "".join(json.dumps({"reason": message}, ensure_ascii=False) + "\n" for message in new)
        path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)  # never through a link
        with open(os.open(path, flags, 0o666), "w", encoding="utf-8", errors="backslashreplace") as file:  # noqa: PTH123
            file.write(text)


class WatchBadEvalSamples(WatchBadSamples):
    """Does the same for the evaluation set; Trainer warns of two callbacks of one class."""

    def __init__(self, dataset: Any) -> None:
        super().__init__(dataset, BAD_EVAL_SAMPLES)


class RatesAndSpeed(TrainerCallback):
    """Remembers what the log adds to Trainer's: the projector's learning rate, and samples per second."""

    def __init__(self) -> None:
        self._projector_rate = 0.0
        self._samples_per_step = 0
        self._step, self._time = 0, 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        self._samples_per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        self._step, self._time = state.global_step, time.perf_counter()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Read the rates that this step was taken with."""
        rates = {group["name"].split()[0]: group["lr"] for group in kwargs["optimizer"].param_groups}
        self._projector_rate = rates["projector"]

    def since_last_log(self, step: int) -> dict[str, float]:
        """Return the projector's learning rate in the last step, and samples per second since the last call."""
        now = time.perf_counter()
        samples = (step - self._step) * self._samples_per_step
        speed = samples / max(now - self._time, 1e-9)
        self._step, self._time = step, now
        return {"feature_proj_lr": self._projector_rate, "samples_per_second": round(speed, 3)}
