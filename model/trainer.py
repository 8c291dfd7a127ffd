"""Hugging Face's Trainer, told how this model is saved, loaded, given two learning rates, and stopped in good order.

Everything else (devices, DDP, autocast, accumulation, clipping, schedule) is Trainer's own.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import SequentialSampler
from transformers import Trainer
from transformers.trainer_callback import ExportableState

from dataset.epoch_order import EpochOrder
from qwen import IGNORE_INDEX

from .arguments import VLMTrainingArguments
from .checkpoints.tensor_files import CheckpointError
from .optimizer import optimizer_groups
from .runs.callbacks import StopOnNonFinite, StopOnSignal
from .runs.collectives import gather_objects, wait_for_all
from .runs.data_workers import with_calm_workers
from .runs.progress import RatesAndSpeed
from .runs.resume_position import PlaceInRun
from .runs.run_folder import (
    RESUME_COPY,
    delete_old_checkpoints,
    leftovers,
    newest_resumable,
    put_in_place,
    restore_replaced,
)
from .runs.run_state import TRAINER_STATE, Geometry, RunState, check_identity, place_in_run
from .runs.state_files import check_optimizer_state, check_state_files
from .vision_language_model import VisionLanguageModel

logger = logging.getLogger(__name__)


class VLMTrainer(Trainer):
    """Trains LoRA layers and projector of a `VisionLanguageModel`.

    Args:
        args: see `VLMTrainingArguments`.
        identity: what the run trains on and with. It is saved in every checkpoint, and a run that goes on from one
            must have the same; None: nothing is compared.
        kwargs: as `transformers.Trainer` takes them; `model` is a `VisionLanguageModel`. For runs that may be
            stopped and go on, `train_dataset` is an `EpochOrder`.
    """

    model: VisionLanguageModel
    args: VLMTrainingArguments

    def __init__(self, *, args: VLMTrainingArguments, identity: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(args=args, **kwargs)
        self.identity = identity
        self._num_samples = len(self.train_dataset) if self.train_dataset is not None else 0  # type: ignore[arg-type]
        self.save_failure = ""
        """What went wrong when a checkpoint was written last, or an empty string."""
        self.stop_on_signal = StopOnSignal()
        self._finite = StopOnNonFinite()
        self._rates = RatesAndSpeed()
        self._place = PlaceInRun(self)
        for callback in (self._place, self._rates, self._finite, self.stop_on_signal):
            self.add_callback(callback)
        log_parameter_counts(self.model)

    # ---- One step

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW (or what `--optim` names) over the groups of `optimizer_groups`."""
        if self.optimizer is None:
            groups = optimizer_groups(self.model, self.args)
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Tensor | int | None]:
        """Take the batches of one optimizer step.

        A run that went on with another batch size can have an epoch that ends in mid-accumulation. Batches without
        labels fill such a step up: it is taken then, and they add nothing to it.
        """
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches and len(batches) < num_batches:
            filler = {**batches[-1], "labels": torch.full_like(batches[-1]["labels"], IGNORE_INDEX)}
            batches = batches + [filler] * (num_batches - len(batches))
        return batches, num_items

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """As Trainer does; the loss and the samples' IDs are kept for the check before the optimizer's step."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._finite.remember(loss, inputs.get("ids"))
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        self._finite.gradient_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        return self._finite.gradient_norm

    def get_train_dataloader(self) -> Any:
        """As Trainer does; data workers leave signals to the process they work for."""
        return with_calm_workers(super().get_train_dataloader())

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """As Trainer does; data workers leave signals to the process they work for."""
        return with_calm_workers(super().get_eval_dataloader(eval_dataset))

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Read an `EpochOrder` from first to last, whatever `--train_sampling_strategy` says: it is in that order."""
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if isinstance(dataset, EpochOrder):
            return SequentialSampler(dataset)
        return super()._get_train_sampler(train_dataset)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """As Trainer does; the language head runs at supervised positions only."""
        inputs = {name: value for name, value in inputs.items() if name != "ids"}
        inputs["return_logits"] = False
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the projector's learning rate and the speed to what Trainer logs."""
        if "learning_rate" in logs:
            logs |= self._rates.since_last_log(self.state.global_step)
        super().log(logs, start_time)

    # ---- Stopping and going on

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As Trainer does; going on from a checkpoint is exact, also with other batches and process counts.

        Raises:
            CheckpointError: if the checkpoint belongs to a run on something else.
            NotFiniteError: if a loss or a gradient is not finite.
        """
        run = Path(str(self.args.output_dir))
        restore_replaced(run)
        self._delete(*leftovers(run))
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(newest_resumable(run) or run)
        if resume_from_checkpoint:
            resume_from_checkpoint = self._prepare_to_resume(Path(str(resume_from_checkpoint)))
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self.stop_on_signal.restore()
            self._delete(run / RESUME_COPY)

    def _delete(self, *folders: Path) -> None:
        for folder in folders if self.args.should_save else ():
            shutil.rmtree(folder, ignore_errors=True)

    @property
    def bad_samples(self) -> Any:
        """Which samples of the training set turned out bad, as `ImageCaptionDataset` keeps it; None: nobody counts."""
        return getattr(getattr(self.train_dataset, "dataset", self.train_dataset), "bad", None)

    def geometry(self) -> Geometry:
        """How epochs are cut into steps."""
        return Geometry(
            num_samples=self._num_samples,
            batch_size=self.args.train_batch_size,
            accumulation=self.args.gradient_accumulation_steps,
            num_processes=self.args.world_size,
        )

    def _prepare_to_resume(self, folder: Path) -> str:
        check_state_files(folder)
        state = RunState.read(folder)
        if self.identity is not None:
            check_identity(state, self.identity, folder)
        staging = Path(str(self.args.output_dir)) / RESUME_COPY
        problem = ""
        try:
            folder, skipped = place_in_run(folder, state, self.geometry(), staging, write=self.args.should_save)
        except OSError as error:
            problem = f"a copy of checkpoint {folder} could not be written: {error}"
        problem = "".join(gather_objects(problem))
        if problem:
            raise CheckpointError(problem)
        for index in state.bad if self.bad_samples is not None else ():
            self.bad_samples.mark(index)
        self._place.resumed, self._place.skipped = state, skipped
        return str(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.model.load_checkpoint(resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.optimizer is not None:
            check_optimizer_state(Path(checkpoint), self.optimizer)
        super()._load_optimizer_and_scheduler(checkpoint)
        schedule = self.lr_scheduler
        if checkpoint is not None and isinstance(schedule, LambdaLR):
            # The checkpoint's rates are those of its own schedule; this one may be longer, or count other steps.
            parts = zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
            rates = [base * share(schedule.last_epoch) for base, share in parts]
            for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            schedule._last_lr = rates

    def _load_best_model(self) -> None:
        if self.state.best_model_checkpoint is None:
            return
        # Of this run, whatever a checkpoint names.
        best = Path(str(self.args.output_dir)) / Path(self.state.best_model_checkpoint).name
        if not best.is_dir():
            logger.warning("the best checkpoint %s is not there; the weights of the last step are kept", best)
            return
        logger.info("loading the best checkpoint %s (score %s)", best, self.state.best_metric)
        self.model.load_checkpoint(best)

    # ---- Saving

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write LoRA and projector to `output_dir`, on the first process only."""
        if self.args.should_save:
            self.model.save_checkpoint(output_dir or str(self.args.output_dir))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint under another name and rename it when it is whole.

        Trainer writes in place, so that a kill or a full disk leaves a part of a checkpoint, which looks like the
        newest one. Where writing fails, older checkpoints stay, the failure is logged, and training goes on.
        """
        run = Path(str(self.args.output_dir))
        target = run / f"checkpoint-{self.state.global_step}"
        staging = run / f"tmp-{target.name}"
        best_before = self.state.best_model_checkpoint
        best = run / f"checkpoint-{self.state.best_global_step}"
        if self.state.best_global_step and (best == target or best.is_dir()):
            self.state.best_model_checkpoint = str(best)
        self.store_flos()
        run_state = self._place.run_state()
        problem = ""
        try:
            self._write_checkpoint(staging, run_state)
        except (OSError, RuntimeError) as error:
            problem = " ".join(str(error).split()) or type(error).__name__
        problem = "; ".join(filter(None, gather_objects(problem)))
        if not problem and self.args.should_save:
            try:
                put_in_place(staging, target)
            except OSError as error:
                problem = str(error)
        problem = next(filter(None, gather_objects(problem)), "")
        self.save_failure = f"{target}: {problem}" if problem else ""
        if problem:
            self.state.best_model_checkpoint = best_before
        if not self.args.should_save:
            return
        if problem:
            logger.error(
                "checkpoint %s could not be written: %s; older checkpoints are as they were, and training goes on",
                *(target, problem),
            )
        shutil.rmtree(staging, ignore_errors=True)
        if not problem:
            best_now = self.state.best_model_checkpoint
            delete_old_checkpoints(run, self.args.save_total_limit, {target, Path(best_now or target)})

    def _write_checkpoint(self, folder: Path, run_state: RunState) -> None:
        if self.args.should_save:
            shutil.rmtree(folder, ignore_errors=True)
        wait_for_all()
        self.save_model(str(folder), _internal_call=True)
        if not self.args.save_only_model:
            self._save_optimizer_and_scheduler(str(folder))
            self._save_scaler(str(folder))
            self._save_rng_state(str(folder))
        if self.args.should_save:
            states: Any = self.state.stateful_callbacks
            for callback in [*self.callback_handler.callbacks, self.control]:
                if isinstance(callback, ExportableState):
                    states[type(callback).__name__] = callback.state()
            self.state.save_to_json(str(folder / TRAINER_STATE))
            run_state.write(folder)


def log_parameter_counts(model: VisionLanguageModel) -> None:
    """Log how many parameters each part has, and how many of them are trained."""
    counts = model.parameter_counts()
    counts["all"] = (sum(total for total, _ in counts.values()), sum(trained for _, trained in counts.values()))
    for part, (number, trained) in counts.items():
        logger.info("%-15s %15s parameters, %13s trainable", part, f"{number:,}", f"{trained:,}")
