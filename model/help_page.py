"""What `train.py --help` shows: `--help_all` explains some 120 more flags."""

from __future__ import annotations

import argparse
from typing import Any

_OF_TRAINER = {
    *("output_dir", "learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs"),
    *("max_steps", "warmup_steps", "lr_scheduler_type", "optim", "bf16", "gradient_checkpointing", "seed", "report_to"),
    *("dataloader_num_workers", "train_sampling_strategy", "logging_steps", "save_steps", "save_total_limit"),
    *("eval_strategy", "load_best_model_at_end", "resume_from_checkpoint"),
}
"""Flags of Trainer that matter most."""


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults except None, whose meaning the flag's own help explains."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class ShortHelp(argparse.Action):
    """`--help`: this project's flags, and those of Trainer that matter most."""

    def __call__(self, parser: Any, *_: Any) -> None:
        """Print the help and end the program."""
        ours = {name for group in parser.dataclass_types for name in group.__annotations__}
        for action in parser._actions:
            if action.dest not in {*ours, *_OF_TRAINER, "help", "help_all"}:
                action.help = argparse.SUPPRESS
        parser.print_help()
        parser.exit()
