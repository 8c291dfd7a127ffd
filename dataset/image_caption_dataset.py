"""The training set: token ids, labels and images of one sample at a time.

Shape legend: T tokens of the sample, n images of it, H x W pixels of an image, P features per image, D their width.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from dataprocess.image_bytes import content_key
from dataprocess.image_io import ImageError, load_image, resolve_image_path
from qwen import IGNORE_INDEX

from .annotations import Annotations, Sample
from .bad_samples import BadSamples, CutAnswers
from .prompt import SYSTEM_PROMPT, EncodedSample, SampleError, Tokenizer, encode_sample

logger = logging.getLogger(__name__)


def draw_alternative(seed: int, epoch: int, sample_id: int, turn: int, num_alternatives: int) -> int:
    """Draw which of a turn's alternative answers is used in an epoch: an index below `num_alternatives`, uniformly.

    A pure function: it does not depend on the order of samples, on data workers or on any random generator's state.
    """
    digest = hashlib.blake2b(f"{seed}/{epoch}/{sample_id}/{turn}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % num_alternatives


def open_annotations(image_map: str | Path, captions_file: str | Path, *args: Any, **options: Any) -> Annotations:
    """Read the two files; those of millions of samples, JSON lines or Parquet, stay on the disk."""
    if {Path(file).suffix.lower() for file in (image_map, captions_file)} & {".jsonl", ".parquet"}:
        from .large_annotations import LargeAnnotations

        return LargeAnnotations(image_map, captions_file, *args, **options)
    return Annotations(image_map, captions_file, *args, **options)


class ImageCaptionDataset(Dataset[dict[str, Any]]):
    """Samples of an image map and a captions file.

    Both files are read once and checked; images are opened when their sample is asked for. A sample is a dict:
    `input_ids` and `labels` int64 (T,), `id` int, and, if it has images, `pixel_values` float32 (n, 3, H, W). With a
    `feature_cache`, `vision_features` (n, P, D) take the place of pixels, and no image is opened.

    Args:
        image_map: path of `image_map.json`, or `.jsonl`, or `.parquet`.
        captions_file: path of `captions.json`, likewise.
        tokenizer: QWen's tokenizer.
        image_transform: the vision tower's own, PIL RGB -> float tensor (3, H, W).
        num_image_tokens: the tower's features per image.
        max_length: the most tokens of a sample; more are cut from its end.
        seed: decides, with epoch and ID, which alternative answer is used.
        system: the system prompt.
        training: draw among alternatives; otherwise the first one is used.
        max_samples: use only the first so many.
        allow_links: follow links that lead out of the image folder.
        on_bad_sample: "error", or "skip": a sample that the two files show to be bad is left out; one that turns out
            bad when it is asked for becomes a sample of one token without a label. `bad` counts both.
        max_bad_fraction: with "skip", the share of samples that a run lets be bad, 0 to 1.
        feature_cache: holds the features of every image, as `visual.feature_cache.FeatureCache` does.
        need_folders: a missing image folder makes its samples bad; a dry run needs none.

    Raises:
        ValueError: a file cannot be read or has not the expected form.
        SampleError: samples are contradictory or incomplete.
    """

    def __init__(
        self,
        image_map: str | Path,
        captions_file: str | Path,
        tokenizer: Tokenizer,
        image_transform: Callable[[Image.Image], Tensor],
        num_image_tokens: int,
        *,
        max_length: int = 2048,
        seed: int = 42,
        system: str | None = SYSTEM_PROMPT,
        training: bool = True,
        max_samples: int | None = None,
        allow_links: bool = False,
        on_bad_sample: str = "error",
        max_bad_fraction: float = 0.01,
        feature_cache: Any = None,
        need_folders: bool = True,
    ) -> None:
        self.tokenizer = tokenizer
        self.image_transform = image_transform
        self.num_image_tokens = num_image_tokens
        self.max_length = max_length
        self.seed = seed
        self.system = system
        self.training = training
        self.allow_links = allow_links
        self.feature_cache = feature_cache
        if on_bad_sample not in ("error", "skip"):
            raise ValueError(f"on_bad_sample must be 'error' or 'skip', got {on_bad_sample!r}")
        self.skips_bad = on_bad_sample == "skip"
        self.annotations = open_annotations(
            image_map, captions_file, max_samples, skip_bad=self.skips_bad, need_folders=need_folders
        )
        self.bad = BadSamples(len(self), self.annotations.errors, max_bad_fraction)
        self.fingerprint = self.annotations.fingerprint  # of the samples; the folders of their images do not count
        self.cuts = CutAnswers(len(self), max_length, str(captions_file))
        # In shared memory: data workers that outlive an epoch see the next one.
        self._epoch = torch.zeros(1, dtype=torch.long).share_memory_()
        logger.info("%s: %s samples", captions_file, f"{len(self):,}")

    def __len__(self) -> int:
        return len(self.annotations)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return the sample at a position; one token without a label in place of a bad one that is skipped.

        Raises:
            SampleError: its questions leave no room for an answer; the message names its ID.
            ImageError: an image of it cannot be used; the message names its ID and the file.
        """
        sample = self.annotations[index]
        try:
            encoded = self.encode(sample)
            item: dict[str, Any] = {
                "input_ids": torch.tensor(encoded.input_ids),  # (T,)
                "labels": torch.tensor(encoded.labels),  # (T,)
                "id": sample.id,
            }
            if sample.image_files:
                paths = [resolve_image_path(sample.image_folder, name, self.allow_links) for name in sample.image_files]
                if self.feature_cache is None:
                    pixels = [self.image_transform(load_image(path)) for path in paths]
                    item["pixel_values"] = torch.stack(pixels)  # (n, 3, H, W)
                else:
                    item["vision_features"] = torch.stack([self._features(path) for path in paths])  # (n, P, D)
        except (SampleError, ImageError) as error:
            message = f"sample {sample.id}: {error}"
            if not self.skips_bad:
                raise type(error)(message) from None
            self.bad.mark(index, message)
            # It has no label, so it adds nothing to the loss, and the batch keeps its number of rows.
            ids, labels = torch.tensor([self.tokenizer.eod_id]), torch.tensor([IGNORE_INDEX])  # (1,), (1,)
            return {"input_ids": ids, "labels": labels, "id": sample.id}
        if encoded.num_cut:
            self.cuts.counts[index] += torch.tensor([1, encoded.num_cut])
        return item

    def encode(self, sample: Sample) -> EncodedSample:
        """Turn a sample's text into token ids and labels, with the answers that the current epoch draws.

        Raises:
            SampleError: its questions leave no room for an answer.
        """
        epoch, turns = int(self._epoch), []
        for turn, (question, answers) in enumerate(sample.turns):
            drawn = draw_alternative(self.seed, epoch, sample.id, turn, len(answers)) if self.training else 0
            turns.append((question, answers[drawn]))
        return encode_sample(self.tokenizer, turns, self.num_image_tokens, self.system, self.max_length)

    def _features(self, path: Path) -> Tensor:
        """Read the features (P, D) of an image from the cache."""
        key = content_key(path)
        features = None if key is None else self.feature_cache.read(key)
        if features is None:
            load_image(path)  # raises if something is wrong with the picture itself
            raise ImageError(f"'{path}': the feature cache lacks it; it changed, or could not be stored")
        return features

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, counted from 0, before iterating over it; logs what was cut until now."""
        self.cuts.log()
        self._epoch.fill_(epoch)
