"""Features of a frozen tower on disk: filled first, then read, so that the tower sees each picture once.

    DIR/<tower>-<dtype>/tower.json             what the features belong to, for people
    DIR/<tower>-<dtype>/3f/3f…e2.safetensors   the features of one picture, named by the SHA-256 of its file
    DIR/<tower>-<dtype>/tmp/…                  files that are being written

<tower> is a hash of the tower's weights, of its settings and of the image transform, so a cache never serves anything
stale: whatever changes has another name. A file appears whole, by renaming, and holds a checksum that finds what a disk
or a power cut did to it. Any number of processes may fill a folder at once: at worst, one repeats another's work.

Shape legend: P tokens per image, D width of the tower.
"""

import hashlib
import json
import logging
import os
import secrets
import stat
import zlib
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from .base import VisionTower

logger = logging.getLogger(__name__)

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
"""The dtypes that features can be stored in, by name."""
NOTE = "tower.json"
"""The file that tells people what a folder's features belong to."""

_FORMAT = 2
"""Raised when the stored bytes change: the files' form, or what `load_image` and `ImageTransform` make of a picture."""
_TOWER_SETTINGS = ("hidden_act", "layer_norm_eps", "num_attention_heads", "patch_size", "image_size")
_IMAGE_SETTINGS = (
    *("image_processor_type", "do_resize", "size", "resample", "do_center_crop", "crop_size"),
    *("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"),
)


class FeatureCache:
    """The features (P, D) of pictures seen through one tower, stored in one dtype; cheap to pickle into data workers.

    `folder` is that of the tower and dtype, as the module's docstring explains it. It need not exist.
    """

    def __init__(self, folder: Path, shape: tuple[int, int], dtype: torch.dtype) -> None:
        self.folder = folder
        self.shape = shape
        self.dtype = dtype
        self.file_bytes = len(self._serialise(b"", torch.zeros(shape, dtype=dtype)))
        """Size of every file."""

    def path_of(self, key: bytes) -> Path:
        """Return the file of a picture's features, whether or not it exists."""
        name = key.hex()
        return self.folder / name[:2] / f"{name}.safetensors"

    def read(self, key: bytes) -> Tensor | None:
        """Read a picture's features (P, D) by its key; None if they are missing, or damaged, which is logged."""
        path = self.path_of(key)
        try:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode) or status.st_size != self.file_bytes:
                raise ValueError(f"{status.st_size} bytes, expected {self.file_bytes}")
            tensors = safetensors.torch.load(path.read_bytes())
            features = tensors["features"]  # (P, D)
            is_like_ours = tuple(features.shape) == self.shape and features.dtype == self.dtype
            if not is_like_ours or tensors["check"].tolist() != [self._checksum(key, features)]:
                raise ValueError("its shape, dtype or checksum is wrong")
            return features
        except FileNotFoundError:
            pass
        except Exception as error:  # a damaged file makes its reader raise nearly anything
            logger.warning("%s is damaged (%s): the next filling replaces it", path, " ".join(str(error).split()))
        return None

    def write(self, key: bytes, features: Tensor) -> None:
        """Store a picture's features (P, D), in the cache's dtype and on the CPU, whole or not at all.

        Raises:
            OSError: if the disk is full, or the folder cannot be written to. No part of a file is left then.
        """
        self.write_file(self.path_of(key), self._serialise(key, features))

    def num_pictures(self) -> int:
        """Count the stored pictures by listing the folder."""
        return sum(1 for _ in self.folder.glob("??/*.safetensors"))

    def _checksum(self, key: bytes, features: Tensor) -> int:
        """CRC-32 over the tower's key, the picture's and the features: a file under another's name is found too."""
        return zlib.crc32(_bytes_of(features), zlib.crc32(self.folder.name.encode() + key))

    def _serialise(self, key: bytes, features: Tensor) -> bytes:
        check = torch.tensor([self._checksum(key, features)])
        return safetensors.torch.save({"features": features.contiguous(), "check": check})

    def write_file(self, target: Path, content: bytes) -> None:
        """Write a file under another name and rename it, so that it appears whole or not at all."""
        part = self.folder / "tmp" / secrets.token_hex(16)
        for folder in (part.parent, target.parent):
            folder.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("xb") as file:
                file.write(content)
            part.replace(target)
        except BaseException:  # an interrupt too
            part.unlink(missing_ok=True)
            raise


def open_feature_cache(directory: str | os.PathLike[str], tower: VisionTower, dtype: str) -> FeatureCache:
    """Open the cache of a tower's features in a folder, which may hold those of other towers too.

    The folder is made if need be; `dtype` is a name in `DTYPES`.

    Raises:
        ValueError: if it cannot be made. An existing one that cannot be written to is read.
    """
    folder = Path(directory).absolute() / f"{tower_key(tower)}-{dtype}"
    shape = (tower.num_image_tokens, tower.hidden_size)
    cache = FeatureCache(folder, shape, DTYPES[dtype])
    note = {"tower": tower.name_or_path, "kind": tower.kind, "shape": shape, "dtype": dtype}
    try:
        if not (folder / NOTE).exists():
            cache.write_file(folder / NOTE, json.dumps(note, indent=2, ensure_ascii=False).encode() + b"\n")
    except OSError as error:
        if not folder.is_dir():
            problem = f"--feature_cache {directory} can't be made ({error.strerror})"
            raise ValueError(f"{problem}; give a folder that can be written to") from None
    logger.info("features of images are kept in %s", folder)
    return cache


def tower_key(tower: VisionTower) -> str:
    """Hash everything that a tower's features depend on, apart from the picture.

    Each value of each weight counts, as it is loaded: a tower in bf16 has another key than the same one in fp32. Names
    are those of the published files, so an upgrade of transformers keeps the key. 300 million parameters take some
    seconds.
    """
    config = {name: getattr(tower.config, name, None) for name in _TOWER_SETTINGS}
    if hasattr(tower.config, "rope_theta"):  # DINOv3's positions; keys of other towers stay as they are
        config["rope_theta"] = tower.config.rope_theta
    processor = tower.image_transform.processor.to_dict()
    images = {name: processor.get(name) for name in _IMAGE_SETTINGS}
    shape = [tower.kind, tower.image_size, tower.num_image_tokens, tower.hidden_size, tower.num_skipped]
    digest = hashlib.sha256(json.dumps([_FORMAT, shape, config, images], sort_keys=True, default=str).encode())
    for name, value in sorted(published_weights(tower.model).items()):
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(_bytes_of(value))
    return digest.hexdigest()[:16]


def published_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return a model's weights by the names of its published file, whatever this version of transformers calls them."""
    weights = revert_weight_conversion(model, model.state_dict())
    return {name.removeprefix("vision_model."): value for name, value in weights.items()}  # the prefix comes and goes


def _bytes_of(value: Tensor) -> memoryview:
    return value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
