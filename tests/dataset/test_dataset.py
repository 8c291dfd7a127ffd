"""The dataset over files on disk."""

from __future__ import annotations

import json
import logging
import pickle

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from dataset import ImageCaptionDataset, ImageError, SampleError, VLMCollator
from dataset.image_caption_dataset import draw_alternative

COLOURS = {"red.png": (255, 0, 0), "green.png": (0, 255, 0), "blue.png": (0, 0, 255)}


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
def make(tmp_path, images, tokenizer):
    """Write the two files and open them."""

    def build(entries, captions, num_image_tokens=2, **kwargs):
        image_map, captions_file = tmp_path / "image_map.json", tmp_path / "captions.json"
        image_map.write_text(json.dumps(entries), encoding="utf-8")
        captions_file.write_text(json.dumps(captions, ensure_ascii=False), encoding="utf-8")
        return ImageCaptionDataset(image_map, captions_file, tokenizer, transform, num_image_tokens, **kwargs)

    return build


def one(images, file="red.png", sample_id=0):
    return {"image_file": file, "ID": sample_id, "path": str(images)}


def answers(dataset, tokenizer):
    return [tokenizer.decode([t for t in dataset[i]["labels"].tolist() if t != -100]) for i in range(len(dataset))]


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
        "1": {"q": "A", "a": "B"},
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
    with pytest.raises(IndexError):
        dataset[3]


def test_one_photo_may_have_many_samples(make, images, tokenizer):
    entries = {f"{name}-{i}": one(images, "red.png", i) for i, name in enumerate("abc")}
    dataset = make(entries, {str(i): {"q": "<|extra_0|>", "a": f"answer {i}"} for i in range(3)})
    assert answers(dataset, tokenizer) == [f"answer {i}<|endoftext|>" for i in range(3)]


def test_files_of_the_original_project(make, images, tokenizer):
    entries = {"red.png": {"iamge_file": "red.png", "ID": 0, "path": str(images)}}
    dataset = make(entries, {"0": {"q": "这幅图像描述了什么？<|extra_0|>", "a": "一只狗"}})
    assert answers(dataset, tokenizer) == ["一只狗<|endoftext|>"]
    assert dataset[0]["pixel_values"].shape == (1, 3, 2, 2)


def test_a_relative_path_counts_from_here_and_then_from_the_file(make, images, tmp_path, monkeypatch):
    entries = {"k": {"image_file": "red.png", "ID": 0, "path": "images"}}
    captions = {"0": {"q": "<|extra_0|>", "a": "B"}}
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert make(entries, captions)[0]["pixel_values"][0, 0, 0, 0] == 1
    (elsewhere / "images").mkdir()
    Image.new("RGB", (4, 4), COLOURS["blue.png"]).save(elsewhere / "images" / "red.png")
    dataset = make(entries, captions)
    monkeypatch.chdir(tmp_path)
    assert dataset[0]["pixel_values"][0, :, 0, 0].tolist() == [0, 0, 1], "settled when the file was read"


def test_images_are_opened_only_when_asked_for(make, images):
    entries = {"a": one(images, "red.png", 0), "b": one(images, "missing.png", 1)}
    dataset = make(entries, {str(i): {"q": "<|extra_0|>", "a": "B"} for i in range(2)})
    assert dataset[0]["id"] == 0
    with pytest.raises(ImageError, match=r"sample 1: .*missing\.png"):
        dataset[1]


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


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_persistent_workers_see_the_epoch_and_their_cuts_are_counted(make, tokenizer, context, caplog):
    choices = [f"answer {i}" for i in "ABCDE"]
    entries = {str(i): {"image_file": None, "ID": i} for i in range(12)}
    captions = {str(i): {"q": "A", "a": choices} for i in range(10)}
    captions.update({str(i): {"q": "A", "a": "A " * 100} for i in (10, 11)})
    dataset = make(entries, captions, max_length=60)
    workers = 2 if context == "fork" else 1
    loader = DataLoader(
        dataset,
        batch_size=3,
        num_workers=workers,
        multiprocessing_context=context,
        persistent_workers=True,
        collate_fn=identity,
    )
    with caplog.at_level(logging.WARNING, logger="dataset"):
        for epoch in range(3):
            dataset.set_epoch(epoch)
            loaded = [sample for batch in loader for sample in batch]
            assert dataset.num_cut == 2 * (epoch + 1)
            expected = make(entries, captions, max_length=60)
            expected.set_epoch(epoch)
            assert [s["labels"].tolist() for s in loaded] == [expected[i]["labels"].tolist() for i in range(12)]
        dataset.log_cuts()
        dataset.log_cuts()
    lost = dataset.num_cut_tokens
    assert lost > 300
    assert [r.getMessage() for r in caplog.records if f"{lost} tokens lost" in r.getMessage()] == [
        f"{dataset.captions_file}: 6 times, an answer was cut at 60 tokens; {lost} tokens lost so far"
    ]
    del loader


