"""What Trainer saves beside the weights and reads when a run goes on: looked through before it does.

Trainer reads these pickles with `weights_only=True`, so that none is executed. Here a bad one becomes one clear error,
before anything of the run has changed.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checkpoints.folders import read_json
from ..checkpoints.tensor_files import CheckpointError

_REQUIRED = ("optimizer.pt", "scheduler.pt")
_OPTIONAL = ("scaler.pt", "rng_state*.pth")
_AS_THE_PARAMETER = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")


def check_state_files(folder: Path) -> None:
    """Look through what Trainer will read from a checkpoint, weights apart.

    Raises:
        CheckpointError: if a file is missing, broken, or holds anything that could run code.
    """
    missing = [name for name in _REQUIRED if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"checkpoint {folder}: {' and '.join(missing)} missing, so training can't go on from it; start anew from "
            "its weights with --previous_lora_weights"
        )
    step = read_json(folder / "trainer_state.json").get("global_step")
    if type(step) is not int or step < 0:
        raise CheckpointError(f"{folder / 'trainer_state.json'}: global_step must be 0 or more, got {step!r}")
    for pattern in (*_REQUIRED, *_OPTIONAL):
        for path in sorted(folder.glob(pattern)):
            state = _read(path)
            if not isinstance(state, dict):
                raise CheckpointError(f"{path}: a dictionary is expected, got {type(state).__name__}")
            if path.name == "scheduler.pt" and type(state.get("last_epoch")) is not int:
                raise CheckpointError(f"{path}: last_epoch must be a whole number, got {state.get('last_epoch')!r}")


def _read(path: Path) -> Any:
    numpy_parts: list[Any] = [np.ndarray, np.dtype, type(np.dtype(np.uint32))]
    numpy_parts += [np._core.multiarray._reconstruct]  # type: ignore[attr-defined]  # NumPy's generator, in rng_state
    try:
        with torch.serialization.safe_globals(numpy_parts):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:  # its own text says how to switch the protection off
        reason = "it holds more than tensors and numbers, which could run code, or it is damaged"
        raise CheckpointError(f"{path}: can't be read as a training state: {reason}") from error
    except Exception as error:  # damaged bytes make the unpickler raise nearly anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: can't be read as a training state: {reason}") from error


def check_optimizer_state(folder: Path, optimizer: torch.optim.Optimizer) -> None:
    """Hold a checkpoint's optimizer state against the optimizer that is to take it over.

    Raises:
        CheckpointError: if it is for other parameters, or holds values that are not finite.
    """
    path = folder / "optimizer.pt"
    found = _read(path)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    try:
        sizes = [len(group["params"]) for group in found["param_groups"]]
        numbers = [number for group in found["param_groups"] for number in group["params"]]
        state = dict(found["state"])
        fields = [(number, name, value) for number in numbers for name, value in state.get(number, {}).items()]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: not the state of an optimizer: {type(error).__name__} {error}") from error
    expected = [len(group["params"]) for group in optimizer.param_groups]
    problems = [f"groups of {sizes} parameters, expected {expected}"] if sizes != expected else []
    shapes = dict(zip(numbers, (tuple(parameter.shape) for parameter in parameters), strict=False))
    for number, name, value in fields if not problems else []:
        if name in _AS_THE_PARAMETER and (not isinstance(value, Tensor) or tuple(value.shape) != shapes[number]):
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            problems.append(f"{name} of parameter {number} is {got}, expected {shapes[number]}")
        elif isinstance(value, Tensor) and not torch.isfinite(value).all():
            problems.append(f"{name} of parameter {number} holds values that are not finite")
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(f"{path} does not fit this run: {'; '.join(problems[:3])}{more}")
