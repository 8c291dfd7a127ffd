"""Device and dtype: the one place where they are chosen."""

from __future__ import annotations

import torch


def pick_device(name: str | None = None) -> torch.device:
    """The device asked for, else the accelerator where there is one, else the CPU.

    Raises:
        ValueError: if the name is not that of a device that is present.
    """
    if name is None:
        return (torch.accelerator.current_accelerator() if has_accelerator() else None) or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name!r}: no device has such a name; try cpu, cuda or cuda:0") from error
    if device.type == "meta" or (device.type != "cpu" and not has_accelerator()):
        raise ValueError(f"--device {name}: this machine has no such device that PyTorch can use; try --device cpu")
    return device


def has_accelerator() -> bool:
    """Whether PyTorch sees a GPU (or the like)."""
    return torch.accelerator.is_available()


def pick_dtype(device: torch.device, bf16: bool | None = None) -> torch.dtype:
    """Dtype of frozen weights and of autocast: bf16 where CUDA has it, else fp16 on CUDA; fp32 on other devices.

    Args:
        device: where the model runs.
        bf16: True or False overrules the choice; False means fp32.
    """
    if bf16 is not None:
        return torch.bfloat16 if bf16 else torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.float32


def parse_dtype(name: str) -> torch.dtype:
    """Read `float32`, `bfloat16`, `float16`, or their short forms `fp32`, `bf16`, `fp16`.

    Raises:
        ValueError: for any other name.
    """
    known = {
        "float32": torch.float32,
        "fp32": torch.float32,
        "bfloat16": torch.bfloat16,
        "bf16": torch.bfloat16,
        "float16": torch.float16,
        "fp16": torch.float16,
    }
    if name not in known:
        raise ValueError(f"--dtype {name!r} is not known; choose one of {', '.join(known)}")
    return known[name]
