"""Training starts from a LLaVA folder's projector, on the features that the folder reads, or not at all."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_llava import BLOCKS, WIDTH, assert_same_features, start, write_llava
from tiny_towers import make_clip_checkpoint, make_dinov2_checkpoint, make_siglip_checkpoint, pixels

from model import VisionLanguageModel
from model.checkpoints.checkpoint import CheckpointError
from model.export.from_llava import llava_feature_layer

# ---- Features and projector


@pytest.mark.parametrize("read", [-1, -2, -3, 1, 3])
def test_clip_is_read_where_the_folder_reads_it(language, towers, tmp_path, read):
    theirs = write_llava(tmp_path, towers["clip"], vision_feature_layer=read)
    ours = start(language, towers["clip"], tmp_path)
    assert_same_features(ours, theirs)
    assert ours.vision_tower.feature_layer == (read if read < 0 else read - BLOCKS - 1)
    blocks = {name.split("layers.")[1][0] for name in ours.vision_tower.state_dict() if "layers." in name}
    assert len(blocks) == BLOCKS + 1 + ours.vision_tower.feature_layer  # the others are gone
    assert all(parameter.requires_grad for parameter in ours.projector.parameters())
    assert {parameter.dtype for parameter in ours.projector.parameters()} == {torch.float32}


@pytest.mark.parametrize(("blocks", "read"), [(3, -2), (2, -1), (3, -3)])
def test_siglip_is_read_before_an_inner_block(language, towers, tmp_path, blocks, read):
    theirs = write_llava(tmp_path, towers["siglip"], blocks=blocks, vision_feature_layer=read)
    ours = start(language, towers["siglip"], tmp_path)
    assert_same_features(ours, theirs)
    assert ours.vision_tower.feature_layer == read + blocks - BLOCKS


def old_name(name: str) -> str:
    """As llava-hf's folders name their tensors."""
    name = name.removeprefix("model.").replace("vision_model.", "")
    return name.replace("vision_tower.", "vision_tower.vision_model.")


def new_name(name: str) -> str:
    """As transformers names the parameters."""
    return "model." + name.removeprefix("model.").replace("vision_model.", "")


@pytest.mark.parametrize("layout", ["old", "new", "shards", "bin", "bfloat16", "float16"])
def test_every_layout_is_read(language, towers, tmp_path, layout):
    theirs = write_llava(tmp_path, towers["clip"])
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    if layout in ("old", "new"):
        rename = old_name if layout == "old" else new_name
        renamed = {rename(name): value for name, value in weights.items()}
        assert any(name.startswith("model.vision_tower.encoder") for name in renamed) == (layout == "new")
        save_file(renamed, file)
    elif layout == "bin":
        file.unlink()
        torch.save(weights, tmp_path / "pytorch_model.bin")
    elif layout == "shards":
        file.unlink()
        theirs.save_pretrained(tmp_path, max_shard_size="20KB")
        assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    else:
        dtype = getattr(torch, layout)
        save_file({name: value.to(dtype) for name, value in weights.items()}, file)
        theirs.model.multi_modal_projector.to(dtype).float()
    assert_same_features(start(language, towers["clip"], tmp_path), theirs)


def test_a_folder_without_a_tower_says_so(language, towers, tmp_path, caplog):
    theirs = write_llava(tmp_path, towers["clip"])
    file = tmp_path / "model.safetensors"
    save_file({name: value for name, value in load_file(file).items() if "multi_modal" in name}, file)
    assert_same_features(start(language, towers["clip"], tmp_path), theirs)
    assert "no weights of its tower" in caplog.text


# ---- Exports come back


@pytest.mark.parametrize("make_tower", [make_clip_checkpoint, make_siglip_checkpoint], ids=["clip", "siglip"])
def test_an_export_comes_back_to_the_bit(export, make_checkpoint, make_tower):
    checkpoint = make_checkpoint(make_tower)
    bases = str(checkpoint.parent / "qwen"), str(checkpoint.parent / "tower")
    folder = export(checkpoint, "--dtype", "float32")
    ours = start(*bases, folder)
    expected = load_file(checkpoint / "projector.safetensors")
    assert all(torch.equal(ours.projector.state_dict()[name], value) for name, value in expected.items())
    trained = VisionLanguageModel.from_pretrained(model_weights=checkpoint, device="cpu")
    assert torch.equal(ours.encode_images(pixels()), trained.encode_images(pixels()))


def test_a_block_that_is_no_last_norm_is_refused(export, make_checkpoint):
    checkpoint = make_checkpoint(make_siglip_checkpoint)
    bases = str(checkpoint.parent / "qwen"), str(checkpoint.parent / "tower")
    folder = export(checkpoint)
    weights = load_file(folder / "model.safetensors")
    weights["vision_tower.vision_model.encoder.layers.2.mlp.fc2.bias"][0] = 1e-3
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match="block 2"):
        start(*bases, folder)
    save_file({name: value for name, value in weights.items() if "tower" not in name}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="vision tower is not that of"):  # it can't be told what its last block is
        start(*bases, folder)


# ---- What does not fit


