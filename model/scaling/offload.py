"""Ask a language model that one device can't hold: its blocks go to several GPUs, the CPU and the disk, by accelerate.

Embedding, last norm and language head stay on the first device, with tower and projector: every token needs them. The
blocks fill the GPUs in their order, then the CPU's memory, then the disk. A block that is not on a GPU is brought to
the first device when it is about to run, with its LoRA, which is not merged: that would take a copy of the weights.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import dispatch_model
from accelerate.utils import convert_file_size_to_int, get_max_memory
from torch import nn

logger = logging.getLogger(__name__)

_SPARE = 0.1
"""Share of a device's free memory that is left to the cache of keys and values, and to one block on its way."""


def read_max_memory(words: Sequence[str]) -> dict[int | str, int]:
    """Read `0=20GiB cpu=60GiB`: the most bytes of weights on each GPU, by its number, and in the CPU's memory.

    Raises:
        ValueError: for anything else.
    """
    found: dict[int | str, int] = {}
    for word in words:
        name, _, size = word.partition("=")
        try:
            if name != "cpu" and not name.isdecimal():
                raise ValueError
            found[name if name == "cpu" else int(name)] = convert_file_size_to_int(size)
        except ValueError as error:
            raise ValueError(f"--max_memory {word}: must be cpu=SIZE or GPU=SIZE, such as 0=20GiB") from error
    return found


def check_offload(args: Any) -> None:
    """Check the flags of test.py that belong to `--device_map`.

    Raises:
        ValueError: for flags that do not go together, or a size that is none.
    """
    if args.device_map is None:
        raise ValueError("--max_memory and --offload_folder belong to --device_map auto; give it, or leave them out")
    if args.quantisation is not None:
        raise ValueError(
            f"--device_map and --load_in_{args.quantisation}: quantised weights stay on one device; leave one out"
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("--device_map: one process uses all devices; start it without torchrun, or leave it out")
    read_max_memory(args.max_memory)


def spread(model: Any, device: torch.device, max_memory: Sequence[str], folder: str | None) -> None:
    """Spread a `VisionLanguageModel`, loaded on the CPU, over the devices of this machine and the disk.

    Args:
        model: in `eval()`.
        device: the first device.
        max_memory: see `read_max_memory`; for devices that are not in it, nine tenths of what is free.
        folder: for the weights on the disk; None: a temporary one, deleted in the end.
    """
    model.vision_tower.to(device)
    model.projector.to(device)
    language: Any = model.qwen
    blocks = [name for name, part in language.named_modules() if type(part).__name__ in language._no_split_modules]
    first: int | str = "cpu" if device.type == "cpu" else device.index or 0
    places = place_blocks(language, blocks, _room(first, read_max_memory(max_memory)), first)
    if "disk" in places.values() and folder is None:
        model.offload_folder = tempfile.TemporaryDirectory(prefix="vlm-offload-")  # lives as long as the model
        folder = model.offload_folder.name
    kinds = {type(language.get_submodule(name)).__name__ for name in blocks}
    dispatch_model(
        language,
        device_map=places,
        main_device=first,
        offload_dir=folder,
        skip_keys=language._skip_keys_device_placement,
        preload_module_classes=sorted(kinds),  # LoRA layers and ours read weights past the modules that hold them
    )
    of_blocks = [places[name] for name in blocks]
    counts = [f"{of_blocks.count(place)} on {place}" for place in dict.fromkeys(of_blocks)]
    logger.info("blocks of the language model: %s", ", ".join(counts))


def place_blocks(
    language: nn.Module, blocks: Sequence[str], room: dict[int | str, int], first: int | str
) -> dict[str, int | str]:
    """Give every block a place: a GPU's number, `cpu` or `disk`; all else gets the first device.

    Args:
        language: the language model.
        blocks: names of its blocks, in their order.
        room: bytes by device, in the order in which they are filled.
        first: the first device.
    """
    inside = tuple(f"{name}." for name in blocks)
    leaves = [
        name
        for name, part in language.named_modules()
        if not any(part.children()) and not name.startswith(inside) and [*part.parameters(), *part.buffers()]
    ]
    places: dict[str, int | str] = dict.fromkeys(leaves, first)
    left = dict(room)
    left[first] = left.get(first, 0) - sum(_size(language.get_submodule(name)) for name in leaves)
    devices = [*left, "disk"]
    for name in blocks:
        size = _size(language.get_submodule(name))
        while devices[0] != "disk" and left[devices[0]] < size:
            devices.pop(0)  # later blocks come after it: hidden states go from device to device once
        places[name] = devices[0]
        if devices[0] != "disk":
            left[devices[0]] -= size
    return places


def _room(first: int | str, given: dict[int | str, int]) -> dict[int | str, int]:
    free = get_max_memory()
    names = [first, *(name for name in free if name not in (first, "cpu") and first != "cpu"), "cpu"]
    return {name: given.get(name, int((1 - _SPARE) * int(free.get(name, 0)))) for name in dict.fromkeys(names)}


def _size(part: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in [*part.parameters(), *part.buffers()])
