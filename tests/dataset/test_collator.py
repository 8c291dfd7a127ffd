"""Padding, masking and stacking."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from accelerate.utils import send_to_device

from dataset.collator import VLMCollator


def sample(ids, labels=None, images=0, size=2):
    item = {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels or ids), "id": 5}
    if images:
        item["pixel_values"] = torch.full((images, 3, size, size), float(ids[0]))
    return item


def test_pads_on_the_right_and_masks():
    batch = VLMCollator(pad_token_id=9)([sample([1, 2, 3], [-100, 2, 3]), sample([4], [4])])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 2, 3], [4, -100, -100]]
    assert set(batch) - {"ids"} == {"input_ids", "attention_mask", "labels"}
    assert {value.dtype for name, value in batch.items() if name != "ids"} == {torch.int64}


def test_a_padding_id_in_the_text_stays_visible():
    batch = VLMCollator(pad_token_id=9)([sample([1, 9], [-100, 9]), sample([1, 2, 3])])
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["labels"][0].tolist() == [-100, 9, -100]


def test_samples_are_named_where_all_names_are_known():
    known, other, unknown = {**sample([1]), "id": 7}, sample([2, 3]), sample([4])
    del unknown["id"]
    assert VLMCollator(9)([known, other])["ids"] == [7, 5]
    assert "ids" not in VLMCollator(9)([known, unknown])
    assert "ids" not in VLMCollator(9)([unknown])


def test_images_follow_the_reading_order():
    batch = VLMCollator(pad_token_id=9)([sample([1], images=2), sample([2]), sample([3], images=1)])
    assert batch["pixel_values"].shape == (3, 3, 2, 2)
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [1, 1, 3]
    assert batch["pixel_values"].dtype == torch.float32


@pytest.mark.parametrize(("multiple", "length"), [(None, 3), (1, 3), (3, 3), (2, 4), (64, 64)])
def test_rounds_the_length_up(multiple, length):
    batch = VLMCollator(9, pad_to_multiple_of=multiple)([sample([1, 2, 3]), sample([1])])
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape == (2, length)
    assert batch["attention_mask"].sum().item() == 4


def test_errors():
    with pytest.raises(ValueError, match="no samples"):
        VLMCollator(9)([])
    with pytest.raises(ValueError, match="one size"):
        VLMCollator(9)([sample([1], images=1), sample([1], images=1, size=4)])


def test_what_only_the_host_needs_stays_there():
    """A trip to the accelerator and back is a wait; the meta device stands for one."""
    keyed = {**sample([1, 2], images=2), "image_keys": np.arange(64, dtype=np.uint8).reshape(2, 32)}
    batch = VLMCollator(9)([keyed, sample([3])])
    moved = send_to_device(pickle.loads(pickle.dumps(batch)), torch.device("meta"))
    on_device = {name for name, value in moved.items() if isinstance(value, torch.Tensor)}
    assert on_device == {"input_ids", "attention_mask", "labels", "pixel_values"}
    assert all(moved[name].device.type == "meta" for name in on_device)
    assert moved["ids"] == [5, 5]
    assert np.array_equal(moved["image_keys"], keyed["image_keys"])


def test_can_be_sent_to_a_worker():
    assert pickle.loads(pickle.dumps(VLMCollator(9, 8))) == VLMCollator(9, 8)