@pytest.mark.parametrize(
    ("changes", "reasons"),
    [
        ({"vision_feature_select_strategy": "full"}, ["'full'", "class token", "'default'"]),
        ({"vision_feature_layer": [-2, -1]}, [r"\[-2, -1\]"]),
        ({"vision_feature_layer": -4}, ["vision_feature_layer -4", "block 0"]),
        ({"vision_feature_layer": 0}, ["vision_feature_layer 0"]),
        ({"vision_feature_layer": 4}, ["vision_feature_layer 4"]),
        ({"vision_feature_layer": "x"}, [r"vision_feature_layer': \S.*'x'"]),
        ({"projector_hidden_act": "relu"}, ["'relu'", "'gelu'"]),
        ({"multimodal_projector_bias": False}, ["bias False"]),
        ({"model_type": "llava_next"}, ["'llava_next'", "'llava'"]),
        ({"vision_config": {"image_size": 42}}, ["image_size is 42", "28"]),
        ({"vision_config": {"hidden_act": "gelu"}}, ["hidden_act is gelu", "quick_gelu"]),
        ({"vision_config": {"num_attention_heads": 2}}, ["num_attention_heads is 2", "4"]),
        ({"vision_config": {"patch_size": 7, "image_size": 14}}, ["patch_size is 7.*image_size is 14"]),
        ({"vision_config": {"tie_last_hidden_states": True}}, ["tie_last_hidden_states"]),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, ["siglip_vision_model", "clip"]),
        ({"text_config": {"hidden_size": 4096}}, ["4096 wide", "16"]),
    ],
    ids=lambda value: str(value)[:50] if isinstance(value, dict) else "",
)
def test_settings_that_do_not_fit_are_refused_with_the_reason(language, towers, tmp_path, changes, reasons):
    write_llava(tmp_path, towers["clip"])
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    for name, value in changes.items():
        config[name] = {**config[name], **value} if isinstance(value, dict) else value
    file.write_text(json.dumps(config))
    # Without any weights, as a dry run sees it.
    with pytest.raises(ValueError, match=".*".join([str(tmp_path), *reasons])):
        llava_feature_layer(str(tmp_path), towers["clip"], WIDTH)
    with pytest.raises(ValueError, match=reasons[0]):
        start(language, towers["clip"], tmp_path)


@pytest.mark.parametrize(
    ("blocks", "changes", "reason"),
    [
        (3, {"vision_feature_layer": -1}, "last norm"),
        (3, {"vision_feature_select_strategy": "default"}, "first patch"),
    ],
)
def test_siglips_misfits(language, towers, tmp_path, blocks, changes, reason):
    write_llava(tmp_path, towers["siglip"], blocks=blocks, **changes)
    with pytest.raises(ValueError, match=reason):
        start(language, towers["siglip"], tmp_path)


def test_towers_of_other_families_are_refused(language, towers, tmp_path):
    write_llava(tmp_path / "llava", towers["clip"])
    dinov2 = make_dinov2_checkpoint(tmp_path / "dinov2")
    with pytest.raises(ValueError, match="dinov2; both must be CLIP"):
        start(language, dinov2, tmp_path / "llava")
    with pytest.raises(ValueError, match="siglip; both must be CLIP"):
        start(language, towers["siglip"], tmp_path / "llava")


@pytest.mark.parametrize("name", ["embeddings.patch_embedding.weight", "encoder.layers.1.mlp.fc1.bias"])
def test_another_tower_of_the_same_shape_is_refused(language, towers, tmp_path, name):
    write_llava(tmp_path, towers["clip"])
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    (full,) = (key for key in weights if key.endswith(name))
    weights[full] *= 1.02  # more than bfloat16 rounds
    save_file(weights, file)
    with pytest.raises(ValueError, match=name):
        start(language, towers["clip"], tmp_path)


def test_weights_that_no_feature_depends_on_are_not_compared(language, towers, tmp_path):
    theirs = write_llava(tmp_path, towers["clip"])
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    unused = [name for name in weights if "encoder.layers.2." in name or "post_layernorm" in name]
    assert len(unused) > 5
    save_file({name: torch.zeros_like(value) if name in unused else value for name, value in weights.items()}, file)
    assert_same_features(start(language, towers["clip"], tmp_path), theirs)


def test_other_pixels_are_refused(language, towers, tmp_path):
    write_llava(tmp_path, towers["clip"])
    file = tmp_path / "preprocessor_config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps({**values, "image_mean": [0.5, 0.5, 0.5]}))
    with pytest.raises(ValueError, match="prepares pictures"):
        start(language, towers["clip"], tmp_path)
    file.unlink()
    with pytest.raises(OSError, match=r"preprocessor_config\.json"):
        start(language, towers["clip"], tmp_path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda weights: {k: v for k, v in weights.items() if "linear_2.bias" not in k}, r"missing 2\.bias"),
        (lambda weights: {k: v * torch.inf if "linear_1.weight" in k else v for k, v in weights.items()}, "not finite"),
        (lambda weights: {k: v[:, :30] if "linear_1.weight" in k else v for k, v in weights.items()}, "30"),
        (lambda weights: {k: v for k, v in weights.items() if "multi_modal" not in k}, r"missing 0\.bias"),
    ],
)
def test_projectors_that_do_not_fit(language, towers, tmp_path, change, reason):
    write_llava(tmp_path, towers["clip"])
    file = tmp_path / "model.safetensors"
    save_file({name: value.contiguous() for name, value in change(load_file(file)).items()}, file)
    with pytest.raises(CheckpointError, match=reason):
        start(language, towers["clip"], tmp_path)


def test_files_that_cannot_be_read(language, towers, tmp_path):
    with pytest.raises(ValueError, match=r"--from_llava .* no config\.json; give the folder"):
        start(language, towers["clip"], tmp_path)
    with pytest.raises(ValueError, match=r"--from_llava .*/none: no such folder; give the folder"):
        start(language, towers["clip"], tmp_path / "none")
    write_llava(tmp_path, towers["clip"])
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match="can't be read"):
        start(language, towers["clip"], tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"multi_modal_projector.linear_1.weight": print}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="could run code"):
        start(language, towers["clip"], tmp_path)
