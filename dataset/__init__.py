"""From the two prepared files to tensors. Importing this package loads neither torch nor transformers by itself."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .collator import VLMCollator
    from .image_caption_dataset import ImageCaptionDataset
    from .image_io import ImageError, load_image, resolve_image_path
    from .prompt import SYSTEM_PROMPT, EncodedSample, SampleError, encode_prompt, encode_sample

__all__ = [
    "SYSTEM_PROMPT",
    "EncodedSample",
    "ImageCaptionDataset",
    "ImageError",
    "SampleError",
    "VLMCollator",
    "encode_prompt",
    "encode_sample",
    "load_image",
    "resolve_image_path",
]

_MODULES = {
    "ImageCaptionDataset": "image_caption_dataset",
    "VLMCollator": "collator",
    "ImageError": "image_io",
    "load_image": "image_io",
    "resolve_image_path": "image_io",
}


def __getattr__(name: str) -> Any:
    # dataprocess opens images through dataset.image_io and must not have to load torch for that.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES.get(name, 'prompt')}"), name)
