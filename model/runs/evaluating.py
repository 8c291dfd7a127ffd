"""Evaluate: the loss is the mean over all supervised tokens, however they are split into batches."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from qwen import IGNORE_INDEX

from .callbacks import BAD_EVAL_SAMPLES, WatchBadSamples
from .data_workers import with_calm_workers


class TokenMeanTrainer(Trainer):
    """A Trainer whose `eval_loss` depends neither on the batch size nor on the number of processes."""

    _evaluated: list[Tensor]
    """(2,) for each batch: the sum of its losses, and its supervised tokens."""
    _eval_samples: int
    answer_samples: Any = None
    """An `AnswerSamples`, which returns metrics by their names, see `--eval_generate`."""

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

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Evaluate as Trainer does; the loss is summed over the supervised tokens of all batches and divided once."""
        self._evaluated, self._eval_samples = [], len(dataloader.dataset)
        output = super().evaluation_loop(dataloader, *args, **kwargs)
        own = torch.stack(self._evaluated).cpu().double().sum(dim=0).tolist()
        total, tokens = (sum(column) for column in zip(*gather_object([own]), strict=True))
        found = {"loss": total / tokens if tokens else float("nan")}
        if self.answer_samples is not None:
            found |= self.answer_samples()
        prefix = kwargs.get("metric_key_prefix", "eval")
        metrics = {f"{prefix}_{name}": value for name, value in found.items()}
        return output._replace(metrics={**(output.metrics or {}), **metrics})


class WatchBadEvalSamples(WatchBadSamples):
    """Watches the evaluation set as `WatchBadSamples` does the training set; Trainer warns of two of one class."""

    list_name = BAD_EVAL_SAMPLES
