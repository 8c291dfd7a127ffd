"""Questions from `image_map.json` and `captions.json`, with the reader that training uses (it loads torch)."""

from __future__ import annotations

import logging
from pathlib import Path

from dataprocess.image_io import resolve_image_path
from dataprocess.messages import format_count
from dataset.annotations import Sample
from dataset.image_caption_dataset import open_annotations
from qwen.tokenization_qwen import IMAGE_TOKEN

from ..asking.question_file import Question
from .items import Item, QuestionSet, with_suffix

logger = logging.getLogger(__name__)


def read_samples(image_map: Path, captions_file: Path, suffix: str = "") -> QuestionSet:
    """Read the first question of every sample; its alternative answers are the references. The suffix is added to each.

    Samples whose later questions bring pictures are left out, with a warning.
    """
    items, left_out = [], 0
    for sample in open_annotations(image_map, captions_file):
        if has_all_pictures_first(sample):
            items.append(with_suffix(first_question(sample), suffix))
        else:
            left_out += 1
    if left_out:
        said = format_count(left_out, "sample brings", "samples bring")
        logger.warning("%s: %s pictures in a later question; left out", captions_file, said)
    if not items:
        raise ValueError(f"{captions_file}: no sample has all its pictures in its first question")
    return QuestionSet("samples", image_map.stem, items)


def has_all_pictures_first(sample: Sample) -> bool:
    """Return whether the first question shows all pictures of a sample."""
    return sample.turns[0][0].count(IMAGE_TOKEN) == len(sample.image_files)


def first_question(sample: Sample, allow_links: bool = False) -> Item:
    """Return the first question of a sample, with its alternative answers as references.

    Raises:
        ImageError: a picture leads out of the image folder.
    """
    prompt, references = sample.turns[0]
    images = tuple(resolve_image_path(sample.image_folder, name, allow_links) for name in sample.image_files)
    return Item(Question(sample.id, images, prompt), tuple(references))
