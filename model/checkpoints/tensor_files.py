"""Files of tensors: reading them without running anything, and holding them against what a model calls for."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dataprocess.messages import format_count


class CheckpointError(ValueError):
    """A checkpoint folder that is incomplete, broken, or does not fit the base models."""


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a `.safetensors` file, or a PyTorch file, of which no pickle is executed.

    Raises:
        CheckpointError: if it can't be read, or holds anything but tensors and their names.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        _check_archive(path)
        values = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # its own text says how to switch the protection off
        reason = "only plain PyTorch tensors are read; anything else could run code, or the file is damaged"
        raise CheckpointError(f"{path}: can't be read as a file of tensors: {reason}") from error
    except Exception as error:  # damaged bytes make the unpickler raise nearly anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: can't be read as a file of tensors: {reason}") from error
    if not isinstance(values, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in values.items()
    ):
        raise CheckpointError(f"{path}: names and tensors are expected, got something else")
    return values


def _check_archive(path: Path) -> None:
    """Refuse an archive that unpacks to more than it is: PyTorch's own are never compressed."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("it is a compressed archive, as PyTorch does not write")


def check_finite(model: nn.Module, name: str) -> None:
    """See to it that a base model's weights are numbers.

    Args:
        model: the model.
        name: what it was loaded from, for the message.

    Raises:
        CheckpointError: naming the first weights that are not finite.
    """
    bad = [key for key, value in model.named_parameters() if not _is_finite(value.detach())]
    if bad:
        shown = ", ".join(bad[:3]) + (", …" if len(bad) > 3 else "")
        raise CheckpointError(
            f"the weights of {name} hold values that are not finite, in {format_count(len(bad), 'tensor')} ({shown}); "
            "download or copy it again"
        )


def _is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite; the extremes tell, some thirty times as fast as looking at each."""
    return all(map(torch.isfinite, tensor.aminmax()))


def check_weights(expected: dict[str, Tensor], found: dict[str, Tensor], what: str, likely: str) -> None:
    """Hold what was found against the names and shapes that are expected.

    Args:
        expected: a model's own tensors.
        found: those of a file; they must be finite.
        what: what they are called in the message.
        likely: what most likely differs, where they do.

    Raises:
        CheckpointError: with the first few differences.
    """
    problems = [f"missing {name}" for name in expected.keys() - found.keys()]
    problems += [f"unexpected {name}" for name in found.keys() - expected.keys()]
    for name in expected.keys() & found.keys():
        if expected[name].shape != found[name].shape:
            problems.append(f"{name} is {tuple(found[name].shape)}, expected {tuple(expected[name].shape)}")
        elif not found[name].is_floating_point():
            problems.append(f"{name} is {found[name].dtype}, expected floating point")
        elif not _is_finite(found[name]):
            problems.append(f"{name} holds values that are not finite")
    if problems:
        shown = "; ".join(sorted(problems)[:4])
        more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise CheckpointError(f"{what} does not fit (was it trained for {likely}?): {shown}{more}")
