"""Read a published vision checkpoint: its configuration, its weights and its image processor.

transformers' own loaders do the work. This module adds one clear error for each thing that can be wrong, keeps quiet
about the text half that is left out on purpose, and never runs code from the checkpoint. A damaged or foreign file may
make transformers raise nearly anything, so every exception of a reader becomes such an error.
"""

import pickle
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from PIL import Image
from transformers import AutoImageProcessor, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

# A block that the configuration does not know. Other surplus weights (a text half, a pooling head) are no fault.
_SURPLUS_BLOCK = re.compile(r"^(?:vision_model\.|vit\.|dinov2\.|model\.)?(?:encoder\.)?layers?\.\d+\.")


def load_config(
    model_class: type[PreTrainedModel], name_or_path: str, overrides: Mapping[str, Any]
) -> PreTrainedConfig:
    """Load the configuration of the vision half, which a CLIP-like config.json holds under `vision_config`.

    Raises:
        ValueError: if the file's values cannot be those of such a model.
    """
    config_class = cast(type[PreTrainedConfig], model_class.config_class)
    with one_error(f"the config.json of {name_or_path} is no {config_class.__name__}"):
        config = config_class.from_pretrained(name_or_path, trust_remote_code=False)
    for name, value in overrides.items():
        setattr(config, name, value)
    if config.num_channels != 3:
        raise ValueError(f"{name_or_path} takes {config.num_channels} channels; only RGB towers (3) are supported")
    for name in ("image_size", "patch_size"):
        value = getattr(config, name)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name_or_path}: {name} must be one positive integer, got {value!r}")
    return config


def load_model(
    model_class: type[PreTrainedModel], name_or_path: str, config: PreTrainedConfig, dtype: torch.dtype, **kwargs: Any
) -> PreTrainedModel:
    """Load the weights that `model_class` has, straight into `dtype`; others in the file (a text half) are ignored.

    They may be safetensors or .bin (read with weights_only), one file or shards. `kwargs` go to the model.

    Raises:
        FileNotFoundError: if there is no file with weights.
        ValueError: if the weights cannot be read, or do not fit the configuration: some are missing, of another
            shape, or of more blocks than configured.
    """
    with one_error(f"the weights of {name_or_path} cannot be loaded", FileNotFoundError):
        loaded: Any = model_class.from_pretrained(
            name_or_path,
            config=config,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are reported below, with everything else
            trust_remote_code=False,
            **kwargs,
        )
    model, info = loaded
    faults = {
        "missing": info["missing_keys"],
        "of another shape": [f"{name} is {tuple(a)}, not {tuple(b)}" for name, a, b in info["mismatched_keys"]],
        "not in the configuration": [name for name in info["unexpected_keys"] if _SURPLUS_BLOCK.match(name)],
        "not readable": info["error_msgs"],
    }
    found = [f"{len(names)} {fault} ({', '.join(sorted(names)[:3])})" for fault, names in faults.items() if names]
    if found:
        raise ValueError(
            f"the weights of {name_or_path} do not fit its config.json as {model_class.__name__}: {'; '.join(found)}. "
            "Use the config.json and the weights of one and the same model"
        )
    return model


def load_image_processor(name_or_path: str, side: int | None, processor_class: Any = None) -> tuple[Any, int]:
    """Load the checkpoint's own image processor in its Pillow form, and try it on a wide and a tall image.

    The torchvision form gives other pixels (by up to 0.015), and a model must not depend on what else is installed.

    `processor_class` reads preprocessor_config.json where that names a processor without a Pillow form.

    Returns the processor, and the side of the squares that it makes: `side` as the model takes it, or any if None.

    Raises:
        FileNotFoundError: if the checkpoint has no preprocessor_config.json.
        ValueError: if it cannot be used, or makes another size than the model takes.
    """
    problem = f"the image processor of {name_or_path} cannot be used; take preprocessor_config.json from its publisher"
    with one_error(problem, FileNotFoundError):
        if processor_class is None:
            processor = AutoImageProcessor.from_pretrained(name_or_path, backend="pil", trust_remote_code=False)
        else:
            processor = processor_class.from_pretrained(name_or_path, trust_remote_code=False)
        images = [Image.new("RGB", size) for size in ((40, 30), (30, 40))]
        made = {tuple(processor(images=image, return_tensors="pt")["pixel_values"].shape[2:]) for image in images}
        height, width = min(made)
    if len(made) > 1 or height != width or side not in (None, height):
        raise ValueError(
            f"{name_or_path}: its preprocessor_config.json makes images of "
            f"{' and '.join('×'.join(map(str, size)) for size in sorted(made))} px (height×width), but the model takes "
            f"{f'{side}×{side}' if side else 'one square'}: use the preprocessor_config.json that belongs to this model"
        )
    return processor, height


@contextmanager
def one_error(problem: str, if_missing: type[Exception] = ValueError) -> Iterator[None]:
    """Let transformers log errors only, and turn whatever it raises into a ValueError that names the problem.

    An OSError, by which it says that a file is missing, becomes `if_missing`.
    """
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split("\n\n")[0].split()).rstrip(".")[:200]
        if isinstance(error, pickle.UnpicklingError):  # its own text advises to switch the protection off
            reason = "the file is no plain PyTorch state dict; anything else may run code and is not loaded"
        elif isinstance(error, (KeyError, IndexError)) or not reason:
            reason = f"{type(error).__name__} {error}".strip()
        raise (if_missing if isinstance(error, OSError) else ValueError)(f"{problem}: {reason}") from error
    finally:
        transformers_logging.set_verbosity(level)
