"""Fingerprints tell base models apart by what was published, not by where it is stored or how it is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPModel

from model import VisionLanguageModel
from model.checkpoints.base_models import fingerprint


def weights(seed: int = 0, size: int = 300) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"a.weight": torch.randn(5, size, generator=generator), "a.bias": torch.randn(5, generator=generator)}


def test_only_other_weights_shapes_names_and_settings_have_another_fingerprint():
    assert fingerprint({"a": torch.arange(300.0)}, {"b": 1}) == "v2-366462b7a6254a61"  # of all versions
    assert fingerprint({name: value.bfloat16() for name, value in weights().items()}) == fingerprint(weights())
    found = [
        fingerprint(weights()),
        fingerprint(weights(seed=1)),
        fingerprint(weights(size=301)),
        fingerprint({f"b.{name}": value for name, value in weights().items()}),
        fingerprint(weights(), {"image_mean": 0.5}),
    ]
    assert len(set(found)) == len(found)


def test_of_a_model_of_two_halves_the_vision_half_counts_and_nothing_that_is_computed():
    vision = {f"vision_model.{name}": value for name, value in weights().items()}
    text = {f"text_model.{name}": value for name, value in weights(seed=1).items()}
    computed = {"vision_model.position_ids": torch.arange(5), "vision_model.rotary.inv_freq": torch.ones(3)}
    assert fingerprint(weights()) == fingerprint(vision) == fingerprint({**vision, **text, **computed})


@pytest.mark.parametrize("size", [1, 64, 65, 19_447_808])  # the last is past what fp32 can count to
def test_tensors_of_any_size(size):
    tensor = torch.zeros(size, dtype=torch.bfloat16)
    before = fingerprint({"weight": tensor})
    tensor[-1] = 1  # the last value counts in every size
    assert fingerprint({"weight": tensor}) != before


def test_copies_in_other_forms_and_dtypes_have_the_fingerprints_of_the_original(tiny_bases, tmp_path):
    """In shards, pickled, with new names of files; loaded in another precision; and not those of another model."""
    original = VisionLanguageModel.from_pretrained(*tiny_bases, device="cpu").fingerprints
    half = VisionLanguageModel.from_pretrained(*tiny_bases, device="cpu", dtype=torch.float16).fingerprints
    assert half == original
    assert all(value.startswith("v2-") and len(value) == 19 for value in original.values())

    sharded = Path(shutil.copytree(tiny_bases[0], tmp_path / "sharded"))
    tensors = load_file(sharded / "model.safetensors")
    (sharded / "model.safetensors").unlink()
    index = {name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(sorted(tensors))}
    for file in set(index.values()):
        part = {name: value for name, value in tensors.items() if index[name] == file}
        save_file(part, sharded / file, metadata={"format": "pt"})
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))

    pickled = Path(shutil.copytree(tiny_bases[1], tmp_path / "pickled"))
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    assert VisionLanguageModel.from_pretrained(str(sharded), str(pickled), device="cpu").fingerprints == original

    CLIPModel.from_pretrained(tiny_bases[1]).save_pretrained(tmp_path / "saved again")
    shutil.copy(Path(tiny_bases[1]) / "preprocessor_config.json", tmp_path / "saved again")
    again = VisionLanguageModel.from_pretrained(tiny_bases[0], str(tmp_path / "saved again"), device="cpu")
    assert again.fingerprints == original

    settings = tmp_path / "saved again/preprocessor_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "image_mean": [0.1, 0.2, 0.3]}))
    other = VisionLanguageModel.from_pretrained(tiny_bases[0], str(tmp_path / "saved again"), device="cpu")
    assert other.fingerprints["vision_tower_fingerprint"] != original["vision_tower_fingerprint"]
