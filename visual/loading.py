"""Reading a published vision checkpoint: its configuration, its weights and its image processor.

transformers' own loaders do the work. What is added here is one clear error for each thing that can be wrong, no
report about the text half that is left out on purpose, and never a line of code from the checkpoint. A damaged or
foreign file may make transformers raise nearly anything, so every exception of a reader is turned into that error.
"""

import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from transformers import AutoImageProcessor, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging as transformers_logging

# A block of the vision half that the configuration does not know; of other keys a file may have more than is needed.
_SURPLUS_BLOCK = re.compile(r"^(?:vision_model\.|vit\.|dinov2\.)?(?:encoder\.)?layers?\.\d+\.")


def read_config(name_or_path: str) -> dict[str, Any]:
    """The content of a checkpoint's config.json.

    Args:
        name_or_path: A local folder, or a name on the model hub (read from its cache where there is no connection).

    Raises:
        FileNotFoundError: No such folder, no config.json in it, or the hub does not give it.
        ValueError: The file is not a JSON object.
    """
    folder = Path(name_or_path)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(
                f"vision tower {name_or_path!r}: no config.json in this folder: give a checkpoint's, or a hub name"
            )
    elif folder.exists():
        raise FileNotFoundError(f"{name_or_path} is a file; a tower is a folder with config.json and weights")
    elif not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name_or_path):
        raise FileNotFoundError(f"vision tower {name_or_path!r}: there is no such folder, and it is not a hub name")
    try:
        with _quiet():
            content, _ = PreTrainedConfig.get_config_dict(name_or_path)
    except Exception as error:
        if folder.is_dir():
            raise ValueError(f"{name_or_path}/config.json cannot be read: {_reason(error)}") from error
        raise FileNotFoundError(
            f"vision tower {name_or_path!r} is no local folder, and the hub does not give it: {_reason(error)}. "
            "Give a local folder, or a name that can be downloaded or lies in the cache"
        ) from error
    if not content:
        raise FileNotFoundError(f"vision tower {name_or_path!r}: no config.json was found")
    return content


def load_config(model_class: type[PreTrainedModel], name_or_path: str) -> PreTrainedConfig:
    """The configuration of the vision half, which a CLIP-like config.json holds under `vision_config`.

    Raises:
        ValueError: The file's values cannot be those of such a model.
    """
    config_class = cast(type[PreTrainedConfig], model_class.config_class)
    try:
        with _quiet():
            return config_class.from_pretrained(name_or_path, trust_remote_code=False)
    except Exception as error:
        raise ValueError(
            f"the config.json of {name_or_path} is no {config_class.__name__}: {_reason(error)}"
        ) from error


def load_model(
    model_class: type[PreTrainedModel], name_or_path: str, config: PreTrainedConfig, dtype: torch.dtype, **kwargs: Any
) -> PreTrainedModel:
    """Load the weights that `model_class` has, straight into `dtype`; others in the file (a text half) are ignored.

    Args:
        model_class: The vision model; it must exist in transformers.
        name_or_path: The checkpoint: safetensors, or .bin (read with weights_only); one file or shards.
        config: The vision half's configuration.
        dtype: The data type to hold the weights in.
        **kwargs: Handed on to the model's `__init__`.

    Raises:
        FileNotFoundError: There is no file with weights.
        ValueError: The weights cannot be read, or are not those of the configuration (missing, of another shape, or
            of more blocks than configured).
    """
    try:
        with _quiet():
            loaded: Any = model_class.from_pretrained(
                name_or_path,
                config=config,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are reported below, with everything else
                trust_remote_code=False,
                **kwargs,
            )
    except Exception as error:
        kind = FileNotFoundError if isinstance(error, OSError) else ValueError
        raise kind(f"the weights of {name_or_path} cannot be loaded: {_reason(error)}") from error
    model, info = loaded
    shapes = [f"{name} is {tuple(found)}, not {tuple(want)}" for name, found, want in sorted(info["mismatched_keys"])]
    surplus = sorted(name for name in info["unexpected_keys"] if _SURPLUS_BLOCK.match(name))
    faults = {
        "missing": sorted(info["missing_keys"]),
        "of another shape": shapes,
        "not in the configuration": surplus,
        "not readable": sorted(info["error_msgs"]),
    }
    if any(faults.values()):
        text = "; ".join(
            f"{len(names)} {fault} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
            for fault, names in faults.items()
            if names
        )
        raise ValueError(
            f"the weights of {name_or_path} do not fit its config.json as {model_class.__name__}: {text}. "
            "Use the config.json and the weights of one and the same model"
        )
    return model


def load_image_processor(name_or_path: str) -> Any:
    """The checkpoint's own image processor, in its Pillow form whether or not torchvision is installed, tried once.

    The torchvision form gives other pixels (by up to 0.015), so that a model would depend on what else is installed.

    Raises:
        FileNotFoundError: The checkpoint has no preprocessor_config.json.
        ValueError: It cannot be used.
    """
    try:
        with _quiet():
            processor = AutoImageProcessor.from_pretrained(name_or_path, backend="pil", trust_remote_code=False)
            processor(images=Image.new("RGB", (40, 30)), return_tensors="pt")
            return processor
    except OSError as error:
        raise FileNotFoundError(
            f"{name_or_path} has no readable preprocessor_config.json, which says how images are prepared: "
            "take the file from the model's publisher, or save the image processor into the folder"
        ) from error
    except Exception as error:
        raise ValueError(f"the image processor of {name_or_path} cannot be used: {_reason(error)}") from error


def published_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return a model's weights by the names of its published file, whatever this version of transformers calls them."""
    weights = revert_weight_conversion(model, model.state_dict())
    return {name.removeprefix("vision_model."): value for name, value in weights.items()}  # the prefix comes and goes


@contextmanager
def _quiet() -> Iterator[None]:
    """Let transformers log errors only: leaving the text half out is no news, and faults are raised by this module."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


def _reason(error: BaseException) -> str:
    """What a library said, short enough for one line of ours."""
    if isinstance(error, pickle.UnpicklingError):  # its own text advises to switch the protection off
        return "the file is no plain PyTorch state dict; anything else may run code and is not loaded"
    if isinstance(error, (KeyError, IndexError)) or not str(error).strip():
        return f"{type(error).__name__} {error}".strip()
    line = " ".join(str(error).split("\n\n")[0].split())
    return (line if len(line) <= 200 else line[:200] + " …").rstrip(".")
