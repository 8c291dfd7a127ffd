"""Padding, masking and stacking; test_properties.py tries generated batches."""

from __future__ import annotations

import pickle

import pytest
import torch
from accelerate.utils import send_to_device

from dataset.collator import VLMCollator


def sample(ids, labels=None, images=0, kind="pixel_values"):
    item = {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels or ids), "id": 5}
    if images:
        item[kind] = torch.full((images, 3, 2, 2) if kind == "pixel_values" else (images, 4, 8), float(ids[0]))
    return item


def test_pads_on_the_right_and_masks():
    """A padding id in the text stays visible."""
    batch = VLMCollator(pad_token_id=9)([sample([1, 2, 9], [-100, 2, 9]), sample([4], [4])])
    assert batch["input_ids"].tolist() == [[1, 2, 9], [4, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 2, 9], [4, -100, -100]]
    assert set(batch) - {"ids"} == {"input_ids", "attention_mask", "labels"}
    assert {value.dtype for name, value in batch.items() if name != "ids"} == {torch.int64}


def test_ids_are_given_if_all_samples_have_one():
    known, other, unknown = {**sample([1]), "id": 7}, sample([2, 3]), sample([4])
    del unknown["id"]
    assert VLMCollator(9)([known, other])["ids"] == [7, 5]
    assert "ids" not in VLMCollator(9)([known, unknown])


@pytest.mark.parametrize(("kind", "shape"), [("pixel_values", (3, 3, 2, 2)), ("vision_features", (3, 4, 8))])
def test_images_follow_the_reading_order(kind, shape):
    batch = VLMCollator(9)([sample([1], images=2, kind=kind), sample([2]), sample([3], images=1, kind=kind)])
    assert batch[kind].shape == shape
    assert batch[kind].flatten(1)[:, 0].tolist() == [1, 1, 3]
    assert batch[kind].dtype == torch.float32


def test_only_what_the_model_needs_goes_to_the_accelerator():
    """A trip there and back is a wait; the meta device stands for one. Data workers hand batches over by pickling."""
    batch = pickle.loads(pickle.dumps(VLMCollator(9)))([sample([1, 2], images=2), sample([3])])
    moved = send_to_device(pickle.loads(pickle.dumps(batch)), torch.device("meta"))
    on_device = {name for name, value in moved.items() if isinstance(value, torch.Tensor) and value.is_meta}
    assert on_device == {"input_ids", "attention_mask", "labels", "pixel_values"}
    assert moved["ids"] == [5, 5]
