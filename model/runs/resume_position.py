"""Where a run stands in its data: kept while it trains, saved, and taken up again."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import DefaultFlowCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .collectives import gather_objects
from .run_state import RunState


class PlaceInRun(TrainerCallback):
    """Keeps the place in the epoch and the losses since the last log, and puts both back when a run goes on."""

    def __init__(self, trainer: Any) -> None:  # a VLMTrainer, which imports this file
        self.trainer = trainer
        self.resumed: RunState | None = None
        self.skipped = 0
        self._epoch = 0
        self._first_step = 0
        self._first_position = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put the losses since the last log back."""
        saved = self.resumed
        if saved is None:
            return
        trainer = self.trainer
        sums = saved.loss_sums
        own = sums[args.process_index] if len(sums) == args.world_size else sum(sums) / len(sums)
        trainer._tr_loss = torch.tensor(own, device=args.device)
        # Trainer's mean at the end is over the steps of this call: what came before it is not counted.
        trainer._total_loss_scalar = -sum(sums) / len(sums)
        trainer._globalstep_last_logged = state.global_step - saved.steps_since_log

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take note of where the epoch begins, and tell the data set."""
        saved, self.resumed = self.resumed, None
        self._epoch = saved.epoch if saved is not None else int(state.epoch or 0)
        self._first_step = state.global_step
        self._first_position = saved.position if saved is not None else 0
        skipped, self.skipped = self.skipped, 0
        dataset: Any = self.trainer.train_dataset
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(self._epoch)
        if hasattr(dataset, "start_at"):
            dataset.start_at(skipped)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count an epoch's last step in full.

        An epoch that went on with another batch size can have one step less than others, because steps no longer
        begin where they would have. What is left of it then is empty, and its number is counted with the step before.
        """
        geometry = self.trainer.geometry()
        end = (self._epoch + 1) * geometry.steps_per_epoch
        if self._position() < geometry.num_samples or state.global_step >= end:
            return
        self.trainer._globalstep_last_logged += end - state.global_step
        state.global_step, state.epoch = end, float(self._epoch + 1)
        if isinstance(kwargs.get("lr_scheduler"), LambdaLR):
            kwargs["lr_scheduler"].step()
        DefaultFlowCallback().on_step_end(args, state, control)

    def _position(self) -> int:
        done = self.trainer.state.global_step - self._first_step
        return self._first_position + done * self.trainer.geometry().samples_per_step

    def run_state(self) -> RunState:
        """What a checkpoint of this moment has to keep."""
        trainer = self.trainer
        geometry = trainer.geometry()
        position = self._position()
        ended = position >= geometry.num_samples
        return RunState(
            identity=trainer.identity or {},
            geometry=geometry,
            epoch=self._epoch + int(ended),
            position=0 if ended else position,
            loss_sums=gather_objects(trainer._tr_loss.item()),
            steps_since_log=trainer.state.global_step - trainer._globalstep_last_logged,
            bad=trainer.bad_samples.indices if trainer.bad_samples is not None else [],
        )
