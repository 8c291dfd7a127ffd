"""Questions from `image_map.json` and `captions.json`, with the reader that training uses (it loads torch)."""

from __future__ import annotations

import logging
from pathlib import Path

from dataprocess.image_io import resolve_image_path
from dataprocess.messages import format_count
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
        prompt, references = sample.turns[0]
        if prompt.count(IMAGE_TOKEN) != len(sample.image_files):
            left_out += 1
            continue
        images = tuple(resolve_image_path(sample.image_folder, name) for name in sample.image_files)
        items.append(with_suffix(Item(Question(sample.id, images, prompt), tuple(references)), suffix))
    if left_out:
        said = format_count(left_out, "sample brings", "samples bring")
        logger.warning("%s: %s pictures in a later question; left out", captions_file, said)
    if not items:
        raise ValueError(f"{captions_file}: no sample has all its pictures in its first question")
    return QuestionSet("samples", image_map.stem, items)
