"""Train a small base model, and write results whole or not at all."""

from __future__ import annotations

import contextlib
import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import trange

from model.device import has_accelerator, pick_device, pick_dtype


@dataclass(frozen=True)
class Schedule:
    """How long and how fast a model is trained."""

    steps: int
    """Optimizer steps."""
    learning_rate: float
    """The highest, reached after the warm-up; it then falls to 0 along a half cosine."""
    warmup: int = 100
    """Steps in which it rises."""
    weight_decay: float = 0.05
    """On matrices only."""

    def rate(self, step: int) -> float:
        """Return the learning rate at a step, counted from 0."""
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        decay = 1.0 if progress < 0 else 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return self.learning_rate * min(1.0, (step + 1) / self.warmup) * decay


def autocast_dtype() -> torch.dtype:
    """Return the fastest dtype for matrix products here: as training has it on a GPU; on a CPU by a short trial.

    CPUs with bf16 instructions are about three times as fast in bf16, others slower.
    """
    if has_accelerator():
        return pick_dtype(pick_device())
    times = {dtype: _seconds_per_product(dtype) for dtype in (torch.float32, torch.bfloat16)}
    return min(times, key=lambda dtype: times[dtype])


def _seconds_per_product(dtype: torch.dtype) -> float:
    left, right = torch.ones(2048, 128, dtype=dtype), torch.ones(128, 512, dtype=dtype)
    times = []
    for _ in range(20):
        start = time.perf_counter()
        left @ right
        times.append(time.perf_counter() - start)
    return min(times)


def fit(model: nn.Module, loss_of_batch: Callable[[], Tensor], schedule: Schedule, title: str) -> None:
    """Train a model: AdamW, warm-up and cosine, gradients clipped at norm 1, under autocast.

    Args:
        model: all of its parameters are trained.
        loss_of_batch: draws a batch and gives its loss; called once per step.
        schedule: steps and learning rate.
        title: stands before the progress bar.
    """
    device, dtype = next(model.parameters()).device, autocast_dtype()
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": schedule.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
        fused=True,
    )
    model.train()
    with trange(schedule.steps, desc=title, unit="step", mininterval=2) as bar:
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = schedule.rate(step)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                loss = loss_of_batch()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if step % 20 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    model.eval()


@contextlib.contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """Give a temporary folder to write into; it becomes `folder` at the end if nothing went wrong.

    Args:
        folder: replaced if it exists.
    """
    temporary = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
