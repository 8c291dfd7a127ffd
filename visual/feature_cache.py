"""A frozen tower's features, kept on disk: a tower that never changes need not see a picture twice.

    DIR/<tower>-<dtype>/tower.json             what the features are of, for people
    DIR/<tower>-<dtype>/3f/3f…e2.safetensors   the features of one picture, by the SHA-256 of its file
    DIR/<tower>-<dtype>/tmp/…                  what is being written

<tower> is a hash of every weight, the configuration and the image transform, so whatever changes has other names, and
nothing is ever served stale. A file appears whole, by renaming; each holds a checksum, so that what a disk or a power
cut did to it is found when it is read. Any number of processes may read and write at once: at worst, one does what
another has done already.

Shape legend: N images, T image tokens, D width of the tower.
"""

import errno
import hashlib
import json
import logging
import os
import secrets
import stat
import time
import zlib
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from visual.base import VisionTower

logger = logging.getLogger(__name__)

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
"""What features can be stored in, by name."""
KEY_BYTES = 32
"""Length of an image's key."""
NOTE = "tower.json"
"""Name of the file that says to people what a folder's features are of."""

_FORMAT = 1
"""Raised when what is stored changes: the files' form, or what `load_image` and `ImageTransform` make of a picture."""
_LARGEST_IMAGE_FILE = 1 << 30
"""Bytes. Larger files are not looked up; hashing one would take longer than to see that it is no picture."""
_LEFT_BEHIND = 3600.0
"""Seconds after which a file that is still being written belongs to a process that was killed."""
_NO_NUMBERS = "features that are infinite or no numbers are not stored; does the tower run in too small a dtype?"
_IGNORED_SETTINGS = ("architectures", "dtype", "torch_dtype", "transformers_version")


def tower_key(tower: VisionTower) -> str:
    """Hash everything that a tower's features depend on beside the picture: weights, configuration, image transform.

    Every value of every weight counts, as it is loaded: a tower in bf16 has another key than the same one in fp32.

    Args:
        tower: the tower; 300 million parameters take some seconds.

    Returns:
        16 hexadecimal digits.
    """
    config = {
        name: value
        for name, value in tower.config.to_dict().items()
        if not name.startswith("_") and name not in _IGNORED_SETTINGS
    }
    processor = tower.image_transform.processor
    images = {"class": type(processor).__name__, **processor.to_dict()}
    shape = [tower.kind, tower.image_size, tower.num_image_tokens, tower.hidden_size, tower.num_skipped]
    digest = hashlib.sha256(json.dumps([_FORMAT, shape, config, images], sort_keys=True, default=str).encode())
    for name, value in sorted(tower.state_dict().items()):
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(_bytes_of(value))
    return digest.hexdigest()[:16]


def _bytes_of(value: Tensor) -> memoryview:
    return value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


