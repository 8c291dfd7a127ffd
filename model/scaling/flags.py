"""The flags of train.py for language models that are larger than the memory at hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers.hf_argparser import HfArg

flag: Any = HfArg  # as in model/arguments.py


@dataclass
class ScalingFlags:
    """How the frozen language model is kept in memory."""

    load_in_4bit: bool = flag(default=False, help="Keep the frozen language model in 4 bits (NF4), as QLoRA does.")
    load_in_8bit: bool = flag(default=False, help="Keep the frozen language model in 8 bits (LLM.int8).")

    @property
    def quantisation(self) -> str | None:
        """Return 4bit, 8bit, or None where the language model is whole."""
        return "4bit" if self.load_in_4bit else "8bit" if self.load_in_8bit else None

    def check_scaling(self, args: Any) -> None:
        """Refuse what can't work, given the run's `VLMTrainingArguments`.

        Raises:
            ValueError: for flags that do not go together, a missing package, or a device that can't.
        """
        if self.quantisation is not None:
            from .quantised import check_training_flags

            check_training_flags(self, args)


def refusal_of(unknown: list[str]) -> str:
    """Return what is wrong with words that are no flags of train.py, with the reason where other programs have one."""
    why = "; training keeps no block on CPU or disk, see --shard_model" if "--device_map" in unknown else ""
    return f"unknown flags: {' '.join(unknown)}{why}"
