"""Hugging Face's Trainer, told how this model is saved, loaded, and given two learning rates.

Everything else (devices, DDP, autocast, accumulation, clipping, schedule, resuming) is Trainer's own.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

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
        kwargs: as `transformers.Trainer` takes them; `model` is a `VisionLanguageModel`.
    """

    model: VisionLanguageModel
    args: VLMTrainingArguments

    def __init__(self, *, args: VLMTrainingArguments, **kwargs: Any) -> None:
        super().__init__(args=args, **kwargs)
        self._rates = _RatesAndSpeed()
        self.add_callback(self._rates)
        self.add_callback(_EpochOfData())
        log_parameter_counts(self.model)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW (or what `--optim` names) over the groups of `optimizer_groups`."""
        if self.optimizer is None:
            groups = optimizer_groups(self.model, self.args)
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """As Trainer does; the language head runs at supervised positions only."""
        inputs = {**inputs, "return_logits": False}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the projector's learning rate and the speed to what Trainer logs."""
        if "learning_rate" in logs:
            logs |= self._rates.since_last_log(self.state.global_step)
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write LoRA and projector to `output_dir`, on the first process only."""
        if self.args.should_save:
            self.model.save_checkpoint(output_dir or str(self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.model.load_checkpoint(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if best is not None:
            logger.info("loading the best checkpoint %s (score %s)", best, self.state.best_metric)
            self.model.load_checkpoint(best)


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


def log_parameter_counts(model: VisionLanguageModel) -> None:
    """Log how many parameters each part has, and how many of them are trained."""
    counts = model.parameter_counts()
    counts["all"] = (sum(total for total, _ in counts.values()), sum(trained for _, trained in counts.values()))
    for part, (number, trained) in counts.items():
        logger.info("%-15s %15s parameters, %13s trainable", part, f"{number:,}", f"{trained:,}")


class _RatesAndSpeed(TrainerCallback):
    """Remembers what the log wants to say of the last step: learning rates, and samples since the last log."""

    def __init__(self) -> None:
        self._projector_rate = 0.0
        self._samples_per_step = 0
        self._step, self._time = 0, 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._samples_per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        self._step, self._time = state.global_step, time.perf_counter()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        rates = {group["name"].split()[0]: group["lr"] for group in kwargs["optimizer"].param_groups}
        self._projector_rate = rates["projector"]

    def since_last_log(self, step: int) -> dict[str, float]:
        now = time.perf_counter()
        samples = (step - self._step) * self._samples_per_step
        speed = samples / max(now - self._time, 1e-9)
        self._step, self._time = step, now
        return {"feature_proj_lr": self._projector_rate, "samples_per_second": round(speed, 3)}


class _EpochOfData(TrainerCallback):
    """Tells the data set the epoch, from which it draws among alternative answers."""

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        dataset = getattr(kwargs.get("train_dataloader"), "dataset", None)
        if dataset is not None and hasattr(dataset, "set_epoch"):
            dataset.set_epoch(int(state.epoch or 0))