class FeatureCache:
    """The features of pictures seen through one tower, stored in one dtype.

    Cheap to pickle into data workers, which read; the process that runs the tower writes.

    Args:
        folder: where they lie; see the module's docstring. It need not exist.
        shape: (T, D).
        dtype: what they are stored in.
    """

    failure: str
    """Why nothing can be stored any more, or an empty string."""
    num_stored: int
    """How many pictures this process has stored."""
    misfits: dict[bytes, str]
    """Pictures of the batch that was remembered last whose features can't be stored, by key, and why."""

    def __init__(self, folder: Path, shape: tuple[int, int], dtype: torch.dtype) -> None:
        self.folder = folder
        self.shape = shape
        self.dtype = dtype
        self.failure = ""
        self.num_stored = 0
        self.misfits = {}
        self._warned: set[str] = set()
        self.file_bytes = len(self._serialise(bytes(KEY_BYTES), torch.zeros(shape, dtype=dtype)))
        """Size of every file."""

    # ---- Reading

    @staticmethod
    def key_of(path: str | os.PathLike[str]) -> bytes | None:
        """Hash a file's content: equal pictures share their features, whatever they are called.

        Returns:
            `KEY_BYTES` bytes, or None if it can't be read: `load_image` says why.
        """
        digest = hashlib.sha256()
        try:
            status = os.stat(path)  # noqa: PTH116 - once per sample
            if not stat.S_ISREG(status.st_mode) or status.st_size > _LARGEST_IMAGE_FILE:
                return None
            with open(path, "rb") as file:  # noqa: PTH123
                while block := file.read(1 << 20):
                    digest.update(block)
        except (OSError, ValueError):  # ValueError: characters that no file name can hold
            return None
        return digest.digest()

    def path_of(self, key: bytes) -> Path:
        """Where the features of a picture lie, or would."""
        name = key.hex()
        return self.folder / name[:2] / f"{name}.safetensors"

    def has(self, key: bytes) -> bool:
        """Whether there is a file of the right size; only `read` tells whether it is whole."""
        try:
            status = self.path_of(key).stat()
        except OSError:
            return False
        return stat.S_ISREG(status.st_mode) and status.st_size == self.file_bytes

    def read(self, key: bytes) -> Tensor | None:
        """The features of a picture.

        Args:
            key: as `key_of` gives it.

        Returns:
            (T, D) in the cache's dtype; None if they are not there, or damaged, which is logged.
        """
        path = self.path_of(key)
        try:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode) or status.st_size != self.file_bytes:
                raise ValueError(f"{status.st_size} bytes, expected {self.file_bytes}")
            tensors = safetensors.torch.load(path.read_bytes())
            features = tensors["features"]
            if tuple(features.shape) != self.shape or features.dtype != self.dtype:
                raise ValueError(f"{tuple(features.shape)} {features.dtype}, expected {self.shape} {self.dtype}")
            if tensors["check"].tolist() != [self._checksum(key, features)]:
                raise ValueError("its checksum is wrong")
            return features
        except FileNotFoundError:
            return None
        except Exception as error:  # a damaged file makes its reader raise nearly anything
            logger.warning("%s is damaged (%s); its features are computed anew", path, " ".join(str(error).split()))
            return None

    def _checksum(self, key: bytes, features: Tensor) -> int:
        """CRC-32 over key and features, begun with the tower's key: a file under another's name is found too."""
        return zlib.crc32(_bytes_of(features), zlib.crc32(self.folder.name.encode() + key))

    def _serialise(self, key: bytes, features: Tensor) -> bytes:
        check = torch.tensor([self._checksum(key, features)])
        return safetensors.torch.save({"features": features.contiguous(), "check": check})

    # ---- Writing

    def write(self, key: bytes, features: Tensor) -> None:
        """Store the features of a picture, whole or not at all.

        Args:
            key: as `key_of` gives it.
            features: (T, D) in the cache's dtype, on the CPU.

        Raises:
            OSError: if the disk is full, or the folder can't be written to. Nothing is left behind then.
        """
        target = self.path_of(key)
        part = self.folder / "tmp" / secrets.token_hex(16)
        try:
            try:
                file = part.open("xb")
            except FileNotFoundError:
                part.parent.mkdir(parents=True, exist_ok=True)
                file = part.open("xb")
            with file:
                file.write(self._serialise(key, features))
            try:
                part.replace(target)
            except FileNotFoundError:
                target.parent.mkdir(exist_ok=True)
                part.replace(target)
        except BaseException:
            part.unlink(missing_ok=True)
            raise

    @torch.compiler.disable
    def remember(self, features: Tensor, keys: NDArray[np.uint8]) -> Tensor:
        """Store a batch. Where that fails, it is logged once, and nothing is stored from then on.

        Args:
            features: (N, T, D), as the tower gives them.
            keys: (N, KEY_BYTES); a row of zeros stands for a picture that is not to be stored.

        Returns:
            (N, T, D): the features rounded as they will be when they are read back, so that results do not depend on
            what was there already. Those that the dtype can't hold stay as they are, and are `misfits`.
        """
        stored = features.detach().to(self.dtype)
        on_cpu = stored.cpu()
        fits = on_cpu.flatten(1).isfinite().all(dim=1)
        self.misfits = {}
        for row, key in enumerate(keys):
            if fits[row] and key.any() and not self.failure:
                try:
                    self.write(key.tobytes(), on_cpu[row])
                    self.num_stored += 1
                except OSError as error:
                    self.failure = f"{error.strerror or error}"
                    logger.warning("%s: features can't be stored any more (%s)", self.folder, self.failure)
        if fits.all():
            return stored
        name = str(self.dtype).removeprefix("torch.")
        too_large = f"features that {name} can't hold are not stored; bfloat16 has a wider range"
        finite = features.detach().flatten(1).isfinite().all(dim=1).tolist()
        for row in (~fits).nonzero()[:, 0].tolist():
            reason = too_large if finite[row] else _NO_NUMBERS
            self.misfits[keys[row].tobytes()] = reason
            if reason not in self._warned:
                self._warned.add(reason)
                logger.warning(reason)
        return torch.where(fits.to(features.device)[:, None, None], stored.to(features.dtype), features)

    def prepare(self, description: dict[str, object]) -> None:
        """Make the folder, say in it what it holds, and delete what killed processes left in `tmp`.

        Raises:
            OSError: if it can't be written to.
        """
        temporary = self.folder / "tmp"
        temporary.mkdir(parents=True, exist_ok=True)
        for path in temporary.iterdir():
            try:
                if path.stat().st_mtime < time.time() - _LEFT_BEHIND:
                    path.unlink(missing_ok=True)
            except FileNotFoundError:  # just renamed, or deleted by another process
                continue
        note = self.folder / NOTE
        if not note.exists():
            part = temporary / secrets.token_hex(16)
            try:
                part.write_text(json.dumps(description, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
                part.replace(note)
            finally:
                part.unlink(missing_ok=True)

    def __len__(self) -> int:
        """How many pictures there are, by a look at the folders."""
        folders = [path for path in self.folder.glob("??") if path.is_dir()]
        return sum(name.endswith(".safetensors") for folder in folders for name in os.listdir(folder))  # noqa: PTH208


def open_feature_cache(directory: str | os.PathLike[str], tower: VisionTower, dtype: str) -> FeatureCache:
    """The cache of a tower's features in a folder, which may hold those of other towers too.

    Args:
        directory: the folder; made if need be.
        tower: the tower.
        dtype: a name in `DTYPES`.

    Raises:
        ValueError: the folder can't be made. One that is there and can't be written to is read.
    """
    root = Path(directory).absolute()
    if root.exists() and not root.is_dir():
        raise ValueError(f"--feature_cache {directory} is a file; give a folder, which is made if need be")
    shape = (tower.num_image_tokens, tower.hidden_size)
    cache = FeatureCache(root / f"{tower_key(tower)}-{dtype}", shape, DTYPES[dtype])
    try:
        cache.prepare({"tower": tower.name_or_path, "kind": tower.kind, "shape": shape, "dtype": dtype})
    except OSError as error:  # the first write will say so again, should there be one
        if not root.is_dir() and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise ValueError(
                f"--feature_cache {directory} can't be made ({error.strerror}); give a folder that can be written to"
            ) from None
    logger.info("features of images are kept in %s", cache.folder)
    return cache
