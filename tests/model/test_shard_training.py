"""Training on tar shards, JSON lines and Parquet is training on files and JSON: losses, order, resuming, grouping."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_run import build_trainer, losses, make_pictures, one_line_error, trained_weights

import train
from dataprocess import process_image
from visual import cache_features

QUICK = [
    *("--lora_rank", "4", "--lora_alpha", "8", "--lora_dropout", "0.2", "--learning_rate", "1e-2"),
    *("--use_cpu", "true", "--report_to", "none", "--disable_tqdm", "true", "--logging_steps", "1"),
    *("--save_steps", "3", "--num_train_epochs", "2", "--per_device_train_batch_size", "2"),
    *("--gradient_accumulation_steps", "2"),
]
TALKS = [
    (["red.png"], ["What colour?<image>", "Red."]),
    (["green.png"], ["<image>这是什么颜色？", "绿色。"]),
    (["blue.png", "white.png"], ["First <image>, then <image>?", "Blue, then white."]),
    (None, ["1 + 1?", "2"]),
    (["black.png"], ["<image>Dark?", "Yes.", "Why?", "Black takes all light in."]),
    (["red.png"], ["<image>Again?", "Still red."]),
    (None, ["Name a fruit.", "Apple"]),
    (["white.png"], ["<image>", "White, as snow is, and as many other things are, milk and salt for example."]),
]


def prepare(folder: Path, pictures: Path, *flags: object, ending: str = "json") -> list[str]:
    """Prepare twelve samples of all kinds; returns the flags that name them."""
    folder.mkdir()
    talks = []
    for images, texts in TALKS:
        speakers = ["human", "gpt"] * (len(texts) // 2)
        said = [{"from": speaker, "value": text} for speaker, text in zip(speakers, texts, strict=True)]
        talks.append({"image": images, "conversations": said})
    photos = [{"url": "", "image_id": f"{name}.png", "caption": [name, f"是{name}"]} for name in ("yellow", "blue")]
    photos += [{"url": "", "image_id": f"{name}.png", "caption": [f"{name}。", name]} for name in ("red", "green")]
    config = {
        "ali_image_path": str(pictures),
        "ali_image_path_label_file": "photos.json",
        "llava_sources": [{"image_path": str(pictures), "label_file": "talks.json"}],
        "output_image_map": f"image_map.{ending}",
        "output_captions": f"captions.{ending}",
    }
    for name, content in {"photos.json": photos, "talks.json": talks, "config.yaml": config}.items():
        (folder / name).write_text(json.dumps(content))
    assert process_image.main(["--config", str(folder / "config.yaml"), *map(str, flags)]) == 0
    return ["--image_map", str(folder / f"image_map.{ending}"), "--captions_file", str(folder / f"captions.{ending}")]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, list[str]]:
    """The same samples over files, also named by JSON lines and Parquet, and over shards, whose files are gone."""
    pytest.importorskip("pyarrow")
    folder = tmp_path_factory.mktemp("sharded")
    plain, others = folder / "pictures", folder / "others"
    make_pictures(plain)
    shutil.copytree(plain, others)
    shards = ("--shards", folder / "shards", "--shard_bytes", 2500, "--check_images")
    found = {"files": prepare(folder / "files", plain), "shards": prepare(folder / "packed", others, *shards)}
    for ending in ("jsonl", "parquet"):
        found[ending] = prepare(folder / ending, plain, ending=ending)
    shutil.rmtree(others)
    assert len(list((folder / "shards").glob("*.tar"))) > 2
    return found


@pytest.fixture(scope="module")
def run(base_flags, data, tmp_path_factory):
    """Train in this process on one of these, the same only once; gives the last checkpoint."""

    @functools.cache
    def train_on(which: str, *flags: object) -> Path:
        folder = tmp_path_factory.mktemp(which)
        command = [*base_flags, *data[which], *QUICK, "--output_dir", str(folder), *map(str, flags)]
        assert train.main(command) == 0
        return max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))

    return train_on


def assert_same(a: Path, b: Path) -> None:
    assert losses(a) == losses(b)
    first, second = trained_weights(a), trained_weights(b)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_losses_and_weights_are_those_of_files(run):
    of_shards = run("shards", "--dataloader_num_workers", "2")
    assert len(losses(of_shards)) == 6
    assert_same(run("files"), of_shards)


@pytest.mark.parametrize("ending", ["jsonl", pytest.param("parquet", marks=pytest.mark.slow)])
def test_losses_and_weights_are_those_of_json(run, ending):
    assert_same(run(ending, "--dataloader_num_workers", "2"), run("files"))


@pytest.mark.slow
@pytest.mark.parametrize("which", ["shards", "jsonl"])
def test_groups_by_length_are_those_of_files(run, which):
    flags = ("--train_sampling_strategy", "group_by_length")
    assert_same(run(which, *flags), run("files", *flags))


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_the_features_of_all_pictures_are_found(data, ending):
    found, expected = (cache_features.list_images([data[which][1]], False) for which in (ending, "files"))
    assert [list(one) for one in found] == [list(one) for one in expected]
    assert len(found[0]) == 6


@pytest.mark.parametrize(("begun", "resumed"), [("shards", "shards"), ("files", "jsonl")])
def test_a_run_is_resumed_exactly(run, data, base_flags, tmp_path, begun, resumed):
    """Also on the same samples in another form: their fingerprint is the same."""
    whole = run(begun, *(("--dataloader_num_workers", "2") if begun == "shards" else ()))
    shutil.copytree(whole.with_name("checkpoint-3"), tmp_path / "half/checkpoint-3")
    flags = [*base_flags, *data[resumed], *QUICK, "--output_dir", str(tmp_path / "half")]
    assert train.main([*flags, "--resume_from_checkpoint", "auto"]) == 0
    assert_same(tmp_path / "half/checkpoint-6", whole)


@pytest.mark.slow
def test_stored_features_are_those_of_files_whoever_stores_them(run, data, base_flags, tmp_path):
    cache = ("--feature_cache", tmp_path / "cache", "--feature_cache_dtype", "float32")
    assert_same(run("shards", *cache), run("files"))
    stored = sorted(path.name for path in (tmp_path / "cache").glob("*/??/*.safetensors"))
    assert len(stored) == 6
    assert_same(run("files", *cache), run("files"))
    assert len(list((tmp_path / "cache").glob("*/??/*.safetensors"))) == 6
    other = ["--feature_cache", str(tmp_path / "other"), "--feature_cache_dtype", "float32", "--num_workers", "0"]
    assert cache_features.main(["--image_map", data["shards"][1], "--device", "cpu", *base_flags[2:], *other]) == 0
    assert sorted(path.name for path in (tmp_path / "other").glob("*/??/*.safetensors")) == stored


def test_damage_is_a_bad_sample_with_its_place(base_flags, data, tmp_path, capsys):
    shards = Path(data["shards"][1]).parent.with_name("shards")
    shutil.copytree(shards, tmp_path / "shards")
    text = Path(data["shards"][1]).read_text().replace(str(shards), str(tmp_path / "shards"))
    (tmp_path / "image_map.json").write_text(text)
    place = json.loads(text)["ai_challenger/000000/yellow.png"]["image_file"]
    with (tmp_path / "shards" / place.split("/")[0]).open("r+b") as file:
        file.seek(int(place.split(":")[1]) + 20)
        file.write(b"??")
    flags = [*base_flags, "--image_map", str(tmp_path / "image_map.json"), *data["shards"][2:], *QUICK]
    flags += ["--output_dir", str(tmp_path / "run")]
    assert train.main([*flags, "--on_bad_sample", "error"]) == 2
    assert place in one_line_error(capsys.readouterr().err, "train.py")
    trainer = build_trainer([*flags, "--max_bad_fraction", "0.5", "--overwrite_output_dir", "true"])
    trainer.train()
    bad = trainer.train_dataset.dataset.bad
    assert len(bad) == 1
    assert place in bad.all_messages(trainer.train_dataset.dataset)[0]
