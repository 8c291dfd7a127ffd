"""What the log says beside the loss: both learning rates and the speed."""

from __future__ import annotations

import time
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class RatesAndSpeed(TrainerCallback):
    """Remembers what the log wants to say of the last step: learning rates, and samples since the last log."""

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
        """The projector's learning rate in the last step, and samples per second since the last call."""
        now = time.perf_counter()
        samples = (step - self._step) * self._samples_per_step
        speed = samples / max(now - self._time, 1e-9)
        self._step, self._time = step, now
        return {"feature_proj_lr": self._projector_rate, "samples_per_second": round(speed, 3)}
