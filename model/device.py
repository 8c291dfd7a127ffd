"""Device and dtype: the one place where they are chosen."""

from __future__ import annotations

import torch

_DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}


def has_accelerator() -> bool:
    """Return whether PyTorch sees a GPU (or the like)."""
    return torch.accelerator.is_available()


def pick_device(name: str | None = None) -> torch.device:
    """Return the device of this name; by default the accelerator if there is one, else the CPU.

    Raises:
        ValueError: if this machine has no such device.
    """
    accelerator = torch.accelerator.current_accelerator() if has_accelerator() else None
    if name is None:
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name!r}: no device has such a name; try cpu, cuda or cuda:0") from error
    is_there = accelerator is not None and device.type == accelerator.type
    if device.type != "cpu" and not (is_there and (device.index or 0) < torch.accelerator.device_count()):
        raise ValueError(f"--device {name}: this machine has no such device that PyTorch can use; try --device cpu")
    return device


def pick_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of frozen weights and of autocast: bf16 where CUDA has it, else fp16 on CUDA; fp32 elsewhere."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.float32


def parse_dtype(name: str) -> torch.dtype:
    """Read `float32`, `bfloat16`, `float16`, or their short forms `fp32`, `bf16`, `fp16`.

    Raises:
        ValueError: for any other name.
    """
    if name not in _DTYPES:
        raise ValueError(f"--dtype {name!r} is not known; choose one of {', '.join(_DTYPES)}")
    return _DTYPES[name]
