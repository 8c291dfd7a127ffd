"""Hugging Face's Trainer with two learning rates, and with runs that can be stopped at any moment and resumed exactly.

Devices, DDP, autocast, accumulation, clipping and schedule are Trainer's own.

Shape legend: B samples of a batch, T tokens.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from dataset.epoch_order import EpochOrder
from qwen import IGNORE_INDEX

from .arguments import VLMTrainingArguments
from .checkpoints.checkpoint import WEIGHTS
from .checkpoints.tensor_files import CHECKSUMS, write_checksums
from .runs.callbacks import RatesAndSpeed, StopOnNonFinite, StopOnSignal
from .runs.collectives import first_problem, gather_objects, gather_rows
from .runs.data_workers import with_calm_workers
from .runs.resuming import check_resumable, newest_resumable, use_settings
from .runs.run_folder import RunFiles, delete_old_checkpoints, put_in_place, remove
from .runs.run_state import TRAINER_STATE, ResumePoint, RunState, callback_states
from .vision_language_model import VisionLanguageModel

logger = logging.getLogger(__name__)


def optimizer_groups(model: VisionLanguageModel, args: VLMTrainingArguments) -> list[dict[str, Any]]:
    """Group the trainable parameters: LoRA and projector at their learning rates, weight decay on matrices only.

    LoRA's matrices come first, so that the schedule's `learning_rate` is theirs.

    Raises:
        ValueError: if a trainable parameter belongs to neither part, or is not in exactly one group.
    """
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    parts = {
        "lora": {name: p for name, p in trainable.items() if "lora_" in name},
        "projector": {name: p for name, p in trainable.items() if name.startswith("projector.")},
    }
    rates = {"lora": args.learning_rate, "projector": args.feature_proj_lr}
    groups: list[dict[str, Any]] = []
    for part, parameters in parts.items():
        matrices = [p for p in parameters.values() if p.dim() >= 2]
        vectors = [p for p in parameters.values() if p.dim() < 2]
        for kind, members, decay in (("matrices", matrices, args.weight_decay), ("vectors", vectors, 0.0)):
            if members:
                groups.append({"params": members, "lr": rates[part], "weight_decay": decay, "name": f"{part} {kind}"})
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    if sorted(grouped) != sorted(id(parameter) for parameter in trainable.values()):
        outside = [name for name, parameter in trainable.items() if grouped.count(id(parameter)) != 1]
        raise ValueError(f"trainable parameters that are not in exactly one optimizer group: {', '.join(outside)}")
    if not parts["lora"] or not parts["projector"]:
        raise ValueError("LoRA and projector must both be trainable; was add_lora called?")
    return groups


class VLMTrainer(Trainer):
    """Trains the LoRA layers and the projector of a `VisionLanguageModel`.

    Args:
        args: see `VLMTrainingArguments`.
        identity: what the run trains on and with. It is saved in every checkpoint, and a resumed run must have the
            same; None: nothing is compared.
        run_config: what `train_config.json` is to hold; None: it is not written.
        overwritten: the files of an older run in the output folder, which are deleted after the first step.
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
        overwritten: Sequence[Path] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(args=args, **kwargs)
        self.identity = identity
        self.run_folder = Path(str(args.output_dir))
        self.save_failure = ""
        """What went wrong when the last checkpoint was written, or an empty string."""
        self.stop_on_signal = StopOnSignal()
        self._finite = StopOnNonFinite()
        self._rates = RatesAndSpeed()
        self._resume = ResumePoint(self)
        self._files = RunFiles(self.run_folder, run_config, overwritten)
        for callback in (self._files, self._resume, self._rates, self._finite, self.stop_on_signal):
            self.add_callback(callback)
        self._token = gather_objects(secrets.token_hex(4))[0]  # no process of another run writes under its names
        self._evaluated: list[Tensor] = []
        self._eval_samples = 0
        log_parameter_counts(self.model)

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
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Compute the loss as Trainer does; the language head runs at supervised positions only."""
        inputs = {name: value for name, value in inputs.items() if name != "ids"}
        inputs["return_logits"] = False
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Keep the loss and the samples' IDs for the check before the optimizer's step."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._finite.remember(loss, inputs.get("ids"))
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        self._finite.gradient_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        return self._finite.gradient_norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the projector's learning rate and the speed to what Trainer logs."""
        if "learning_rate" in logs:
            logs |= self._rates.since_last_log(self.state.global_step)
        super().log(logs, start_time)

    def get_train_dataloader(self) -> Any:
        """Return Trainer's loader, whose workers leave signals to the process they work for."""
        return with_calm_workers(super().get_train_dataloader())

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Read an `EpochOrder` from first to last, whatever `--train_sampling_strategy` says: it is in that order."""
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if isinstance(dataset, EpochOrder):
            return SequentialSampler(dataset)
        return super()._get_train_sampler(train_dataset)

    # ---- Evaluating: the mean over all supervised tokens, however they are split into batches

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Return Trainer's loader, whose workers leave signals to the process they work for."""
        return with_calm_workers(super().get_eval_dataloader(eval_dataset))

    def _get_eval_sampler(self, eval_dataset: Any) -> SequentialSampler:
        return SequentialSampler(eval_dataset)  # Trainer's would read all of it first, to group it by length

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor | None, None, None]:
        """Sum the loss of one batch, and count its supervised tokens."""
        inputs = self._prepare_inputs({name: value for name, value in inputs.items() if name != "ids"})
        labels = inputs["labels"]  # (B, T)
        if self.args.world_size > 1:
            # Samples are repeated so that all processes have full batches; a repeated one is no part of the mean.
            before = (len(self._evaluated) * self.args.world_size + self.args.process_index) * len(labels)
            labels[max(self._eval_samples - before, 0) :] = IGNORE_INDEX
        with torch.no_grad(), self.compute_loss_context_manager():
            total = model(**inputs, num_items_in_batch=1, return_logits=False).loss
        tokens = (labels[:, 1:] != IGNORE_INDEX).sum()
        self._evaluated.append(torch.stack((total.float(), tokens.float())))
        return total, None, None

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate as Trainer does; the loss is summed over the supervised tokens of all batches and divided once."""
        self._evaluated, self._eval_samples = [], len(dataloader.dataset)
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        own = torch.stack(self._evaluated).cpu().double().sum(dim=0).tolist()
        total, tokens = gather_rows(own, self.args.device).sum(dim=0).tolist()
        mean = total / tokens if tokens else float("nan")
        return output._replace(metrics={**(output.metrics or {}), f"{metric_key_prefix}_loss": mean})

    # ---- Stopping and resuming

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as Trainer does; a resumed run ends like one that was never stopped, to the last bit.

        Raises:
            CheckpointError: if the checkpoint belongs to a run on something else, or with other steps.
            NotFiniteError: if a loss or a gradient is not finite.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(newest_resumable(self.run_folder) or self.run_folder)
        checkpoint = Path(str(resume_from_checkpoint)) if resume_from_checkpoint else None
        if checkpoint is not None:
            check_resumable(checkpoint)
            self._resume.prepare(checkpoint)
        try:
            problem = first_problem(lambda: self._files.begin(checkpoint) if self.args.should_save else None)
            if problem:
                raise OSError(problem)
            with self._resume.named_errors():
                if checkpoint is not None:
                    self._load_rng_state(str(checkpoint))  # Trainer does it later, when it could not be told any more
                return super().train(str(checkpoint) if checkpoint else None, *args, **kwargs)
        finally:
            self.stop_on_signal.restore()
            if self.args.should_save:
                self._files.end()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.model.load_checkpoint(resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        optimizer: Any = self.optimizer
        own = [dict(group) for group in optimizer.param_groups]
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:  # rates and weight decay are those of the flags now, not those of the checkpoint
            use_settings(optimizer, self.lr_scheduler, own)

    def _load_scaler(self, checkpoint: str | None) -> None:
        super()._load_scaler(checkpoint)
        self._resume.loading = None  # it was the last of the checkpoint's files

    def _load_best_model(self) -> None:
        # The folder is one of this run, whatever trainer_state.json names.
        best = self.run_folder / Path(str(self.state.best_model_checkpoint)).name
        if not best.is_dir():
            logger.warning("the best checkpoint %s is missing; the weights of the last step are kept", best)
            return
        logger.info("loading the best checkpoint %s (score %s)", best, self.state.best_metric)
        self.model.load_checkpoint(best)

    # ---- Saving

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write LoRA and projector to `output_dir`, on the first process only."""
        if self.args.should_save:
            self.model.save_checkpoint(output_dir or str(self.run_folder))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint under another name, and rename it when it is whole.

        Trainer writes in place, so that a kill or a full disk leaves a part of a checkpoint that looks like the newest
        one. If writing fails, older checkpoints stay, the failure is logged, and training continues.
        """
        target = self.run_folder / f"checkpoint-{self.state.global_step}"
        staging = self.run_folder / f"tmp-{target.name}-{self._token}"
        best_before = self.state.best_model_checkpoint
        best = self.run_folder / f"checkpoint-{self.state.best_global_step}"
        if self.state.best_global_step and (best == target or best.is_dir()):
            self.state.best_model_checkpoint = str(best)
        self.store_flos()
        run_state, saves = self._resume.run_state(), self.args.should_save
        problem = (
            first_problem(lambda: staging.mkdir(parents=True) if saves else None)  # never through a link
            or first_problem(lambda: self._write_training_state(staging, run_state))
            or first_problem(lambda: self._finish_checkpoint(staging, target) if saves else None)
        )
        self.save_failure = f"{target}: {problem}" if problem else ""
        if problem:
            self.state.best_model_checkpoint = best_before
        if problem and saves:
            logger.error(
                "checkpoint %s could not be written: %s; older checkpoints are unchanged, and training continues",
                *(target, problem),
            )
        if saves:
            remove(staging)
        if saves and not problem:
            keep = {target, Path(self.state.best_model_checkpoint or target)}
            delete_old_checkpoints(self.run_folder, self.args.save_total_limit, keep)

    def _write_training_state(self, folder: Path, run_state: RunState) -> None:
        self.save_model(str(folder), _internal_call=True)
        if not self.args.save_only_model:
            self._save_optimizer_and_scheduler(str(folder))
            self._save_scaler(str(folder))
            self._save_rng_state(str(folder))  # every process has its own
        if self.args.should_save:
            self.state.stateful_callbacks = callback_states([*self.callback_handler.callbacks, self.control])
            self.state.save_to_json(str(folder / TRAINER_STATE))
            run_state.write(folder)

    def _finish_checkpoint(self, staging: Path, target: Path) -> None:
        write_checksums(staging, {path.name for path in staging.iterdir()} - {CHECKSUMS, *WEIGHTS})
        put_in_place(staging, target)


def log_parameter_counts(model: VisionLanguageModel) -> None:
    """Log how many parameters each part has, and how many of them are trained."""
    counts = model.parameter_counts()
    counts["all"] = (sum(total for total, _ in counts.values()), sum(trained for _, trained in counts.values()))
    for part, (number, trained) in counts.items():
        logger.info("%-15s %15s parameters, %13s trainable", part, f"{number:,}", f"{trained:,}")
