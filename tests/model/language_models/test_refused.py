"""Language models that do not fit are refused by train.py, dry or not, in one line: name, reason, and what to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_families import make_family
from tiny_run import MIXED_CAPTIONS, one_line_error, write_data
from tiny_towers import make_clip_checkpoint
from transformers import GPT2Config

import train
from model.language_models.causal_lm import check_window
from qwen import QWenConfig

NO_END = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + (eos_token or '') + '\n' }}{% endfor %}"
NO_END += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
REWRITES = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] | upper + '<|eot_id|>' }}{% endfor %}"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    make_family(folder / "mistral", "mistral")
    make_clip_checkpoint(folder / "clip")
    write_data(folder / "data", MIXED_CAPTIONS, folder / "no pictures")
    return folder


def edit(folder: Path, file: str, **changes: object) -> None:
    values = {**json.loads((folder / file).read_text()), **changes}
    (folder / file).write_text(json.dumps({name: value for name, value in values.items() if value is not None}))


@pytest.fixture
def refused(inputs, tmp_path, capsys):
    """Change a language model's configuration and chat template; gives the line in which each train.py ends."""

    def refuse(template: str | None = None, eos_token: str | None = "</s>", **config: object) -> list[str]:
        folder = tmp_path / "base"
        shutil.copytree(inputs / "mistral", folder)
        edit(folder, "config.json", **config)
        edit(folder, "tokenizer_config.json", eos_token=eos_token)
        if template is not None:
            (folder / "chat_template.jinja").write_text(template)
        data = ["--image_map", inputs / "data/image_map.json", "--captions_file", inputs / "data/captions.json"]
        flags = ["--base_language_model", folder, "--base_value_model", inputs / "clip", *data, "--use_cpu", "true"]
        said = []
        for more in ([], ["--dry_run"]):
            capsys.readouterr()
            assert train.main([str(word) for word in (*flags, "--output_dir", tmp_path / "run", *more)]) == 2
            said.append(one_line_error(capsys.readouterr().err, "train.py"))
            assert str(folder) in said[-1]
            assert len(said[-1]) < 500
        return said

    return refuse


@pytest.mark.parametrize(
    ("config", "reason", "remedy"),
    [
        ({"model_type": "gemma2", "final_logit_softcapping": 30.0}, "final_logit_softcapping", "give a decoder"),
        ({"model_type": "t5"}, "'t5' is an encoder with a decoder", "give a decoder"),
        ({"model_type": "bart"}, "'bart' is an encoder with a decoder", "give a decoder"),
        ({"model_type": "clip_text_model"}, "'clip_text_model' is no decoder", "give a decoder"),
        ({"model_type": "gemma3", "vocab_size": None}, "'gemma3' is no decoder", "give a decoder"),
        ({"model_type": "nobody"}, "knows no model_type 'nobody'", "install a newer"),
        ({"sliding_window": 3}, "3 tokens (sliding_window), an image takes 4", "--base_value_model with fewer"),
    ],
)
def test_a_configuration(refused, config, reason, remedy):
    run, plan = refused(**config)
    assert run == plan
    assert reason in run
    assert remedy in run


@pytest.mark.parametrize(
    ("template", "eos_token", "reason"),
    [("", "</s>", "no chat template"), (NO_END, None, "no token of their own"), (REWRITES, "</s>", "does not write")],
    ids=["none", "no end", "rewrites"],
)
def test_a_tokenizer(refused, template, eos_token, reason):
    run, plan = refused(template, eos_token)
    assert run == plan
    assert reason in run
    assert "take an -Instruct or -Chat model" in run


@pytest.mark.parametrize("damage", ["cut", "cut pickle", "empty pickle", "other shapes"])
def test_damaged_weights(inputs, tmp_path, capsys, damage):
    folder = tmp_path / "base"
    shutil.copytree(inputs / "mistral", folder)
    weights = folder / "model.safetensors"
    if damage == "other shapes":
        edit(folder, "config.json", intermediate_size=96)
    elif "pickle" in damage:
        torch.save(load_file(weights), folder / "pytorch_model.bin")
        weights.unlink()
        weights = folder / "pytorch_model.bin"
    if damage != "other shapes":
        weights.write_bytes(weights.read_bytes()[: 2000 if "cut" in damage else 0])
    data = ["--image_map", inputs / "data/image_map.json", "--captions_file", inputs / "data/captions.json"]
    flags = ["--base_language_model", folder, "--base_value_model", inputs / "clip", *data, "--use_cpu", "true"]
    assert train.main([str(word) for word in (*flags, "--output_dir", tmp_path / "run")]) == 2
    assert str(folder) in one_line_error(capsys.readouterr().err, "train.py")


def test_blocks_without_linear_layers(inputs, tmp_path, capsys):
    folder = make_family(tmp_path / "gpt2", "mistral", config_class=GPT2Config, n_embd=32, n_layer=2, n_head=2)
    data = ["--image_map", inputs / "data/image_map.json", "--captions_file", inputs / "data/captions.json"]
    flags = ["--base_language_model", folder, "--base_value_model", inputs / "clip", *data, "--use_cpu", "true"]
    for more in ([], ["--target_modules", "c_attn"]):
        assert train.main([str(word) for word in (*flags, "--output_dir", tmp_path / "run", *more)]) == 2
        said = one_line_error(capsys.readouterr().err, "train.py")
        assert "GPT2LMHeadModel have no layers of type nn.Linear" in said


@pytest.mark.parametrize(
    ("window", "kinds", "fits"),
    [
        (None, None, True),
        (4, None, True),
        (3, None, False),
        (3, ["full_attention"], True),
        (3, ["full_attention", "sliding_attention"], False),
    ],
)
def test_a_window_counts_where_a_layer_has_it(window, kinds, fits):
    config = QWenConfig()
    config.sliding_window, config.layer_types = window, kinds
    if fits:
        check_window("name", config, 4)
    else:
        with pytest.raises(ValueError, match=r"'name'.* 3 tokens.* 4;"):
            check_window("name", config, 4)


def test_a_block_that_the_dry_run_does_not_know(inputs, tmp_path, capsys):
    """Only the estimate: the run itself would work."""
    folder = tmp_path / "base"
    shutil.copytree(inputs / "mistral", folder)
    edit(folder, "config.json", model_type="olmo2", pad_token_id=0)
    data = ["--image_map", inputs / "data/image_map.json", "--captions_file", inputs / "data/captions.json"]
    flags = ["--base_language_model", folder, "--base_value_model", inputs / "clip", *data, "--output_dir", tmp_path]
    assert train.main([*map(str, flags), "--dry_run"]) == 2
    said = one_line_error(capsys.readouterr().err, "train.py")
    assert "'olmo2'" in said
    assert "post_feedforward_layernorm" in said
