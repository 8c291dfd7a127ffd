"""The dataset over files on disk; tests/dataprocess/test_hostile_annotations.py has the table of bad entries."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from dataprocess.image_bytes import content_key
from dataset import ImageCaptionDataset, ImageError, SampleError, VLMCollator, image_caption_dataset
from dataset.annotations import Annotations, refuse_repeated_keys
from dataset.image_caption_dataset import draw_alternative
from model.feature_caching.image_list import images_of

COLOURS = {"red.png": (255, 0, 0), "green.png": (0, 255, 0), "blue.png": (0, 0, 255)}
ASK = {"q": "<|extra_0|>", "a": "B"}
TEXT_ONLY = {"q": "A", "a": "B"}


def transform(image):
    """What a tower's transform does, on two by two pixels."""
    red, green, blue = image.convert("RGB").getpixel((0, 0))
    return torch.tensor([red, green, blue], dtype=torch.float32).view(3, 1, 1).expand(3, 2, 2) / 255


def identity(samples):
    return samples


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name, colour in COLOURS.items():
        Image.new("RGB", (4, 4), colour).save(folder / name)
    return folder


@pytest.fixture
def write(tmp_path):
    """Write the two files; gives their paths."""

    def to_disk(entries, captions):
        (tmp_path / "image_map.json").write_text(json.dumps(entries))
        (tmp_path / "captions.json").write_text(json.dumps(captions))
        return tmp_path / "image_map.json", tmp_path / "captions.json"

    return to_disk


@pytest.fixture
def make(write, tokenizer):
    """Write the two files and open them."""
    return lambda entries, captions, num_image_tokens=2, **kwargs: ImageCaptionDataset(
        *write(entries, captions), tokenizer, transform, num_image_tokens, **kwargs
    )


def one(images, file="red.png", sample_id=0):
    return {"image_file": file, "ID": sample_id, "path": str(images)}


def answers(dataset, tokenizer):
    return [tokenizer.decode([t for t in dataset[i]["labels"].tolist() if t != -100]) for i in range(len(dataset))]


# ---- One sample


def test_a_sample_word_for_word(make, images):
    dataset = make({"k": one(images, sample_id=7)}, {"7": {"q": "<|extra_0|>A", "a": "B"}}, system="")
    sample = dataset[0]
    assert sample["input_ids"].tolist() == [
        *(151644, 8948, 198, 151645),
        *(198, 151644, 872, 198, 151646, 151646, 32, 151645),
        *(198, 151644, 77091, 198, 33, 151643),
    ]
    assert sample["labels"].tolist() == [-100] * 16 + [33, 151643]
    assert sample["input_ids"].dtype == sample["labels"].dtype == torch.int64
    assert sample["pixel_values"].shape == (1, 3, 2, 2)
    assert sample["pixel_values"][0, :, 0, 0].tolist() == [1, 0, 0]
    assert sample["id"] == 7


def test_no_image_several_images_and_turns(make, images):
    entries = {
        "none": {"image_file": None, "ID": 1, "path": ""},
        "empty": {"image_file": [], "ID": 2},
        "two": one(images, ["blue.png", "green.png"], 3),
    }
    captions = {
        "1": TEXT_ONLY,
        "2": {"turns": [{"q": "A", "a": "B"}, {"q": "A", "a": ["B"]}]},
        "3": {"turns": [{"q": "A<|extra_0|>", "a": "B"}, {"q": "<|extra_0|>", "a": "A"}]},
    }
    dataset = make(entries, captions)
    assert len(dataset) == 3
    assert "pixel_values" not in dataset[0]
    assert "pixel_values" not in dataset[1]
    assert (dataset[1]["labels"] != -100).sum() == 4
    assert dataset[2]["pixel_values"][:, :, 0, 0].tolist() == [[0, 0, 1], [0, 1, 0]]
    assert (dataset[2]["input_ids"] == 151646).sum() == 4
    batch = VLMCollator(pad_token_id=151643)([dataset[i] for i in (2, 0)])
    assert batch["pixel_values"][:, :, 0, 0].tolist() == [[0, 0, 1], [0, 1, 0]]
    with pytest.raises(IndexError):
        dataset[3]


def test_a_relative_path_counts_from_here_and_then_from_the_file(make, images, tmp_path, monkeypatch):
    entries = {"k": {"image_file": "red.png", "ID": 0, "path": "images"}}
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert make(entries, {"0": ASK})[0]["pixel_values"][0, 0, 0, 0] == 1
    (elsewhere / "images").mkdir()
    Image.new("RGB", (4, 4), COLOURS["blue.png"]).save(elsewhere / "images" / "red.png")
    dataset = make(entries, {"0": ASK})
    monkeypatch.chdir(tmp_path)
    assert dataset[0]["pixel_values"][0, :, 0, 0].tolist() == [0, 0, 1], "settled when the file was read"


# ---- Alternatives and epochs


