"""Check the flags of the learning rate's schedule before anything is loaded; Trainer makes it right before step 1."""

from __future__ import annotations

from typing import Any

import torch
from transformers import get_scheduler


def check_schedule(args: Any) -> None:
    """Make the schedule of a run's arguments for a weight of its own.

    Raises:
        ValueError: if it lacks an option, or has one of another schedule.
    """
    name, options = args.lr_scheduler_type.value, args.lr_scheduler_kwargs
    if not isinstance(options or {}, dict):
        return  # which is refused with the other flags' values
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    try:
        get_scheduler(name, optimizer, num_warmup_steps=1, num_training_steps=10, scheduler_specific_kwargs=options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"--lr_scheduler_type {name}: {error}; change --lr_scheduler_kwargs, now {options}") from error
