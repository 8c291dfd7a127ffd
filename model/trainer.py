"""Hugging Face's Trainer, told how this model is saved, loaded, given two learning rates, and stopped in good order.

Everything else (devices, DDP, autocast, accumulation, clipping, schedule) is Trainer's own.
"""

from __future__ import annotations

import logging
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import rotate_checkpoints

from qwen import IGNORE_INDEX

from .agreement import gather_objects, wait_for_all
from .guards import StopOnNonFinite, StopOnSignal
from .optimizer import optimizer_groups
from .progress import RatesAndSpeed
from .run_state import TRAINER_STATE, Geometry, RunState, check_identity, place_in_run
from .training_state import check_optimizer_state, check_state_files
from .vision_language_model import VisionLanguageModel

logger = logging.getLogger(__name__)


@dataclass
class VLMTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the projector's learning rate, and defaults that fit this model."""

    feature_proj_lr: float = field(
        default=1e-4, metadata={"help": "Learning rate of the projector; --learning_rate is that of LoRA."}
    )
    learning_rate: float = field(default=3e-5, metadata={"help": "Learning rate of the LoRA layers."})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay false: the data set gives what the model takes."}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Delete the run that --output_dir holds, and start anew."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False,
        metadata={"help": "Not needed: LoRA and projector get a gradient in every step, without an image too."},
    )

    def __post_init__(self) -> None:
        """Refuse what would train something else than it says.

        Raises:
            ValueError: if label smoothing is asked for.
        """
        if self.label_smoothing_factor:
            # Trainer shifts the labels of language models in its own list only; here it would smooth the wrong tokens.
            raise ValueError(f"--label_smoothing_factor {self.label_smoothing_factor} is not supported; leave it out")
        super().__post_init__()

    @property
    def n_gpu(self) -> int:
        """At most 1: torchrun starts a process for each GPU, and DataParallel would part images from their rows."""
        return min(super().n_gpu, 1)


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
        self._progress = _Progress(self)
        for callback in (self._progress, self._rates, self._finite, self.stop_on_signal):
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
        if isinstance(resume_from_checkpoint, str):
            resume_from_checkpoint = self._prepare_to_resume(Path(resume_from_checkpoint))
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self.stop_on_signal.restore()

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
        staging = Path(str(self.args.output_dir)) / "tmp-resume"
        folder, skipped = place_in_run(folder, state, self.geometry(), staging, write=self.args.should_save)
        wait_for_all()
        self._progress.resumed, self._progress.skipped = state, skipped
        return str(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.model.load_checkpoint(resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.optimizer is not None:
            check_optimizer_state(Path(checkpoint), self.optimizer)
        super()._load_optimizer_and_scheduler(checkpoint)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if best is not None:
            best = str(Path(str(self.args.output_dir)) / Path(best).name)  # of this run, whatever a checkpoint names
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
        self.store_flos()
        if self.state.best_global_step:
            self.state.best_model_checkpoint = str(run / f"checkpoint-{self.state.best_global_step}")
        run_state = self._progress.run_state()
        problem = ""
        try:
            self._write_checkpoint(staging, run_state)
        except (OSError, RuntimeError, SafetensorError) as error:
            problem = " ".join(str(error).split()) or type(error).__name__
        problem = "; ".join(filter(None, gather_objects(problem)))
        if not problem and self.args.should_save:
            try:
                _put_in_place(staging, target)
            except OSError as error:
                problem = str(error)
        self.save_failure = next(filter(None, gather_objects(problem)), "")
        if self.save_failure:
            logger.error(
                "checkpoint %s could not be written: %s; older checkpoints are as they were, and training goes on",
                *(target, self.save_failure),
            )
        if not self.args.should_save:
            return
        shutil.rmtree(staging, ignore_errors=True)
        if not self.save_failure:
            rotate_checkpoints(str(run), self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=True)

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


def _put_in_place(staging: Path, target: Path) -> None:
    """Rename a finished folder, once all of it is on the disk."""
    for path in staging.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    shutil.rmtree(target, ignore_errors=True)  # of an earlier try that was resumed from before this step
    staging.rename(target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def log_parameter_counts(model: VisionLanguageModel) -> None:
    """Log how many parameters each part has, and how many of them are trained."""
    counts = model.parameter_counts()
    counts["all"] = (sum(total for total, _ in counts.values()), sum(trained for _, trained in counts.values()))
    for part, (number, trained) in counts.items():
        logger.info("%-15s %15s parameters, %13s trainable", part, f"{number:,}", f"{trained:,}")


class _Progress(TrainerCallback):
    """Keeps the place in the epoch and the losses since the last log, and puts both back when a run goes on."""

    def __init__(self, trainer: VLMTrainer) -> None:
        self.trainer = trainer
        self.resumed: RunState | None = None
        self.skipped = 0
        self._epoch = 0
        self._first_step = 0
        self._first_position = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.should_save:
            for leftover in Path(str(args.output_dir)).glob("tmp-checkpoint-*"):
                shutil.rmtree(leftover, ignore_errors=True)
        saved = self.resumed
        if saved is None:
            return
        trainer = self.trainer
        sums = saved.loss_sums
        own = sums[args.process_index] if len(sums) == args.world_size else sum(sums) / len(sums)
        trainer._tr_loss = torch.tensor(own, device=args.device)
        trainer._total_loss_scalar = saved.total_loss
        trainer._globalstep_last_logged = state.global_step - saved.steps_since_log

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        saved, self.resumed = self.resumed, None
        self._epoch = saved.epoch if saved is not None else int(state.epoch or 0)
        self._first_step = state.global_step
        self._first_position = saved.position if saved is not None else 0
        skipped, self.skipped = self.skipped, 0
        dataset: Any = self.trainer.train_dataset
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(self._epoch, *([skipped] if skipped else []))

    def run_state(self) -> RunState:
        trainer = self.trainer
        geometry = trainer.geometry()
        done = trainer.state.global_step - self._first_step
        position = self._first_position + done * geometry.samples_per_step
        ended = position >= geometry.num_samples
        return RunState(
            identity=trainer.identity or {},
            geometry=geometry,
            epoch=self._epoch + int(ended),
            position=0 if ended else position,
            loss_sums=gather_objects(trainer._tr_loss.item()),
            total_loss=trainer._total_loss_scalar,
            steps_since_log=trainer.state.global_step - trainer._globalstep_last_logged,
        )
