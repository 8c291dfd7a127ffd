"""The training set: token ids, labels and pixel values of one sample at a time."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, get_worker_info

from dataprocess.image_io import ImageError, load_image, resolve_image_path
from dataprocess.messages import format_count
from qwen import IGNORE_INDEX
from qwen.tokenization_qwen import QWenTokenizer

from .annotations import Annotations, Sample
from .bad_samples import BadSamples
from .epoch_order import draw_alternative
from .prompt import SYSTEM_PROMPT, SampleError, encode_sample
from .sample_sizes import estimated_lengths, padding_shares

logger = logging.getLogger(__name__)

_NO_KEY = bytes(32)
# One row of counters per data worker and one for the main process: nobody waits, and no count is lost.
_MAX_WORKERS = 1024


class FeatureSource(Protocol):
    """Where features of images may be stored, as `visual.feature_cache.FeatureCache` does it."""

    def key_of(self, path: Path) -> bytes | None:
        """Hash of a file's content, 32 bytes; None if it can't be read."""

    def read(self, key: bytes) -> torch.Tensor | None:
        """(P, D): the features of the image with that hash; None if they are not there."""


class ImageCaptionDataset(Dataset[dict[str, Any]]):
    """Samples of an image map and a captions file.

    Both files are read once and checked; images are opened when their sample is asked for. A sample is a dict:
    `input_ids` and `labels` int64 (T,), `id` int, and, where it has images, `pixel_values` float32 (images, 3, H, W).
    With a `feature_cache`, `vision_features` (images, P, D) stand in their place if those of all its images are stored,
    and no image is opened; else `image_keys`, a uint8 array (images, 32), say what to store them under; zeros: not to.

    Args:
        image_map: path of `image_map.json`.
        captions_file: path of `captions.json`.
        tokenizer: QWen's tokenizer.
        image_transform: the vision tower's own, PIL RGB -> float tensor (3, H, W).
        num_image_tokens: the tower's features per image.
        max_length: the most tokens of a sample; more are cut from the end of the last answer.
        seed: decides, with epoch and ID, which alternative answer is used.
        system: the system prompt.
        training: draw among alternatives; otherwise the first one is used.
        max_samples: use only the first so many.
        allow_links: follow links that lead out of the image folder.
        on_bad_sample: "error", or "skip": a bad sample is left out where the two files show it, and where it shows
            only when it is asked for, it becomes a sample of one token without a label. `bad` counts both.
        max_bad_fraction: with "skip", the share of the samples that may be bad, 0 to 1.
        feature_cache: where the tower's features of images may be stored.

    Raises:
        ValueError: a file cannot be read or has not the expected form, or a number is out of range.
        SampleError: samples are contradictory or incomplete.
        TooManyBadSamplesError: with "skip", if more of them are bad than may be.
    """

    def __init__(
        self,
        image_map: str | Path,
        captions_file: str | Path,
        tokenizer: QWenTokenizer,
        image_transform: Callable[[Image.Image], torch.Tensor],
        num_image_tokens: int,
        *,
        max_length: int = 2048,
        seed: int = 42,
        system: str = SYSTEM_PROMPT,
        training: bool = True,
        max_samples: int | None = None,
        allow_links: bool = False,
        on_bad_sample: str = "error",
        max_bad_fraction: float = 0.01,
        feature_cache: FeatureSource | None = None,
    ) -> None:
        if on_bad_sample not in ("error", "skip"):
            raise ValueError(f"on_bad_sample must be 'error' or 'skip', got {on_bad_sample!r}")
        for name, value in (("num_image_tokens", num_image_tokens), ("max_length", max_length)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.tokenizer = tokenizer
        self.image_transform = image_transform
        self.num_image_tokens = num_image_tokens
        self.max_length = max_length
        self.seed = seed
        self.system = system
        self.training = training
        self.allow_links = allow_links
        self.feature_cache = feature_cache
        self.captions_file = str(captions_file)
        self.skips_bad = on_bad_sample == "skip"
        self._annotations = Annotations(image_map, captions_file, max_samples, skip_bad=self.skips_bad)
        self.bad = BadSamples(len(self._annotations), self._annotations.errors, max_bad_fraction)
        # In shared memory, so that workers that outlive an epoch see the new one, and their counts are seen here.
        self._epoch = torch.zeros(1, dtype=torch.long).share_memory_()
        self._cuts = torch.zeros(_MAX_WORKERS, 2, dtype=torch.long).share_memory_()
        self._logged_cuts = 0
        logger.info("%s: %s", captions_file, format_count(len(self), "sample"))

    def __len__(self) -> int:
        return len(self._annotations)

    @property
    def fingerprint(self) -> str:
        """Hash of the samples; where their images lie does not count."""
        return self._annotations.fingerprint

    @property
    def epoch(self) -> int:
        """The epoch whose alternatives are drawn, counted from 0."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, before iterating over it; logs what was cut until now.

        Args:
            epoch: counted from 0.
        """
        self.log_cuts()
        self._epoch.fill_(epoch)

    def image_files(self) -> Iterator[Path]:
        """Yield the file of every image of every sample, those left out whose links lead out of their folder."""
        for index in range(len(self)):
            sample = self._annotations[index]
            for name in sample.image_files:
                with contextlib.suppress(ImageError):
                    yield resolve_image_path(sample.image_folder, name, self.allow_links)

    def estimated_lengths(self) -> torch.Tensor:
        """About how many tokens each sample has, (samples,) int32; nothing is tokenised and no image is opened."""
        return estimated_lengths(self._annotations, self.tokenizer, self.num_image_tokens, self.max_length, self.system)

    def padding_shares(self, lengths: torch.Tensor, rows: int, seed: int) -> tuple[float, float]:
        """Shares of padding in batches, 0 to 1: grouped by length, and in random order.

        Args:
            lengths: (samples,) as `estimated_lengths` gives them.
            rows: samples of a batch.
            seed: of the order.
        """
        return padding_shares(
            self._annotations,
            self.tokenizer,
            self.num_image_tokens,
            lengths,
            max_length=self.max_length,
            rows=rows,
            order_seed=seed,
            seed=self.seed,
        )

    @property
    def num_cut(self) -> int:
        """How many times a sample was given with its answer cut, over all epochs and workers."""
        return int(self._cuts[:, 0].sum())

    @property
    def num_cut_tokens(self) -> int:
        """How many answer tokens, end tokens included, were lost that way."""
        return int(self._cuts[:, 1].sum())

    def log_cuts(self) -> None:
        """Log how many samples were cut, if there are new ones since the last call. For the end of a run."""
        total = self.num_cut
        if total > self._logged_cuts:
            logger.warning(
                "%s: %s, an answer was cut at %d tokens; %s lost so far",
                *(
                    self.captions_file,
                    format_count(total, "time"),
                    self.max_length,
                    format_count(self.num_cut_tokens, "token"),
                ),
            )
            self._logged_cuts = total

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The sample at a position; one token without a label in place of a bad one that is skipped.

        Raises:
            IndexError: there is no such position.
            SampleError: its questions leave no room for an answer; the message names its ID.
            ImageError: an image of it cannot be used; the message names its ID and the file.
        """
        try:
            return self._build(index)
        except (SampleError, ImageError):
            if not self.skips_bad:
                raise
        self.bad.mark(index)
        return {
            "input_ids": torch.tensor([self.tokenizer.eod_id]),
            "labels": torch.tensor([IGNORE_INDEX]),
            "id": self._annotations[index].id,
        }

    def bad_sample_messages(self) -> list[str]:
        """What is wrong with each of the samples found bad so far; each message names its sample."""
        messages = list(self.bad.unreadable)
        for index in self.bad.indices:
            try:
                self._build(index)
            except (SampleError, ImageError) as error:
                messages.append(str(error))
            else:  # a file that came back in the meantime
                messages.append(f"sample {self._annotations[index].id}: could not be read, but can be now")
        return messages

    def _build(self, index: int) -> dict[str, Any]:
        sample = self._annotations[index]
        try:
            encoded = encode_sample(
                self.tokenizer, self._choose(sample), self.num_image_tokens, self.system, self.max_length
            )
        except SampleError as error:
            raise SampleError(f"sample {sample.id}: {error}") from None
        self._count_cut(encoded.num_cut)
        item: dict[str, Any] = {
            "input_ids": torch.tensor(encoded.input_ids, dtype=torch.long),
            "labels": torch.tensor(encoded.labels, dtype=torch.long),
            "id": sample.id,
        }
        if sample.image_files:
            try:
                item.update(self._images(sample))
            except ImageError as error:
                named = ImageError(f"sample {sample.id}: {error}")
                named.reason = error.reason
                raise named from None
        return item

    def _choose(self, sample: Sample) -> list[tuple[str, str]]:
        chosen = []
        for turn, (question, answers) in enumerate(sample.turns):
            index = draw_alternative(self.seed, self.epoch, sample.id, turn, len(answers)) if self.training else 0
            chosen.append((question, answers[index]))
        return chosen

    def _images(self, sample: Sample) -> dict[str, Any]:
        """Features of a sample's images if all are stored, else their pixels."""
        paths = [resolve_image_path(sample.image_folder, name, self.allow_links) for name in sample.image_files]
        cache = self.feature_cache
        if cache is None:
            return {"pixel_values": self._pixels(paths)}
        keys = [cache.key_of(path) for path in paths]
        features = []
        for key in keys:
            stored = None if key is None else cache.read(key)
            if stored is None:
                break
            features.append(stored)
        else:
            return {"vision_features": torch.stack(features)}
        pixels = self._pixels(paths)
        # Of a file that changed in between, nobody can say which content the pixels are of.
        still = [cache.key_of(path) for path in paths]
        sure = [key if key is not None and key == now else _NO_KEY for key, now in zip(keys, still, strict=True)]
        image_keys = np.frombuffer(b"".join(sure), dtype=np.uint8).reshape(len(sure), -1)
        return {"pixel_values": pixels, "image_keys": image_keys}

    def _pixels(self, paths: list[Path]) -> torch.Tensor:
        return torch.stack([self.image_transform(load_image(path)) for path in paths])

    def _count_cut(self, num_tokens: int) -> None:
        if num_tokens:
            worker = get_worker_info()
            row = 0 if worker is None else 1 + worker.id % (_MAX_WORKERS - 1)
            self._cuts[row] += torch.tensor([1, num_tokens])