def test_alternatives_are_a_function_of_seed_epoch_and_id(make, tokenizer):
    choices = [f"answer {letter}" for letter in "ABCDE"]
    entries = {str(i): {"image_file": None, "ID": i} for i in range(20)}
    captions = {str(i): {"turns": [{"q": "A", "a": choices}, {"q": "B", "a": choices}]} for i in range(20)}
    dataset = make(entries, captions, seed=1)
    first = answers(dataset, tokenizer)
    torch.manual_seed(99)
    assert answers(dataset, tokenizer) == first, "no random generator decides"
    assert answers(make(entries, captions, seed=1), tokenizer) == first
    assert answers(make(entries, captions, seed=2), tokenizer) != first
    assert any(text.split("<|im_end|>")[0] not in text.split("<|im_end|>")[1] for text in first), "turns differ too"
    # The order and number of samples do not matter.
    some = {key: entries[key] for key in ("5", "3")}
    assert answers(make(some, captions, seed=1), tokenizer) == [first[5], first[3]]
    dataset.set_epoch(1)
    assert answers(dataset, tokenizer) != first
    dataset.set_epoch(0)
    assert answers(dataset, tokenizer) == first
    evaluation = make(entries, captions, seed=1, training=False)
    assert set(answers(evaluation, tokenizer)) == {"answer A<|im_end|>answer A<|endoftext|>"}


def test_every_alternative_is_used_about_equally():
    counts = [0] * 5
    for sample_id in range(500):
        for epoch in range(10):
            counts[draw_alternative(42, epoch, sample_id, 0, 5)] += 1
    assert all(900 < count < 1100 for count in counts)
    # Written down, so that a change that gives old runs other answers does not go unnoticed.
    assert [draw_alternative(42, epoch, 7, 0, 5) for epoch in range(8)] == [4, 1, 0, 2, 0, 0, 0, 1]


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_persistent_workers_see_the_epoch_and_their_cuts_are_counted(make, context, caplog):
    choices = [f"answer {i}" for i in "ABCDE"]
    entries = {str(i): {"image_file": None, "ID": i} for i in range(12)}
    captions = {str(i): {"q": "A", "a": choices} for i in range(10)}
    captions.update({str(i): {"q": "A", "a": "A " * 100} for i in (10, 11)})
    dataset = make(entries, captions, max_length=60)
    how = {"multiprocessing_context": context, "persistent_workers": True, "collate_fn": identity}
    loader = DataLoader(dataset, batch_size=3, num_workers=2 if context == "fork" else 1, **how)
    with caplog.at_level(logging.WARNING, logger="dataset"):
        for epoch in range(3):
            dataset.set_epoch(epoch)
            loaded = [sample for batch in loader for sample in batch]
            assert int(dataset.cuts.counts.sum(dim=0)[0]) == 2 * (epoch + 1)
            expected = make(entries, captions, max_length=60)
            expected.set_epoch(epoch)
            assert [s["labels"].tolist() for s in loaded] == [expected[i]["labels"].tolist() for i in range(12)]
        dataset.cuts.log()
        dataset.cuts.log()
    times, lost = dataset.cuts.counts.sum(dim=0).tolist()
    assert lost > 300
    assert caplog.text.count(f"{lost} tokens") == 1, "said once"
    assert f"captions.json: {times} times" in caplog.text
    del loader


# ---- Bad samples


def test_one_message_tells_of_several_bad_samples(make, images):
    entries = {str(i): one(images, sample_id=i) for i in range(6)}
    captions = {str(i): {"q": "<|extra_0|>" * (i == 0), "a": "B"} for i in range(6)}
    with pytest.raises(SampleError, match=r"5 bad samples .*sample 1: .*sample 3: .*and 2 more"):
        make(entries, captions)


def test_the_first_samples_are_counted_good_or_bad(make):
    entries = {str(i): {"image_file": None, "ID": i} for i in range(4)}
    captions = {"1": TEXT_ONLY, "2": TEXT_ONLY, "3": TEXT_ONLY}
    with pytest.raises(ValueError, match=r"on_bad_sample.*skip.*skpi"):
        make(entries, captions, on_bad_sample="skpi")
    dataset = make(entries, captions, max_samples=2, on_bad_sample="skip")
    assert [sample.id for sample in dataset.annotations] == [1]
    assert len(dataset.bad) == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_listing_builds_no_bad_sample_twice(make, images, workers, monkeypatch):
    """Each newly found one made all earlier ones be opened again, and their cut answers be counted again."""
    number = 12
    entries = {str(i): one(images, f"missing {i}.png", i) for i in range(number)} | {"good": one(images, sample_id=99)}
    captions = {str(i): {"q": "<|extra_0|>", "a": "A " * 100} for i in (*range(number), 99)}
    dataset = make(entries, captions, max_length=60, on_bad_sample="skip", max_bad_fraction=1.0)
    built = []
    encode = image_caption_dataset.encode_sample
    monkeypatch.setattr(image_caption_dataset, "encode_sample", lambda *args: built.append(1) or encode(*args))
    for _ in DataLoader(dataset, batch_size=1, num_workers=workers, collate_fn=identity):
        messages = dataset.bad.all_messages(dataset)
    assert [message.split(":")[0] for message in messages] == [f"sample {i}" for i in range(number)]
    assert all(f"missing {i}.png" in message for i, message in enumerate(messages))
    assert len(built) == number + (workers == 0)  # here, and the good one where no worker builds it
    assert int(dataset.cuts.counts.sum(dim=0)[0]) == 1, "the good one's"