def test_bad_samples_name_themselves(make, images):
    good = {"q": "<|extra_0|>", "a": "B"}
    cases = [
        (one(images), {"q": "no placeholder", "a": "B"}, "sample 0: .*0 image placeholders.*1 image;"),
        (one(images), {"q": "<|extra_0|><|extra_0|>", "a": "B"}, "2 image placeholders.*1 image;"),
        ({"image_file": None, "ID": 0}, good, "1 image placeholder <.*0 images"),
        (one(images, ["red.png", "red.png"]), good, "1 image placeholder <.*2 images"),
        (one(images), {"q": "<|extra_0|>", "a": ""}, "sample 0: an answer is empty"),
        (one(images), {"q": "<|extra_0|>", "a": []}, "string or a list"),
        (one(images), {"q": "<|extra_0|>", "a": ["B", " "]}, "an answer is empty"),
        (one(images), {"q": "<|extra_0|>", "a": 5}, "got 5"),
        (one(images), {"q": None, "a": "B"}, '"q" must be'),
        (one(images), {"turns": []}, '"turns" must be'),
        (one(images), {"turns": [good, {"q": "A"}]}, 'turn 2: "a"'),
        (one(images), {**good, "turns": [good]}, "both"),
        (one(images), "text", "got str"),
        (one(images, "../red.png"), good, "sample 0: .*red.png"),
        (one(images, "/etc/passwd"), good, "sample 0: .*absolute"),
        (one(images, 5), good, "file name"),
        (one(images, [None]), good, "file name"),
        ({"ID": 0, "path": str(images)}, good, "image_file"),
        ({**one(images), "ID": "0"}, good, "ID must be an integer, got '0'"),
        ({**one(images), "ID": True}, good, "ID must be an integer"),
        ({**one(images), "path": None}, good, "sample 0: `path`"),
        ({**one(images), "path": "/does/not/exist"}, good, "does not exist"),
        ([], good, "must be an object"),
    ]
    for entry, caption, message in cases:
        with pytest.raises(SampleError, match=message):
            make({"k": entry}, {"0": caption})
    with pytest.raises(SampleError, match="sample 0: has no entry"):
        make({"k": one(images)}, {"1": good})


def test_one_message_tells_of_several_bad_samples(make, images):
    entries = {str(i): one(images, sample_id=i) for i in range(6)}
    captions = {str(i): {"q": "<|extra_0|>" * (i == 0), "a": "B"} for i in range(6)}
    with pytest.raises(SampleError, match=r"5 bad samples .*sample 1: .*sample 3: .*and 2 more"):
        make(entries, captions)
    assert len(make(entries, captions, max_samples=1)) == 1


def test_ids_and_keys_must_be_unique(make, images, tmp_path, tokenizer):
    good = {"q": "<|extra_0|>", "a": "B"}
    with pytest.raises(SampleError, match="'a' and 'b' both have this ID"):
        make({"a": one(images), "b": one(images)}, {"0": good})
    make({"a": one(images)}, {"0": good})
    (tmp_path / "image_map.json").write_text('{"a": {"ID": 0}, "a": {"ID": 1}}')
    with pytest.raises(ValueError, match="'a' stands twice"):
        ImageCaptionDataset(tmp_path / "image_map.json", tmp_path / "captions.json", tokenizer, transform, 2)


def test_a_question_that_leaves_no_room_names_its_sample(make):
    dataset = make({"k": {"image_file": None, "ID": 3}}, {"3": {"q": "A " * 100, "a": "B"}}, max_length=50)
    with pytest.raises(SampleError, match=r"sample 3: .*max_length = 50"):
        dataset[0]


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}", "\udcff", "[" * 100_000])
def test_unusable_files_are_named(tmp_path, tokenizer, content):
    captions = tmp_path / "captions.json"
    captions.write_text("{}")
    image_map = tmp_path / "image_map.json"
    if content is not None:
        image_map.write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(ValueError, match=r"image_map\.json"):
        ImageCaptionDataset(image_map, captions, tokenizer, transform, 2)


def test_numbers_out_of_range(make):
    arguments = ({"k": {"image_file": None, "ID": 3}}, {"3": {"q": "A", "a": "B"}})
    for name in ("max_length", "num_image_tokens", "max_samples"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1"):
            make(*arguments, **{name: 0})


def test_links_may_leave_the_folder_only_if_allowed(make, images, tmp_path):
    outside = tmp_path / "outside.png"
    Image.new("RGB", (4, 4), COLOURS["blue.png"]).save(outside)
    (images / "link.png").symlink_to(outside)
    arguments = ({"k": one(images, "link.png", 4)}, {"4": {"q": "<|extra_0|>", "a": "B"}})
    with pytest.raises(ImageError, match="sample 4"):
        make(*arguments)[0]
    assert make(*arguments, allow_links=True)[0]["pixel_values"].shape == (1, 3, 2, 2)


def test_captions_without_an_entry_are_reported(make, images, caplog):
    good = {"q": "<|extra_0|>", "a": "B"}
    with caplog.at_level(logging.WARNING, logger="dataset"):
        assert len(make({"k": one(images)}, {"0": good, "1": good, "2": good})) == 1
    assert "2 entries have no image_map entry" in caplog.text


def test_survives_pickling_and_odd_text(make, tokenizer):
    dataset = make({"k": {"image_file": None, "ID": -5}}, {"-5": {"q": "e\u0301😀", "a": "\u2028好"}})
    again = pickle.loads(pickle.dumps(dataset))
    assert again[0]["labels"].tolist() == dataset[0]["labels"].tolist()
    assert answers(again, tokenizer) == ["\u2028好<|endoftext|>"]


def test_goes_through_the_collator(make, images):
    entries = {
        "a": one(images, ["green.png", "blue.png"], 0),
        "b": {"image_file": None, "ID": 1},
        "c": one(images, "red.png", 2),
    }
    captions = {
        "0": {"q": "<|extra_0|>A<|extra_0|>", "a": "B"},
        "1": {"q": "A", "a": "B"},
        "2": {"q": "<|extra_0|>", "a": "B"},
    }
    dataset = make(entries, captions)
    batch = VLMCollator(pad_token_id=151643)([dataset[i] for i in range(3)])
    assert batch["pixel_values"][:, :, 0, 0].tolist() == [[0, 1, 0], [0, 0, 1], [1, 0, 0]]
    assert (batch["input_ids"] == 151646).sum(1).tolist() == [4, 0, 2]
