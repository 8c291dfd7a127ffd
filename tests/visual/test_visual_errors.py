"""Checkpoints that are absent, damaged, foreign or hostile: one clear error each, and no code of theirs is run."""

import json
import os

import pytest
import torch
from tiny_towers import make_clip_checkpoint, make_dinov3_checkpoint, pixels

from visual import TOWERS, build_vision_tower


def edit(path, **changes):
    """Change values of a JSON file; None takes a key away."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


@pytest.mark.parametrize("model_type", ["qwen", None, ["clip"], "siglip2"])
def test_an_unknown_type_says_which_are_known(tmp_path, model_type):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(ValueError, match="fixed resolution" if model_type == "siglip2" else "clip") as error:
        build_vision_tower(tmp_path)
    assert repr(model_type) in str(error.value)
    assert all(known in str(error.value) for known in TOWERS)


def test_absent_checkpoints(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.json").write_text("{not json")
    absent = {tmp_path: "no folder with a config", tmp_path / "file": "no folder with a config"}
    absent |= {tmp_path / "absent": "cannot be read; give", "nobody/no-such-tower": "cannot be read; give"}
    for name, said in (absent | {tmp_path / "damaged": "not a valid JSON file"}).items():
        with pytest.raises(FileNotFoundError, match=said):
            build_vision_tower(name)


def test_absent_or_damaged_files(tmp_path):
    folder = tmp_path / "clip"
    make_clip_checkpoint(folder)
    processor = (folder / "preprocessor_config.json").read_text()
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"preprocessor_config\.json"):
        build_vision_tower(folder)
    (folder / "preprocessor_config.json").write_text(processor)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ValueError, match="cannot be loaded") as error:
        build_vision_tower(folder)
    assert len(str(error.value).splitlines()) == 1
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"weights of .* cannot be loaded"):
        build_vision_tower(folder)
    (folder / "pytorch_model.bin").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="cannot be loaded") as error:
        build_vision_tower(folder)
    assert len(str(error.value).splitlines()) == 1


def test_a_pickle_with_code_in_it_is_not_run(tmp_path):
    folder = tmp_path / "clip"
    make_clip_checkpoint(folder)
    (folder / "model.safetensors").unlink()
    torch.save({"logit_scale": Evil(tmp_path / "ran")}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="may run code and is not loaded"):
        build_vision_tower(folder)
    assert not (tmp_path / "ran").exists()


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"intermediate_size": 48}, "of another shape"),
        ({"num_hidden_layers": 1}, r"16 not in the configuration \(.*layers\.1\."),
        ({"num_hidden_layers": 3}, r"16 missing \(encoder\.layers\.2"),
        ({"num_channels": 1}, "1 channels"),
        ({"image_size": [28, 28]}, r"image_size .*got \[28, 28\]"),
        ({"hidden_size": 31}, r"config\.json of .* is no CLIPVisionConfig"),
    ],
)
def test_a_configuration_that_does_not_fit_is_named(tmp_path, changes, said):
    make_clip_checkpoint(tmp_path)
    vision = json.loads((tmp_path / "config.json").read_text())["vision_config"]
    edit(tmp_path / "config.json", vision_config=vision | changes)
    with pytest.raises(ValueError, match=said):
        build_vision_tower(tmp_path)


@pytest.mark.parametrize(("layers", "said"), [(1, "not in the configuration"), (3, "missing")])
def test_dinov3_of_another_depth_is_named(tmp_path, layers, said):
    make_dinov3_checkpoint(tmp_path)
    edit(tmp_path / "config.json", num_hidden_layers=layers, out_features=None, out_indices=None, stage_names=None)
    with pytest.raises(ValueError, match=rf"\d {said} \(.*layer"):
        build_vision_tower(tmp_path)


def test_code_in_a_checkpoint_is_never_run(tmp_path):
    folder = tmp_path / "clip"
    make_clip_checkpoint(folder)
    expected = build_vision_tower(folder)(pixels())
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    remote = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model", "AutoImageProcessor": "evil.Processor"}
    edit(folder / "config.json", auto_map=remote)
    edit(folder / "preprocessor_config.json", auto_map=remote)
    assert torch.equal(build_vision_tower(folder)(pixels()), expected)
    assert not (tmp_path / "ran").exists()
