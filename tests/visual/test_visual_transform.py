"""Image transforms: the pixels are those of the checkpoint's own processor, in workers too."""

import json
import multiprocessing
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny_towers import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    make_clip_checkpoint,
    make_dinov2_checkpoint,
    make_siglip_checkpoint,
)
from transformers import AutoImageProcessor

from visual import build_vision_tower

SIZES = [(28, 28), (61, 37), (17, 90), (1, 1), (300, 3), (13, 13)]
ROOT = Path(__file__).resolve().parents[2]


def picture(size, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


@pytest.mark.parametrize("kind", ["clip", "siglip", "dinov2", "vit"])
def test_pixels_equal_the_checkpoints_own_processor(kind, checkpoints):
    transform = build_vision_tower(checkpoints[kind]).image_transform
    processor = AutoImageProcessor.from_pretrained(checkpoints[kind], backend="pil")
    for size in SIZES:
        pixels = transform(picture(size))
        assert pixels.shape == (3, 28, 28)
        assert pixels.dtype == torch.float32
        assert torch.equal(pixels, processor(images=picture(size), return_tensors="pt")["pixel_values"][0])


def test_dinov3s_pixels_are_what_its_settings_say(checkpoints):
    """Its own processor takes floats through torchvision; bytes, as Pillow resizes them, differ by a step at most."""
    transform = build_vision_tower(checkpoints["dinov3_vit"]).image_transform
    mean, deviation = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    for size in SIZES:
        whole = torch.from_numpy(np.array(picture(size))).permute(2, 0, 1).float() / 255  # (3, H, W)
        resized = F.interpolate(whole[None], (28, 28), mode="bilinear", antialias=True)[0]
        got = transform(picture(size))
        assert got.shape == (3, 28, 28)
        assert ((got - (resized - mean) / deviation).abs() * deviation).max() <= 1.1 / 255, size


def test_a_long_strip_is_the_processors_own_and_the_longest_cost_no_more_than_their_middle(tmp_path):
    """The processor alone would enlarge all of it first: 3 GB for 1 × 5000 pixels at 224, and no end for more."""
    folder = make_clip_checkpoint(tmp_path)
    transform = build_vision_tower(folder).image_transform
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    for size in [(999, 7), (2000, 30), (3, 700), (300, 3), (1, 3000)]:
        expected = processor(images=picture(size), return_tensors="pt")["pixel_values"][0]
        assert torch.equal(transform(picture(size)), expected), size
    seen: list[tuple[int, ...]] = []
    whole = transform.processor.resize
    transform.processor.resize = lambda image, *args, **how: seen.append(image.shape) or whole(image, *args, **how)
    assert transform(Image.new("RGB", (1, 1_000_000), (9, 9, 9))).shape == (3, 28, 28)
    assert max(seen[0]) <= 258


def test_a_strip_that_is_resized_to_a_fixed_size_is_not_cut(tmp_path):
    make_clip_checkpoint(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"size": {"height": 32, "width": 32}}))
    image = Image.new("RGB", (3000, 2), (255, 255, 255))
    image.paste((0, 0, 0), (0, 0, 600, 2))  # a fifth: inside the crop, and outside of the middle of 512 × 2
    processor = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    expected = processor(images=image, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(build_vision_tower(tmp_path).image_transform(image), expected)


def _transformed(transform, image):
    return transform(image)


def test_it_travels_to_a_spawned_process(checkpoints):
    transform = build_vision_tower(checkpoints["siglip"]).image_transform
    assert len(pickle.dumps(transform)) < 10_000  # settings, no weights
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        there = pool.apply(_transformed, (transform, picture((40, 50))))
    assert torch.equal(there, transform(picture((40, 50))))


@pytest.mark.parametrize("mode", ["L", "RGBA"])
def test_other_modes_are_refused(mode, checkpoints):
    transform = build_vision_tower(checkpoints["clip"]).image_transform
    with pytest.raises(ValueError, match=mode):
        transform(Image.new(mode, (30, 30)))


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (make_siglip_checkpoint, {"size": {"height": 42, "width": 42}}, "42×42 px .*model takes 28×28"),
        (make_clip_checkpoint, {"do_center_crop": False}, "32×42 and 42×32 px"),
        (make_dinov2_checkpoint, {"crop_size": {"height": 28, "width": 42}}, "28×42 px .* takes one square"),
    ],
)
def test_a_processor_of_another_size_is_refused(make, changes, message, tmp_path):
    make(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        build_vision_tower(tmp_path)


def test_dinov2s_size_is_its_processors(tmp_path):
    """Its positions, trained for 4 × 4 patches here, are interpolated."""
    make_dinov2_checkpoint(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    larger = {"size": {"shortest_edge": 42}, "crop_size": {"height": 42, "width": 42}}
    file.write_text(json.dumps(json.loads(file.read_text()) | larger))
    tower = build_vision_tower(tmp_path)
    assert (tower.image_size, tower.num_image_tokens) == (42, 9)
    assert tower(tower.image_transform(picture((50, 60)))[None]).shape == (1, 9, 32)


def test_an_unknown_processor_is_refused(tmp_path):
    make_clip_checkpoint(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_processor_type": "NoSuchProcessor"}')
    with pytest.raises(ValueError, match=r"image processor of .* cannot be used"):
        build_vision_tower(tmp_path)
