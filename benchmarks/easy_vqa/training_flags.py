"""Print the flags of train.py that depend on this machine.

    python -m benchmarks.easy_vqa.training_flags

On a CPU that multiplies faster in bf16, training has it; what a GPU can do train.py finds out itself.
"""

from __future__ import annotations

import torch

from model.device import has_accelerator

from .fitting import autocast_dtype


def main() -> None:
    """Print the flags, or nothing."""
    if not has_accelerator() and autocast_dtype() == torch.bfloat16:
        print("--bf16 true")


if __name__ == "__main__":
    main()
