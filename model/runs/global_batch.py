"""`--global_batch_size`: the same steps, whatever the number of processes."""

from __future__ import annotations

from transformers import TrainingArguments


def accumulation(args: TrainingArguments) -> int:
    """Return how many batches of all processes make up one optimizer step of `args.global_batch_size` samples.

    Raises:
        ValueError: if that is no whole number, or another one than `--gradient_accumulation_steps` says.
    """
    rows, processes, wanted = args.per_device_train_batch_size, args.world_size, getattr(args, "global_batch_size", 0)
    batch = f"{rows} rows (--per_device_train_batch_size) × {processes} processes"
    steps, rest = divmod(wanted, max(rows * processes, 1))
    if rest or steps < 1:
        raise ValueError(
            f"--global_batch_size {wanted}: must be a multiple of {batch} = {rows * processes}; change one of them"
        )
    if args.gradient_accumulation_steps not in (1, steps):  # 1 is the default, and what train.sh gives
        raise ValueError(
            f"--global_batch_size {wanted} over {batch} takes --gradient_accumulation_steps {steps}, got "
            f"{args.gradient_accumulation_steps}; leave one of the two flags out"
        )
    return steps
