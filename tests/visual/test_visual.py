"""Vision towers: features are transformers' own, and nothing trains."""

import functools
import json
import logging
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_run import ROOT, environment
from tiny_towers import (
    CLIP_MEAN,
    CLIP_STD,
    make_clip_checkpoint,
    make_dinov3_checkpoint,
    make_siglip_checkpoint,
    pixels,
    rename_weights,
)
from torch import nn
from transformers import AutoModel, CLIPVisionModel

from visual import build_vision_tower, read_tower_shape

PREFIX = {"clip": 1, "siglip": 0, "dinov2": 1, "dinov2_with_registers": 4, "dinov3_vit": 5, "vit": 1}
"""Tokens before the patches, by kind."""


def transformers_features(folder, x):
    """Last hidden state of transformers' own model, which is loaded whole, text half and heads included."""
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return getattr(model, "vision_model", model)(pixel_values=x).last_hidden_state


@pytest.mark.parametrize("kind", PREFIX)
def test_features_are_transformers_own_less_the_tokens_that_are_no_patch(checkpoints, kind):
    tower = build_vision_tower(checkpoints[kind])
    reference = transformers_features(checkpoints[kind], pixels())
    prefix = PREFIX[kind]
    assert reference.shape == (2, prefix + 4, 32)
    assert (tower.kind, tower.image_size, tower.hidden_size, tower.num_image_tokens) == (kind, 28, 32, 4)
    torch.testing.assert_close(tower(pixels()), reference[:, prefix:], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_every_patch_counts_including_siglips_first(checkpoints, kind):
    """A change in the corner patch alone must show in the first token (the original project threw it away)."""
    tower = build_vision_tower(checkpoints[kind])
    changed = pixels()
    changed[:, :, :14, :14] += 1
    difference = (tower(changed) - tower(pixels())).abs().amax(dim=(0, 2))
    assert difference.argmax() == 0


@pytest.mark.parametrize(
    ("make", "image_size", "tokens"),
    [
        (make_siglip_checkpoint, 33, 4),  # no multiple of the patch
        (make_clip_checkpoint, 224, 256),  # CLIP-L/14: 257 - 1 tokens
        (make_siglip_checkpoint, 384, 729),  # SigLIP-so400m/14: all of them
        (functools.partial(make_dinov3_checkpoint, patch_size=16), 224, 196),  # DINOv3/16: 201 - 5
    ],
)
def test_the_published_geometries(tmp_path, make, image_size, tokens):
    folder = make(tmp_path, image_size=image_size, num_hidden_layers=1)
    tower = build_vision_tower(folder)
    assert tower.num_image_tokens == tokens == tower(pixels(1, image_size)).shape[1]
    assert read_tower_shape(folder).num_image_tokens == tokens


def test_first_patch_is_dropped_on_request_and_for_siglip_only(checkpoints):
    whole = build_vision_tower(checkpoints["siglip"])
    short = build_vision_tower(checkpoints["siglip"], drop_first_patch=True)
    assert short.num_image_tokens == 3
    assert torch.equal(short(pixels()), whole(pixels())[:, 1:])
    assert short(pixels(0)).shape == (0, 3, 32)
    assert read_tower_shape(checkpoints["siglip"], drop_first_patch=True).num_image_tokens == 3
    with pytest.raises(ValueError, match="SigLIP towers only"):
        build_vision_tower(checkpoints["vit"], drop_first_patch=True)


def test_nothing_gets_a_gradient_or_leaves_eval(checkpoints):
    tower = build_vision_tower(checkpoints["clip"])
    around = nn.ModuleDict({"tower": tower, "projector": nn.Linear(32, 5)}).train()
    assert around.projector.training
    assert not any(module.training for module in tower.modules())
    assert not any(parameter.requires_grad for parameter in tower.parameters())

    tower.requires_grad_(True)  # even a careless caller cannot make it train
    before = {name: value.clone() for name, value in tower.state_dict().items()}
    features = tower(pixels().requires_grad_())
    assert not features.requires_grad
    optimizer = torch.optim.SGD(around.parameters(), lr=1.0)
    around.projector(features).sum().backward()
    optimizer.step()
    assert around.projector.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in tower.parameters())
    assert all(torch.equal(value, before[name]) for name, value in tower.state_dict().items())


PUBLISHED = {"openai/clip-vit-large-patch14": "clip", "google/siglip-so400m-patch14-384": "siglip"}
# As openai/clip-vit-large-patch14 has it: whole numbers for sizes, and the name of the class as it was once called.
OLD_PREPROCESSOR = {
    "crop_size": 28,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
    "resample": 3,
    "size": 32,
}