def test_a_bad_sample_marked_elsewhere_that_can_be_read_is_said_so(make, images):
    dataset = make({"k": one(images, sample_id=7)}, {"7": ASK}, on_bad_sample="skip")
    dataset.bad.mark(0)  # as a resumed run does
    messages = dataset.bad.all_messages(dataset)
    assert "sample 7" in messages[0]
    dataset.bad.mark(0, "another draw of its answers was too long")
    assert dataset.bad.all_messages(dataset) == messages, "one line for each sample"


def test_links_may_leave_the_folder_only_if_allowed(make, images, tmp_path):
    outside = tmp_path / "outside.png"
    Image.new("RGB", (4, 4), COLOURS["blue.png"]).save(outside)
    (images / "link.png").symlink_to(outside)
    arguments = ({"k": one(images, ["link.png", "red.png"], 4)}, {"4": {"q": "<|extra_0|><|extra_0|>", "a": "B"}})
    refused, allowed = make(*arguments), make(*arguments, allow_links=True)
    with pytest.raises(ImageError, match="sample 4"):
        refused[0]
    listed = images_of([refused])
    with pytest.raises(ImageError, match="link leads out"):
        listed[0]
    assert (len(listed), listed[1]) == (2, images / "red.png")
    assert allowed[0]["pixel_values"].shape == (2, 3, 2, 2)
    assert list(images_of([allowed])) == [images / "link.png", images / "red.png"]


# ---- Stored features


class Cache:
    """Features of the images in it."""

    def __init__(self, *paths):
        self.features = {content_key(path): torch.full((2, 4), float(place)) for place, path in enumerate(paths)}

    def read(self, key):
        return self.features.get(key)


def test_stored_features_take_the_place_of_pixels(make, images, monkeypatch):
    monkeypatch.setattr(image_caption_dataset, "load_image", None)  # nothing is opened
    entries = {"k": one(images, ["blue.png", "red.png"]), "text": {"image_file": None, "ID": 1}}
    captions = {"0": {"q": "<|extra_0|><|extra_0|>", "a": "B"}, "1": TEXT_ONLY}
    dataset = make(entries, captions, feature_cache=Cache(images / "red.png", images / "blue.png"))
    assert dataset[0]["vision_features"][:, 0, 0].tolist() == [1, 0]
    assert dataset[0]["vision_features"].shape == (2, 2, 4)
    assert "pixel_values" not in dataset[0]
    assert "vision_features" not in dataset[1]


@pytest.mark.parametrize(("name", "reason"), [("green.png", "feature cache"), ("missing.png", "missing")])
def test_an_image_without_stored_features_is_bad(make, images, name, reason):
    dataset = make({"k": one(images, name, 3)}, {"3": ASK}, feature_cache=Cache(images / "red.png"))
    with pytest.raises(ImageError, match=f"sample 3: .*{name}.*{reason}"):
        dataset[0]


# ---- Whole files


def test_a_repeated_key_is_found_in_linear_time():
    """20,000 captions took 6 seconds: each key was compared with all others."""
    compared = []

    class Key(str):
        __slots__ = ()
        __hash__ = str.__hash__

        def __eq__(self, other):
            compared.append(1)
            return str.__eq__(self, other)

    pairs = [(Key(number), {}) for number in range(2000)]
    assert len(refuse_repeated_keys(pairs)) == 2000
    with pytest.raises(ValueError, match="'1999'"):
        refuse_repeated_keys([*pairs, (Key(1999), {})])
    assert len(compared) < 100_000


def test_the_fingerprint_tells_samples_but_not_folders(write, images, tmp_path):
    def fingerprint(folder=images, name="red.png", answer="B"):
        captions = {"0": {"q": "<|extra_0|>", "a": answer}}
        return Annotations(*write({"k": one(folder, name)}, captions)).fingerprint

    original = fingerprint()
    assert fingerprint(name="blue.png") != original
    assert fingerprint(answer="C") != original
    moved = images.rename(tmp_path / "moved")
    assert fingerprint(moved) == original, "a run goes on after its pictures were moved"


def test_captions_without_an_entry_are_reported(write, images, caplog):
    with caplog.at_level(logging.WARNING, logger="dataset"):
        Annotations(*write({"k": one(images)}, {"0": ASK, "1": ASK, "2": ASK}))
        assert "2 entries" in caplog.text
        caplog.clear()
        bad = {"k": one(images), "bad": {"ID": 1}}
        assert len(Annotations(*write(bad, {"0": ASK, "1": ASK}), skip_bad=True).errors) == 1
    assert caplog.text == "", "the entry of a bad sample is one, too"
