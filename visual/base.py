"""The frozen vision tower: images in, one feature vector per patch out.

Shape legend: N images, S side of the input in pixels, P image tokens (patches), D width of the tower.
"""

import logging
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import nn
from transformers import PreTrainedModel

from .loading import load_config, load_image_processor, load_model
from .strips import cut_strip

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageTransform:
    """From a PIL image in RGB to the pixels a tower was trained on, by the checkpoint's own image processor.

    Holds settings only, so it is cheap to pickle into data-loading workers.
    """

    processor: Any

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Resize, crop, rescale and normalise one image.

        Args:
            image: a PIL image of any size in mode RGB.

        Returns:
            (3, S, S), float32, equal to the image processor's `pixel_values`; only of a picture more than 256 times
            longer than wide, which is cut to its middle first, the pixels may be shifted by a part of a pixel.

        Raises:
            ValueError: if the image is in another mode: what becomes of alpha or palettes is for the caller to say.
        """
        if image.mode != "RGB":
            raise ValueError(f"the image transform takes RGB images, got mode {image.mode!r}: convert the image first")
        if max(image.size) > 256 * min(image.size):
            image = cut_strip(image, self.processor)
        pixels = self.processor(images=image, return_tensors="pt")["pixel_values"][0]  # (3, S, S)
        return pixels.to(torch.float32)


class VisionTower(nn.Module):
    """A frozen vision transformer that turns images into one feature vector per patch.

    Features are the last hidden state of transformers' own model, without the tokens that stand for no patch. A new
    backbone is a subclass that sets the class attributes below, and a line in `visual.TOWERS`.

    `visual.build_vision_tower` explains the arguments.
    """

    kind: ClassVar[str]  # the family's `model_type`, as saved with a trained model
    model_class: ClassVar[type[PreTrainedModel]]  # the vision model of transformers
    processor_class: ClassVar[Any] = None  # of a family whose own image processor has no Pillow form
    num_prefix_tokens: ClassVar[int] = 1  # tokens before the patches in the last hidden state: the class token
    model_kwargs: ClassVar[dict[str, Any]] = {}  # further arguments of the model's `__init__`
    config_overrides: ClassVar[dict[str, Any]] = {}  # such as switching off a head whose output is not used
    any_image_size: ClassVar[bool] = False  # positions are interpolated, so the image processor decides the size
    may_drop_first_patch: ClassVar[bool] = False  # whether `drop_first_patch` is allowed
    feature_layer = -1  # the hidden state that features are: the last one, or see `feature_layer.py`

    def __init__(self, name_or_path: str, dtype: torch.dtype | None = None, *, drop_first_patch: bool = False) -> None:
        super().__init__()
        if drop_first_patch and not self.may_drop_first_patch:
            raise ValueError(f"drop_first_patch is for SigLIP towers only; {name_or_path} is {self.kind}")
        self.name_or_path = name_or_path
        self.drop_first_patch = drop_first_patch
        self.config = config = load_config(self.model_class, name_or_path, self.config_overrides)
        side = None if self.any_image_size else config.image_size
        processor, self.image_size = load_image_processor(name_or_path, side, self.processor_class)  # S
        self.image_transform = ImageTransform(processor)
        registers = getattr(config, "num_register_tokens", 0)  # extra tokens after the class token
        self.num_skipped = self.num_prefix_tokens + registers + int(drop_first_patch)
        self.num_image_tokens: int = (self.image_size // config.patch_size) ** 2 - int(drop_first_patch)  # P
        self.hidden_size: int = config.hidden_size  # D
        self.model = load_model(self.model_class, name_or_path, config, dtype or torch.float32, **self.model_kwargs)
        self.requires_grad_(False)
        self.eval()
        logger.info(
            "vision tower %s (%s): %d px, %d tokens of %d, %s, frozen",
            *(name_or_path, self.kind, self.image_size, self.num_image_tokens, self.hidden_size, self.model.dtype),
        )

    def train(self, mode: bool = True) -> "VisionTower":
        """Stay in `eval()`, whatever the model around it does: dropout would change the features."""
        del mode
        return super().train(False)

    @torch.no_grad()
    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the features of a batch of images, without gradients.

        Args:
            pixel_values: (N, 3, S, S), floating point; moved to the tower's device and data type. N may be 0.

        Returns:
            (N, P, D) in the tower's data type.

        Raises:
            ValueError: for another shape, or integers (images that did not go through `image_transform`).
        """
        expected = (3, self.image_size, self.image_size)
        if tuple(pixel_values.shape[1:]) != expected or not pixel_values.is_floating_point():
            raise ValueError(
                f"pixel_values must be floating point of shape (N, {', '.join(map(str, expected))}), got "
                f"{pixel_values.dtype} of {tuple(pixel_values.shape)}: stack what the tower's image_transform gives"
            )
        pixel_values = pixel_values.to(device=self.model.device, dtype=self.model.dtype)  # (N, 3, S, S)
        if pixel_values.shape[0] == 0:  # the attention of transformers cannot reshape an empty batch
            return pixel_values.new_empty(0, self.num_image_tokens, self.hidden_size)
        hidden = self.model(pixel_values=pixel_values).last_hidden_state  # (N, prefix + patches, D)
        # The class token sums up the whole image; the language model gets one token for each place in it instead.
        return hidden[:, self.num_skipped :]  # (N, P, D)
