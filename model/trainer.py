"""Hugging Face's Trainer with two learning rates, and with runs that can be stopped at any moment and resumed exactly.

Devices, DDP, autocast, accumulation, clipping and schedule are Trainer's own.

Shape legend: B samples of a batch, T tokens.
"""

from __future__ import annotations

import contextlib
import logging
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import SequentialSampler

from dataset.epoch_order import EpochOrder

from .arguments import VLMTrainingArguments
from .runs.callbacks import StopOnNonFinite, StopOnSignal, first_problem, parameter_counts
from .runs.data_workers import with_calm_workers
from .runs.loading import LoadingTrainer
from .runs.resuming import Resumed, newest_resumable
from .runs.run_folder import write_run_config
from .runs.run_state import write_checkpoint
from .vision_language_model import VisionLanguageModel

logger = logging.getLogger(__name__)


def optimizer_groups(model: VisionLanguageModel, args: VLMTrainingArguments) -> list[dict[str, Any]]:
    """Group the trainable parameters: LoRA and projector at their learning rates, weight decay on matrices only.

    LoRA comes first, so that the schedule's `learning_rate` is its rate; the last group is the projector's. With
    `--train_only` the whole language model takes LoRA's place, or nothing does.

    Raises:
        ValueError: if a trainable parameter belongs to neither part, or a part has none.
    """
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    groups: list[dict[str, Any]] = []
    signs = {"lora": {"lora": "lora_"}, "all": {"language model": "language_model."}, "projector": {}}[model.train_only]
    for part, sign in {**signs, "projector": "projector."}.items():
        members = [trainable.pop(name) for name in list(trainable) if sign in name]
        if not members:
            raise ValueError(f"the {part} has nothing to train, but each part must; was add_lora called?")
        rate = args.feature_proj_lr if part == "projector" else args.learning_rate
        matrices, vectors = ([p for p in members if (p.dim() >= 2) == is_matrix] for is_matrix in (True, False))
        for kind, parameters, decay in (("matrices", matrices, args.weight_decay), ("vectors", vectors, 0.0)):
            if parameters:
                groups.append({"params": parameters, "lr": rate, "weight_decay": decay, "name": f"{part} {kind}"})
    if trainable:
        raise ValueError(f"trainable parameters of none of these parts: {', '.join(trainable)}")
    return groups


class VLMTrainer(LoadingTrainer):
    """Trains the LoRA layers and the projector of a `VisionLanguageModel`, or what its `train_only` says.

    Args:
        args: see `VLMTrainingArguments`.
        identity: what the run trains on and with. It is saved in every checkpoint, and a resumed run must have the
            same; None: nothing is compared.
        run_config: what `train_config.json` is to hold; None: it is not written.
        kwargs: as `transformers.Trainer` takes them; `model` is a `VisionLanguageModel`. For runs that may be resumed,
            `train_dataset` is an `EpochOrder`.
    """

    model: VisionLanguageModel
    args: VLMTrainingArguments

    def __init__(
        self,
        *,
        args: VLMTrainingArguments,
        identity: dict[str, Any] | None = None,
        run_config: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(args=args, **kwargs)
        self.identity, self.run_config = identity, run_config
        self.run_folder = Path(str(args.output_dir))
        self.save_failure = ""
        """What went wrong when the last checkpoint was written, or an empty string."""
        self.stop_on_signal = StopOnSignal()
        self._finite = StopOnNonFinite()
        self.add_callback(self._finite)
        self.add_callback(self.stop_on_signal)
        self._projector_rate = 0.0
        self.last_log: tuple[int, float] | None = None
        """Step and time of the last logged line, or of the beginning."""
        for part, (total, trained) in parameter_counts(self.model).items():
            logger.info("%-15s %15s parameters, %13s trainable", part, f"{total:,}", f"{trained:,}")

    # ---- One step

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create AdamW (or what `--optim` names) over the groups of `optimizer_groups`."""
        if self.optimizer is None:
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer = optimizer_class(optimizer_groups(self.model, self.args), **options)
        return self.optimizer

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """Take the batches of one step; none if a resumed run had finished, for Trainer would take one step more."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return [], None
        if self.last_log is None:
            self.last_log = self.state.global_step, time.perf_counter()
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Compute loss and gradients as Trainer does; the language head runs at supervised positions only."""
        ids = inputs.pop("ids", None)
        loss = super().training_step(model, {**inputs, "return_logits": False}, num_items_in_batch)
        self._finite.losses.append(loss)  # detached by Trainer
        self._finite.ids += ids or []
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        # Called before the optimizer's step: the norm is for the check, the rate of this step for the log.
        optimizer: Any = self.optimizer
        self._projector_rate = optimizer.param_groups[-1]["lr"]
        self._finite.gradient_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        return self._finite.gradient_norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the projector's learning rate, and samples per second since the last line, to what Trainer logs."""
        if "learning_rate" in logs and self.last_log is not None:
            args, (step, since) = self.args, self.last_log
            self.last_log = self.state.global_step, time.perf_counter()
            samples_per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
            speed = (self.last_log[0] - step) * samples_per_step / max(self.last_log[1] - since, 1e-9)
            logs |= {"feature_proj_lr": self._projector_rate, "samples_per_second": round(speed, 3)}
        super().log(logs, start_time)

    def get_train_dataloader(self) -> Any:
        """Return Trainer's loader; it draws seeds from a generator of its own, so that dropout depends on none."""
        loader = super().get_train_dataloader()
        getattr(loader, "base_dataloader", loader).generator = torch.Generator()
        return with_calm_workers(loader) if self.args.dataloader_num_workers else loader

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Read an `EpochOrder` from first to last, whatever `--train_sampling_strategy` says: it is in that order."""
        if isinstance(self.train_dataset, EpochOrder):
            return SequentialSampler(self.train_dataset)
        return super()._get_train_sampler(train_dataset)

    # ---- Stopping and resuming

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as Trainer does; a resumed run ends like one that was never stopped, to the last bit.

        Raises:
            CheckpointError: if the checkpoint belongs to a run on something else, or with other steps.
            NotFiniteError: if a loss or a gradient is not finite.
        """
        self.last_log = None
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(newest_resumable(self.run_folder) or self.run_folder)
        checkpoint = Path(str(resume_from_checkpoint)) if resume_from_checkpoint else None
        if checkpoint is not None:
            self._resumed = Resumed(self, checkpoint)
            self.add_callback(self._resumed)
        try:
            config = self.run_config
            if config is not None:
                problem = first_problem(lambda: write_run_config(self.run_folder, config), self.args.should_save)
                if problem:  # on every process, or the others would wait for this one
                    raise OSError(problem)
            with self._resumed.named_errors() if self._resumed else contextlib.nullcontext():
                return super().train(str(checkpoint) if checkpoint else None, *args, **kwargs)
        finally:
            if self._resumed is not None:
                self.remove_callback(self._resumed)
                self._resumed = None
            self.stop_on_signal.restore()

    # ---- Saving

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what is trained to `output_dir`, on the first process only."""
        if self.args.should_save:
            self.model.save_checkpoint(output_dir or str(self.run_folder))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.store_flos()
        self.save_failure = write_checkpoint(self)  # whole or not at all; if that fails, training continues
