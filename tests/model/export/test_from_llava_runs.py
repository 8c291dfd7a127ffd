"""A run that starts from a LLaVA folder: its feature cache, checkpoint, resuming, exports, and what is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from tiny_llava import start, write_llava
from tiny_run import build_trainer, load_test_py, one_line_error, write_data
from tiny_towers import pixels
from tiny_vlm import new_model

import train
from model import VisionLanguageModel
from model.arguments import parse_arguments
from model.checkpoints.checkpoint import CheckpointError, read_checkpoint
from model.dry_run.planned_model import planned_model
from visual import build_vision_tower, cache_features, read_tower_shape
from visual.feature_cache import tower_key

ask = load_test_py()


@pytest.fixture
def flags(language, towers, tmp_path, pictures) -> list[object]:
    """Two steps from a folder that reads CLIP before its last block."""
    write_llava(tmp_path / "llava", towers["clip"])
    samples = [(f"{name}.png", ("<|extra_0|>Colour?", name)) for name in ("red", "green", "blue", "black")]
    data = write_data(tmp_path / "data", samples, pictures["red"].parent)
    bases = ["--base_language_model", language, "--base_value_model", towers["clip"]]
    return [
        *(*bases, *data, "--from_llava", tmp_path / "llava", "--output_dir", tmp_path / "run", "--lora_rank", 3),
        *("--per_device_train_batch_size", 2, "--num_train_epochs", 1, "--use_cpu", "true", "--report_to", "none"),
        *("--feature_proj_lr", 1e-3, "--disable_tqdm", "true", "--save_steps", 1),
    ]


def words(flags: list[object], *more: object) -> list[str]:
    return [str(word) for word in (*flags, *more)]


def test_a_run_and_all_that_comes_of_it(flags, towers, tmp_path, export, capfd):
    # A cache that is filled beforehand is the one that training reads, and another than the whole tower's.
    cache = ["--feature_cache", tmp_path / "cache", "--feature_cache_dtype", "float32"]
    own = ["--image_map", flags[5], "--base_value_model", towers["clip"], "--num_workers", 0]
    assert cache_features.main(words(cache, *own, "--from_llava", tmp_path / "llava")) == 0
    (folder,) = (tmp_path / "cache").iterdir()
    assert folder.name.split("-")[0] != tower_key(build_vision_tower(towers["clip"]))
    trainer = build_trainer([*flags, *cache])
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [folder.name]
    started = {name: value.clone() for name, value in trainer.model.projector.state_dict().items()}
    trainer.train()
    trainer.save_model()
    moved = trainer.model.projector.state_dict()
    assert not torch.equal(moved["0.weight"], started["0.weight"])

    # The checkpoint says where the tower is read, and the train_config what was asked for.
    run = tmp_path / "run"
    checkpoint = run / "checkpoint-2"
    assert json.loads((checkpoint / "multimodal_config.json").read_text())["vision_feature_layer"] == -2
    assert json.loads((run / "train_config.json").read_text())["model"]["from_llava"] == str(tmp_path / "llava")
    loaded = VisionLanguageModel.from_pretrained(model_weights=checkpoint, device="cpu")
    assert loaded.vision_tower.feature_layer == -2
    assert torch.equal(loaded.encode_images(pixels()), trainer.model.eval().encode_images(pixels()))
    assert ask.main(words(["--model_weights", checkpoint, "--prompt", "Colour?", "--max_new_tokens", 2])) == 0

    # It resumes with the flag, and is another run without it.
    resumed = build_trainer([*flags, "--resume_from_checkpoint", checkpoint])
    assert resumed.args.resume_from_checkpoint == str(checkpoint)
    without = [word for word in words(flags) if word not in ("--from_llava", str(tmp_path / "llava"))]
    capfd.readouterr()
    assert train.main([*without, "--resume_from_checkpoint", str(checkpoint)]) == 2
    assert "vision_feature_layer" in one_line_error(capfd.readouterr().err, "train.py")

    # Another run starts from it, and it may be exported as a LLaVA that reads the same layer, or merged.
    fresh = [word for word in without if word not in ("--lora_rank", "3")]
    again = build_trainer([*fresh, "--output_dir", tmp_path / "next", "--previous_lora_weights", checkpoint])
    assert again.model.vision_tower.feature_layer == -2
    for kind in ("llava", "merged"):
        out = export(checkpoint, "--format", kind, verify=True, name=f"as {kind}")
        config = json.loads((out / ("config.json" if kind == "llava" else "multimodal_config.json")).read_text())
        assert config["vision_feature_layer"] == -2


def test_siglips_inner_layer_is_exported_without_a_further_block(language, towers, tmp_path, export):
    write_llava(tmp_path / "llava", towers["siglip"])
    start(language, towers["siglip"], tmp_path / "llava").save_checkpoint(tmp_path / "trained")
    folder = export(tmp_path / "trained", verify=True)  # the features that test.py has, or it would not be equal
    config = json.loads((folder / "config.json").read_text())
    assert (config["vision_feature_layer"], config["vision_config"]["num_hidden_layers"]) == (-2, 3)
    again = start(language, towers["siglip"], folder)
    assert again.vision_tower.feature_layer == -2


def test_a_tower_of_another_layer_does_not_fit_a_checkpoint(language, towers, tmp_path):
    whole = new_model((language, towers["clip"]))
    whole.save_checkpoint(tmp_path / "whole")
    note = json.loads((tmp_path / "whole" / "multimodal_config.json").read_text())
    assert "vision_feature_layer" not in note  # files stay as they were
    assert read_checkpoint(tmp_path / "whole").config.vision_feature_layer == -1
    write_llava(tmp_path / "llava", towers["clip"])
    with pytest.raises(CheckpointError, match=r"vision_feature_layer is -2, .* -1"):
        start(language, towers["clip"], tmp_path / "llava").load_checkpoint(tmp_path / "whole")
    whole.save_checkpoint(tmp_path / "broken")
    for value, reason in ((0, "-1 or less"), ("-2", "must be a int"), (-9, "-9: the tower is clip with 3 blocks")):
        (tmp_path / "broken" / "multimodal_config.json").write_text(json.dumps({**note, "vision_feature_layer": value}))
        (tmp_path / "broken" / "checksums.json").unlink(missing_ok=True)
        with pytest.raises(ValueError, match=reason):
            VisionLanguageModel.from_pretrained(model_weights=tmp_path / "broken", device="cpu")


def test_a_dry_run_counts_the_blocks_that_are_left(flags, towers, tmp_path):
    for file in (tmp_path / "llava").glob("*.safetensors"):
        file.unlink()  # no weights are needed
    planned, _ = planned_model(parse_arguments(words(flags))[0])
    whole = read_tower_shape(towers["clip"]).num_parameters
    tower = build_vision_tower(towers["clip"], feature_layer=-2)
    assert planned.tower_parameters == sum(parameter.numel() for parameter in tower.parameters()) < whole


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (("--projector_layers", "1"), "--projector_layers 1"),
        (("--pixel_shuffle", "2"), "--pixel_shuffle 2"),
        (("--previous_lora_weights", "x"), "--previous_lora_weights x"),
    ],
)
def test_flags_that_do_not_go_together(flags, capfd, more, reason):
    assert train.main(words(flags, *more)) == 2
    assert reason in one_line_error(capfd.readouterr().err, "train.py")


def test_a_folder_that_does_not_fit_ends_a_run_in_one_line(flags, tmp_path, capfd):
    shutil.rmtree(tmp_path / "llava")
    for more in ((), ("--dry_run", "true")):
        assert train.main(words(flags, *more)) == 2
        assert "no such folder" in one_line_error(capfd.readouterr().err, "train.py")
    own = ["--image_map", flags[5], "--feature_cache", tmp_path / "cache", "--from_llava", tmp_path / "llava"]
    assert cache_features.main(words(own)) == 2
    assert cache_features.main(words(own, "--previous_lora_weights", "x")) == 2