def test_published_names_are_found_in_the_hubs_cache(checkpoints, tmp_path):
    for name, kind in PUBLISHED.items():
        folder = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        shutil.copytree(checkpoints[kind], folder / "snapshots" / "0123")
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("0123")
    code = f"""
from visual import build_vision_tower, read_tower_shape
for name in {list(PUBLISHED)}:
    tower = build_vision_tower(name)
    assert tower.name_or_path == name
    assert tower.num_image_tokens == read_tower_shape(name).num_image_tokens
    print(tower.kind)
"""
    env = environment(HF_HOME=str(tmp_path))
    env = {key: value for key, value in env.items() if key != "HF_HUB_CACHE"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.stdout.split() == list(PUBLISHED.values()), done.stderr


def test_the_published_old_style_preprocessor_of_clip_is_read(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints["clip"], tmp_path / "clip")
    (folder / "preprocessor_config.json").write_text(json.dumps(OLD_PREPROCESSOR))
    image = Image.linear_gradient("L").resize((61, 37)).convert("RGB")
    transforms = [build_vision_tower(path).image_transform for path in (folder, checkpoints["clip"])]
    assert torch.equal(transforms[0](image), transforms[1](image))
    assert read_tower_shape(folder).image_size == 28


@pytest.mark.parametrize("processor", ["SiglipImageProcessor", "SiglipImageProcessorFast"])
def test_siglip_2_of_a_fixed_size_is_a_siglip(checkpoints, tmp_path, processor):
    """Its config.json names few values, its text half has Gemma's vocabulary, and it resizes bilinearly."""
    folder = shutil.copytree(checkpoints["siglip"], tmp_path / "siglip2")
    vision = json.loads((folder / "config.json").read_text())["vision_config"]
    names = ("hidden_size", "image_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "patch_size")
    config = {
        "architectures": ["SiglipModel"],
        "model_type": "siglip",
        "text_config": {"model_type": "siglip_text_model", "vocab_size": 256_000},
        "vision_config": {"model_type": "siglip_vision_model", **{name: vision[name] for name in names}},
    }
    (folder / "config.json").write_text(json.dumps(config))
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    settings |= {"image_processor_type": processor, "processor_class": "SiglipProcessor", "resample": 2}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    tower = build_vision_tower(folder)
    assert (tower.kind, tower.num_image_tokens) == ("siglip", 4)
    assert torch.equal(tower(pixels()), build_vision_tower(checkpoints["siglip"])(pixels()))
    image = Image.linear_gradient("L").resize((61, 37)).convert("RGB")
    resized = np.array(image.resize((28, 28), Image.Resampling.BILINEAR), dtype=np.float32)
    expected = torch.from_numpy(resized).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(tower.image_transform(image), expected, rtol=0, atol=1e-5)


def test_checkpoints_of_the_vision_half_alone_in_both_layouts(checkpoints, tmp_path):
    """Files with and without the `vision_model.` prefix, as transformers 4 and 5 write them; `.bin` files too."""
    expected = build_vision_tower(checkpoints["clip"])(pixels())
    folder = tmp_path / "half"
    CLIPVisionModel.from_pretrained(checkpoints["clip"]).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "clip_vision_model"
    shutil.copy(f"{checkpoints['clip']}/preprocessor_config.json", folder)
    for layout in ("vision_model.", ""):
        rename_weights(folder, lambda name, layout=layout: layout + name.removeprefix("vision_model."))
        tower = build_vision_tower(folder)
        assert tower.kind == "clip"
        assert torch.equal(tower(pixels()), expected)
    weights = load_file(folder / "model.safetensors")
    weights["vision_model.embeddings.position_ids"] = torch.arange(5)[None]  # a buffer that old files hold
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert torch.equal(build_vision_tower(folder)(pixels()), expected)


def test_loading_leaves_the_text_half_out_and_says_nothing_about_it(checkpoints, caplog, capfd, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    tower = build_vision_tower(checkpoints["clip"])
    in_file = load_file(f"{checkpoints['clip']}/model.safetensors")
    vision = sum(value.numel() for name, value in in_file.items() if name.startswith("vision_model."))
    assert sum(parameter.numel() for parameter in tower.parameters()) == vision
    assert not any("head" in name for name in build_vision_tower(checkpoints["siglip"]).state_dict())
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    printed = capfd.readouterr()
    assert "UNEXPECTED" not in printed.out + printed.err
    assert not printed.out  # stdout is for answers


def test_data_types(checkpoints):
    reference = build_vision_tower(checkpoints["clip"])
    assert reference(pixels().double()).dtype == torch.float32
    tower = build_vision_tower(checkpoints["clip"], dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in tower.parameters()} == {torch.bfloat16}
    features = tower(pixels())  # the pixels are float32: the tower casts them
    assert features.dtype == torch.bfloat16
    assert (features.float() - reference(pixels())).norm() < 0.02 * reference(pixels()).norm()


@pytest.mark.parametrize("wrong", [torch.zeros(3, 28, 28), torch.zeros(1, 28, 28, 3), torch.zeros(0, 3, 14, 14)])
def test_pixels_of_another_shape_are_refused(checkpoints, wrong):
    with pytest.raises(ValueError, match=r"28, 28") as error:
        build_vision_tower(checkpoints["clip"])(wrong)
    assert str(tuple(wrong.shape)) in str(error.value)
    with pytest.raises(ValueError, match="uint8"):
        build_vision_tower(checkpoints["clip"])(torch.zeros(1, 3, 28, 28, dtype=torch.uint8))


@pytest.mark.parametrize("kind", PREFIX)
def test_the_shape_of_a_tower_needs_no_weights(checkpoints, tmp_path, kind):
    tower = build_vision_tower(checkpoints[kind])
    folder = shutil.copytree(checkpoints[kind], tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    shape = read_tower_shape(folder)
    for name in ("kind", "hidden_size", "num_image_tokens", "image_size"):
        assert getattr(shape, name) == getattr(tower, name)
    assert shape.num_parameters == sum(parameter.numel() for parameter in tower.parameters())
    (folder / "preprocessor_config.json").unlink()
    if kind in (
        "dinov2",
        "dinov2_with_registers",
    ):  # only that file tells its size, so it is refused as loading the tower refuses it
        with pytest.raises(FileNotFoundError, match=r"preprocessor_config\.json"):
            read_tower_shape(folder)
    else:
        assert read_tower_shape(folder).image_size == tower.image_size
