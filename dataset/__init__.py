"""Stage 2: from the two prepared files to tensors."""

from dataprocess.image_io import ImageError, load_image, resolve_image_path

from .collator import VLMCollator
from .image_caption_dataset import ImageCaptionDataset
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
