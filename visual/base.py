"""The frozen vision tower: images in, one feature vector per patch out.

Shape legend: N images, S side of the input in pixels, P image tokens (patches), D width of the tower.
"""

import logging
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .loading import load_config, load_image_processor, load_model

logger = logging.getLogger(__name__)


class ImageTransform:
    """From a PIL image in RGB to the pixels a tower was trained on, by the checkpoint's own image processor.

    Holds settings only, so it is cheap to pickle into data-loading workers.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        settings = processor.to_dict()
        # Such a processor enlarges a strip's whole length and then keeps its middle: gigabytes for 1 × 5000 pixels.
        self.cuts_strips = bool(settings.get("do_center_crop")) and "shortest_edge" in (settings.get("size") or {})

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Resize, crop, rescale and normalise one image.

        Args:
            image: a PIL image of any size in mode RGB.

        Returns:
            (3, H, W), float32, equal to the image processor's `pixel_values`; only of a picture more than 256 times
            longer than wide, which is cut to its middle first, the pixels may be shifted by a part of a pixel.

        Raises:
            ValueError: if the image is in another mode: what becomes of alpha or palettes is for the caller to say.
        """
        if image.mode != "RGB":
            raise ValueError(f"the image transform takes RGB images, got mode {image.mode!r}: convert the image first")
        width, height = image.size
        x, y = (max(0, (long - 256 * short) // 2) for long, short in ((width, height), (height, width)))
        if self.cuts_strips and (x or y):
            image = image.crop((x, y, width - x, height - y))
        pixels = self.processor(images=image, return_tensors="pt")["pixel_values"][0]
        return pixels.to(torch.float32)


class VisionTower(nn.Module):
    """A frozen vision transformer that turns images into one feature vector per patch.

    Features are the last hidden state of transformers' own model, without the tokens that stand for no patch. A new
    backbone is a subclass that sets the class attributes below, and a line in `visual.TOWERS`.

    Args:
        name_or_path: a local folder or a hub name, with config.json, weights and preprocessor_config.json. Of a
            CLIP-like checkpoint only the vision half is loaded.
        dtype: data type of the weights and the features; None is float32.
        drop_first_patch: leave the first patch out, as checkpoints of the original project were trained; only where
            the class allows it.

    Raises:
        FileNotFoundError: if the weights' or the image processor's file is missing.
        ValueError: if files do not fit each other, or for `drop_first_patch` where the tower does not allow it.
    """

    kind: ClassVar[str]
    """The family's `model_type`, as saved with a trained model."""
    model_class: ClassVar[type[PreTrainedModel]]
    """The vision model of transformers."""
    num_prefix_tokens: ClassVar[int] = 1
    """Tokens before the patches in the last hidden state, registers left out: the class token."""
    model_kwargs: ClassVar[dict[str, Any]] = {}
    """Further arguments of the model's `__init__`."""
    config_overrides: ClassVar[dict[str, Any]] = {}
    """Configuration values to set, such as switching off a head whose output is not used."""
    any_image_size: ClassVar[bool] = False
    """Whether the model interpolates its positions, so that the image processor decides the size."""
    may_drop_first_patch: ClassVar[bool] = False
    """Whether `drop_first_patch` is allowed."""

    name_or_path: str
    """The folder or hub name that the tower was loaded from, as it was given."""
    config: PreTrainedConfig
    """The vision model's configuration."""
    drop_first_patch: bool
    """Whether SigLIP's first patch is left out."""
    image_size: int
    """S: height and width of the input in pixels."""
    hidden_size: int
    """D: width of a feature."""
    num_image_tokens: int
    """P: features per image."""
    image_transform: ImageTransform
    """(PIL RGB image) -> (3, S, S)."""

    def __init__(self, name_or_path: str, dtype: torch.dtype | None = None, *, drop_first_patch: bool = False) -> None:
        super().__init__()
        if drop_first_patch and not self.may_drop_first_patch:
            raise ValueError(f"drop_first_patch is for SigLIP towers only; {name_or_path} is {self.kind}")
        self.name_or_path = name_or_path
        config = load_config(self.model_class, name_or_path, self.config_overrides)
        self.image_transform = ImageTransform(load_image_processor(name_or_path))
        self.image_size = self.input_size(name_or_path, config, self.image_transform)
        self.config = config
        self.hidden_size = config.hidden_size
        self.drop_first_patch = drop_first_patch
        registers = getattr(config, "num_register_tokens", 0)  # extra tokens after the class token
        self.num_skipped = self.num_prefix_tokens + registers + int(drop_first_patch)
        self.num_image_tokens = (self.image_size // config.patch_size) ** 2 - int(drop_first_patch)
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
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != expected:
            raise ValueError(
                f"pixel_values must have shape (N, {', '.join(map(str, expected))}), got {tuple(pixel_values.shape)}: "
                "use the tower's image_transform and stack its results"
            )
        if not pixel_values.is_floating_point():
            raise ValueError(f"pixel_values must be floating point, got {pixel_values.dtype}: use image_transform")
        pixel_values = pixel_values.to(device=self.model.device, dtype=self.model.dtype)  # (N, 3, S, S)
        if pixel_values.shape[0] == 0:  # the attention of transformers cannot reshape an empty batch
            return pixel_values.new_empty(0, self.num_image_tokens, self.hidden_size)
        hidden = self.model(pixel_values=pixel_values).last_hidden_state  # (N, prefix + patches, D)
        # The class token sums up the whole image; the language model gets one token for each place in it instead.
        return hidden[:, self.num_skipped :]  # (N, P, D)

    @classmethod
    def input_size(cls, name_or_path: str, config: PreTrainedConfig, transform: ImageTransform) -> int:
        """Return S, after trying the transform on a wide and a tall image: both must give the square the model takes.

        Raises:
            ValueError: if they do not.
        """
        shapes = {tuple(transform(Image.new("RGB", size)).shape) for size in ((40, 30), (30, 40))}
        side = next(iter(shapes))[-1] if cls.any_image_size else config.image_size
        if shapes != {(3, side, side)}:
            made = " and ".join("×".join(map(str, shape[1:])) for shape in sorted(shapes))
            wanted = "one square" if cls.any_image_size else f"{side}×{side}"
            raise ValueError(
                f"{name_or_path}: its preprocessor_config.json makes images of {made} px (height×width), but the "
                f"model takes {wanted}: use the preprocessor_config.json that belongs to this model"
            )
        return side
