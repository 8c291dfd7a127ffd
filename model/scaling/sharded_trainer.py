"""Train a language model that is split over the processes (`--shard_model`): see `sharding.py`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import AutocastKwargs
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.trainer_utils import EvalLoopOutput

from ..arguments import VLMTrainingArguments
from ..runs.resuming import use_settings
from ..trainer import VLMTrainer
from .sharding import average_gradients, gather_optimizer, gather_weights, shard, split


class ShardedTrainer(VLMTrainer):
    """A `VLMTrainer` that splits the language model; its checkpoints are those of `VLMTrainer`.

    Args:
        args: as `VLMTrainer` takes them.
        kwargs: likewise; `model` is a `VisionLanguageModel` that was loaded hollow.

    Raises:
        ValueError: if the files lack weights.
    """

    def __init__(self, *, args: VLMTrainingArguments, **kwargs: Any) -> None:
        shard(kwargs["model"], args.device)
        super().__init__(args=args, **kwargs)
        # Keeps Trainer from wrapping the model in DDP. Set before, it would refuse to save the optimizer.
        self.is_distributed_loading_by_transformers = True
        # Autocast's cache would hold the copies of blocks that were let go, of `--train_only all` the whole model.
        self.accelerator.autocast_handler = AutocastKwargs(cache_enabled=False)

    def _sync_replicated_trainable_parameters(self, model: nn.Module) -> None:
        # Trainer would average the projector's gradients in hooks, whose order depends on a batch having images: where
        # the processes differ in that, they would wait for each other for ever. `training_step` averages them.
        pass

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Do as `VLMTrainer` does; FSDP averages the gradients of what is split, and this those of the projector."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            average_gradients(self.model.projector)
        return loss

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Evaluate as `VLMTrainer` does, and let go of what is gathered until a backward pass would."""
        output = super().evaluation_loop(*args, **kwargs)
        self.model.qwen.reshard()  # type: ignore[operator]
        return output

    # ---- Saving and loading whole files

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # Gathering takes every process, so it comes before writing, which may fail on one of them.
        state = {} if self.args.save_only_model else gather_optimizer(self.optimizer, keep=self.args.should_save)
        with _returning(self.optimizer, state), self._whole_weights():
            super()._save_checkpoint(model, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what is trained to `output_dir`; every process must call it."""
        with contextlib.nullcontext() if _internal_call else self._whole_weights():
            super().save_model(output_dir)

    def _whole_weights(self) -> contextlib.AbstractContextManager[None]:
        return _returning(self.model.language_model, gather_weights(self.model, keep=self.args.should_save))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        optimizer: Any = self.optimizer
        own = [dict(group) for group in optimizer.param_groups]
        state = torch.load(Path(checkpoint, "optimizer.pt"), map_location="cpu", weights_only=True, mmap=True)
        optimizer.load_state_dict(_split_state(state, optimizer))
        schedule: Any = self.lr_scheduler
        schedule.load_state_dict(torch.load(Path(checkpoint, "scheduler.pt"), map_location="cpu", weights_only=True))
        use_settings(optimizer, schedule, own)


@contextlib.contextmanager
def _returning(owner: Any, state: dict[str, Any]) -> Iterator[None]:
    """Have `owner.state_dict()` return what was gathered before."""
    owner.state_dict = lambda *args, **kwargs: state
    try:
        yield
    finally:
        del owner.state_dict


def _split_state(state: dict[str, Any], optimizer: Any) -> dict[str, Any]:
    """Split what an optimizer's file holds of parameters that are split; the file is mapped, and only that is read."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    states = dict(state["state"])
    for number, parameter in zip(numbers, parameters, strict=False):  # `load_state_dict` compares their numbers
        if isinstance(parameter, DTensor):
            states[number] = {
                name: split(value, parameter) if getattr(value, "shape", None) == parameter.shape else value
                for name, value in states.get(number, {}).items()
            }
    return {**state, "state": states}
