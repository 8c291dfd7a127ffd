"""Runs that are stopped and resumed, in this process: data, trainers that remember what they saw, and kills."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tiny_vlm import collate, enliven_trained, new_model, sample, trainable_parameters
from torch import Tensor
from torch.utils.data import Dataset
from transformers import TrainerCallback

from dataset.bad_samples import CutAnswers
from dataset.epoch_order import EpochOrder
from dataset.grouped_order import GroupedOrder
from model import VLMTrainer, VLMTrainingArguments
from model.checkpoints.folder import CheckpointError
from model.runs.deleting import clear_leftovers
from model.runs.resuming import check_resumable, newest_resumable
from qwen import IGNORE_INDEX

WEIGHTS = {
    *("adapter_model.safetensors", "adapter_config.json", "projector.safetensors", "multimodal_config.json"),
    "checksums.json",
}
STATE = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "run_state.json"}


class Killed(BaseException):
    """Stands for a SIGKILL: nobody may catch it."""


class Answers(Dataset):
    """Samples with no image, one or two; another answer to odd ones in each epoch, as alternatives are drawn."""

    def __init__(self, size: int = 11) -> None:
        self.size = size
        self.cuts = CutAnswers(size, 64, "captions.json")
        self._epoch = torch.zeros(1, dtype=torch.long).share_memory_()

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        drawn = int(self._epoch) if index % 2 else 0
        made = sample(index % 3, num_words=3 + index % 4, num_answer=1 + (3 * index + drawn) % 7, seed=index)
        return {**made, "id": index}

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)


def answer_lengths(size: int) -> Tensor:
    """Tokens of each of so many samples in the first epoch, (size,)."""
    answers = Answers(size)
    return torch.tensor([len(answers[index]["input_ids"]) for index in range(size)])


class Recorder(VLMTrainer):
    """Remembers the IDs of the samples that each step consisted of."""

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        self.seen: list[list[int]] = []
        self._of_step: list[int] = []

    def training_step(self, model, inputs, num_items_in_batch=None):
        supervised = (inputs["labels"] != IGNORE_INDEX).any(dim=1)
        self._of_step += [number for number, is_given in zip(inputs["ids"], supervised, strict=True) if is_given]
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self.seen.append(self._of_step)
            self._of_step = []
        return loss


class KillAt(TrainerCallback):
    """Raises at the given call of an event, counted from 1."""

    def __init__(self, event: str, call: int, error: BaseException | None = None) -> None:
        self.calls = 0

        def happen(args, state, control, **kwargs):
            self.calls += 1
            if self.calls == call:
                raise error or Killed

        setattr(self, event, happen)


def collate_list(samples):
    return collate(*samples)


def new_trainer(
    bases,
    folder,
    *,
    size=11,
    dropout=0.3,
    model=None,
    callbacks=(),
    identity=None,
    lengths=None,
    **changes,
) -> Recorder:
    """A trainer over a fresh model; 3 epochs of steps of 4 samples, logged off the grid of epochs and checkpoints."""
    settings = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-2,
        "feature_proj_lr": 2e-2,
        "num_train_epochs": 3,
        "logging_steps": 4,
        "logging_first_step": True,  # or else with the first checkpoint
        "save_steps": 1,
        "seed": 3,
        "train_sampling_strategy": "sequential",
    }
    return Recorder(
        model=model or enliven_trained(new_model(bases, dropout=dropout), std=0.1),
        args=VLMTrainingArguments(**{**settings, **changes}),
        train_dataset=EpochOrder(Answers(size), settings["seed"])
        if lengths is None
        else GroupedOrder(Answers(size), settings["seed"], lengths),
        eval_dataset=Answers(5),
        data_collator=collate_list,
        callbacks=list(callbacks),
        identity=identity,
    )


def resume(bases, folder: Path, from_: Path | None = None, **changes) -> Recorder:
    """Resume from the newest checkpoint, with a model, a trainer and random numbers that know nothing of the first."""
    clear_leftovers(folder)
    trainer = new_trainer(
        bases,
        folder,
        model=enliven_trained(new_model(bases, dropout=changes.pop("dropout", 0.3), seed=9), 7),
        **changes,
    )
    checkpoint = from_ or newest_resumable(folder)
    assert checkpoint is not None
    torch.manual_seed(99)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    return trainer


def logged(trainer: VLMTrainer) -> list[tuple]:
    """What the log says of each logged step, but for the speed."""
    return [
        (entry["step"], entry["epoch"], entry["loss"], entry["grad_norm"], entry["learning_rate"])
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


def weights(trainer: VLMTrainer) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainable_parameters(trainer.model).items()}


def assert_same_end(one: VLMTrainer, other: VLMTrainer) -> None:
    """Logged losses and weights agree to the last bit."""
    assert logged(one) == logged(other), (logged(one), logged(other))
    assert len(logged(one)) > 0
    assert one.state.global_step == other.state.global_step
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def checkpoints(folder: Path) -> list[str]:
    """Names in a run's folder that look like checkpoints or unfinished work, by their numbers."""
    names = [path.name for path in folder.iterdir() if path.name.startswith(("checkpoint-", "tmp-"))]
    return sorted(names, key=lambda name: (name.startswith("tmp-"), len(name), name))


def is_resumable(folder: Path) -> bool:
    try:
        check_resumable(folder)
    except CheckpointError:
        return False
    return True


def position(folder: Path) -> tuple[int, int]:
    state = json.loads((folder / "run_state.json").read_text())
    return state["epoch"], state["position"]
