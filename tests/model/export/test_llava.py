"""A LLaVA folder computes what the trained model computes, by code of transformers alone."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_run import load_test_py, one_line_error, write_as_the_original
from tiny_towers import (
    make_clip_checkpoint,
    make_dinov2_checkpoint,
    make_siglip_checkpoint,
    make_vit_checkpoint,
    rename_weights,
)
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

from dataset.prompt import encode_prompt
from model import VisionLanguageModel
from model.export.llava import BLOCK_SCALE

ask = load_test_py()


def load_ours(checkpoint, *bases, dtype=torch.float32) -> VisionLanguageModel:
    model = VisionLanguageModel.from_pretrained(*bases, model_weights=checkpoint, dtype=dtype, device="cpu")
    model.merge_lora()
    return model.eval()


def load_theirs(folder, **kwargs) -> LlavaForConditionalGeneration:
    model, info = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, **kwargs
    )
    assert type(model) is LlavaForConditionalGeneration
    assert not info["missing_keys"]
    assert all("post_layernorm" in name for name in info["unexpected_keys"])
    return model.eval()


@torch.no_grad()
def difference(checkpoint, folder, tokenizer, *bases, dtype=torch.float32) -> float:
    """The largest difference of logits over a prompt with two pictures; ours with the weights as exported."""
    ours, theirs = load_ours(checkpoint, *bases, dtype=dtype), load_theirs(folder)
    ours.projector.to(dtype)
    ours.float()
    text = "左边<|extra_0|>和右边<|extra_0|>有什么不同？"
    ids = torch.tensor([encode_prompt(tokenizer, text, ours.num_image_tokens)[0]])
    generator = torch.Generator().manual_seed(5)
    size = ours.vision_tower.image_size
    pixels = torch.randn(2, 3, size, size, generator=generator)
    expected = ours(ids, pixel_values=pixels).logits
    blind = ours(ids, pixel_values=pixels.flip(0)).logits
    assert (expected - blind).abs().max() > 0.05  # pictures matter
    return float((expected - theirs(input_ids=ids, pixel_values=pixels).logits).abs().max())


def test_an_exported_model_is_verified_and_answers_as_test_py(export, trained, pictures, tmp_path, capsys):
    folder = export(trained, "--dtype", "float32", verify=True)
    report = (folder / "EXPORT.md").read_text(encoding="utf-8")
    assert report.count("12 of 12") == 6
    assert not list(tmp_path.glob("out.unfinished-export"))
    assert not list(tmp_path.glob(".out*"))

    # Pictures of other sizes, Chinese, a prompt without a picture: the same text as test.py's, by transformers alone.
    strip, small = tmp_path / "strip.png", tmp_path / "small.png"
    Image.linear_gradient("L").convert("RGB").resize((301, 40)).save(strip)
    Image.new("RGB", (9, 14), (90, 200, 10)).save(small)
    model, processor = load_theirs(folder), AutoProcessor.from_pretrained(folder, backend="pil")
    for question, path in (("这幅图像描述了什么？", strip), ("Colour?", small), ("你好", None)):
        flags = [] if path is None else ["--image_path", str(path)]
        capsys.readouterr()
        assert ask.main(["--model_weights", str(trained), "--prompt", question, "--greedy", *flags]) == 0
        expected = capsys.readouterr().out.removesuffix("\n")
        image = [] if path is None else [{"type": "image", "image": Image.open(path).convert("RGB")}]
        messages = [{"role": "user", "content": [*image, {"type": "text", "text": question}]}]
        inputs = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        ids = model.generate(**inputs, do_sample=False)  # its length and stop tokens are the exported settings'
        text = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert text == expected


@pytest.mark.parametrize(
    ("vision", "language"),
    [
        ({}, {}),
        (
            {"hidden_size": 48, "num_hidden_layers": 3, "image_size": 42, "intermediate_size": 80},
            {"num_hidden_layers": 3, "num_attention_heads": 3, "kv_channels": 8, "hidden_size": 20},
        ),
        ({"num_hidden_layers": 1}, {"num_hidden_layers": 1, "kv_channels": 32, "rotary_emb_base": 50000.0}),
        ({}, {"seq_length": 16, "use_dynamic_ntk": False, "use_logn_attn": False}),
    ],
    ids=["plain", "wider", "one layer", "no stretching"],
)
def test_clip_is_exact(export, make_checkpoint, tokenizer, vision, language):
    checkpoint = make_checkpoint(make_clip_checkpoint, vision, **language)
    assert difference(checkpoint, export(checkpoint), tokenizer) <= 1e-5


@pytest.mark.parametrize(
    "vision",
    [{}, {"num_hidden_layers": 3, "intermediate_size": 97, "hidden_size": 48}, {"hidden_act": "gelu"}],
    ids=["plain", "inner width to spare", "exact gelu"],
)
def test_siglip_goes_through_its_last_norm(export, make_checkpoint, tokenizer, vision):
    checkpoint = make_checkpoint(make_siglip_checkpoint, vision)
    folder = export(checkpoint)
    assert difference(checkpoint, folder, tokenizer) <= 1e-4
    config = json.loads((folder / "config.json").read_text())
    layers = vision.get("num_hidden_layers", 2)
    assert config["vision_config"]["num_hidden_layers"] == layers + 1
    assert (config["vision_feature_select_strategy"], config["image_seq_length"]) == ("full", 4)


def test_a_folder_of_the_original_project_leaves_siglips_first_patch_out(export, make_checkpoint, tokenizer, tmp_path):
    checkpoint = make_checkpoint(make_siglip_checkpoint)
    bases = str(checkpoint.parent / "qwen"), str(checkpoint.parent / "tower")
    original = write_as_the_original(checkpoint, tmp_path / "original")
    folder = export(original, "--base_language_model", bases[0], "--base_value_model", bases[1])
    assert difference(original, folder, tokenizer, *bases) <= 1e-4
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    prompt = "a<|extra_0|>b"
    ids = processor(text=prompt, images=Image.new("RGB", (50, 20)), return_tensors="pt")["input_ids"][0].tolist()
    assert ids.count(151646) == 3  # of 4 patches


def test_a_batch_of_rows_with_and_without_pictures(export, trained, pictures):
    folder = export(trained, "--dtype", "float32")
    model, processor = load_theirs(folder), AutoProcessor.from_pretrained(folder, backend="pil")
    processor.tokenizer.padding_side = "left"
    texts = ["<|im_start|>user\n<|extra_0|>什么颜色？", "hi", "<|extra_0|> and <|extra_0|>: which is darker, and why?"]
    images = [Image.open(pictures[name]) for name in ("red", "black", "white")]
    together = processor(text=texts, images=images, padding=True, return_tensors="pt")
    answers = model.generate(**together, do_sample=False, max_new_tokens=6)[:, together["input_ids"].shape[1] :]
    ours = load_ours(trained)
    for row, (text, own) in enumerate(zip(texts, ([0], [], [1, 2]), strict=True)):
        alone = processor(text=[text], images=[images[i] for i in own] or None, return_tensors="pt")
        pixels = torch.stack([ours.vision_tower.image_transform(images[i]) for i in own]) if own else None
        ids = alone["input_ids"]
        stops = [151643, 151644, 151645]
        expected = ours.generate(
            ids, torch.ones_like(ids), pixels, do_sample=False, max_new_tokens=6, eos_token_id=stops
        )[0, ids.shape[1] :].tolist()
        got = answers[row].tolist()[: len(expected)]
        assert got == expected


@pytest.mark.parametrize("make_tower", [make_clip_checkpoint, make_siglip_checkpoint], ids=["clip", "siglip"])
def test_bf16_holds_the_weights_that_test_py_computes_with(export, make_checkpoint, tokenizer, make_tower):
    checkpoint = make_checkpoint(make_tower, dtype=torch.bfloat16)
    folder = export(checkpoint)  # the dtype it was trained in
    weights = load_file(folder / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert difference(checkpoint, folder, tokenizer, dtype=torch.bfloat16) <= 1e-4
    wide = load_file(export(checkpoint, "--dtype", "float32", name="wide") / "model.safetensors")
    assert {value.dtype for value in wide.values()} == {torch.float32}


def test_shards_hold_the_same_tensors(export, trained):
    whole = load_file(export(trained, "--dtype", "float32", name="whole") / "model.safetensors")
    limit = 120_000
    folder = export(trained, "--dtype", "float32", "--max_shard_size", "120KB", name="parts")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(folder.glob("model-*.safetensors"))
    assert len(files) > 2
    assert files[-1].name == f"model-{len(files):05d}-of-{len(files):05d}.safetensors"
    found = {}
    for file in files:
        part = load_file(file)
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
        assert len(part) == 1 or sum(value.nbytes for value in part.values()) <= limit
        assert {name for name, where in index["weight_map"].items() if where == file.name} == part.keys()
        found |= part
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in whole.values())
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], value) for name, value in whole.items())


def test_bases_in_bin_shards_and_under_old_names(export, make_checkpoint):
    """Published files: a QWen in .bin shards with rotary tables in them, a tower named from `vision_model.`."""
    checkpoint = make_checkpoint(make_clip_checkpoint)
    expected = load_file(export(checkpoint, name="first") / "model.safetensors")
    qwen, tower = checkpoint.parent / "qwen", checkpoint.parent / "tower"
    weights = load_file(qwen / "model.safetensors")
    weights["transformer.h.0.attn.rotary_emb.inv_freq"] = torch.ones(4)
    names = sorted(weights)
    parts = {f"pytorch_model-{i}.bin": names[i::2] for i in range(2)}
    for file, own in parts.items():
        torch.save({name: weights[name] for name in own}, qwen / file)
    index = {"weight_map": {name: file for file, own in parts.items() for name in own}}
    (qwen / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (qwen / "model.safetensors").unlink()
    flip = "vision_model."
    rename_weights(tower, lambda name: name.removeprefix(flip) if name.startswith(flip) else None)
    found = load_file(export(checkpoint, name="second") / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_tied_head_with_lora_is_written_out(export, make_checkpoint, tokenizer):
    targets = ("c_attn", "lm_head")
    checkpoint = make_checkpoint(make_clip_checkpoint, targets=targets, tie_word_embeddings=True)
    folder = export(checkpoint)
    assert difference(checkpoint, folder, tokenizer) <= 1e-5
    weights = load_file(folder / "model.safetensors")
    assert not torch.equal(
        weights["language_model.lm_head.weight"], weights["language_model.model.embed_tokens.weight"]
    )


# ---- What cannot be expressed


@pytest.mark.parametrize(
    ("make_tower", "vision", "changes", "flags", "reason"),
    [
        (make_clip_checkpoint, {}, {"no_bias": False}, (), "no_bias"),
        (make_clip_checkpoint, {}, {"scale_attn_weights": False}, (), "scale_attn_weights"),
        (make_clip_checkpoint, {}, {"rotary_pct": 0.5}, (), "rotary_pct is 0.5"),
        (make_clip_checkpoint, {}, {"seq_length": 67}, (), "68 tokens or more and seq_length is 67"),
        (make_dinov2_checkpoint, {}, {}, (), "the tower is dinov2"),
        (make_vit_checkpoint, {}, {}, (), "the tower is vit"),
        (make_siglip_checkpoint, {}, {}, ("--dtype", "float16"), "float16"),
        (make_siglip_checkpoint, {"intermediate_size": 63}, {}, (), "intermediate_size is 63"),
        (make_siglip_checkpoint, {"hidden_act": "tanh"}, {}, (), "hidden_act is 'tanh'"),
    ],
    ids=lambda value: getattr(value, "__name__", None) or (value if isinstance(value, str) else ""),
)
def test_what_llava_cannot_express_is_refused(
    export, make_checkpoint, capfd, make_tower, vision, changes, flags, reason
):
    checkpoint = make_checkpoint(make_tower, vision, **changes)
    folder = export(checkpoint, *flags, status=2)
    message = one_line_error(capfd.readouterr().err, "export.py")
    assert reason in message
    assert "--format merged" in message
    assert not folder.exists()
    assert not folder.with_name("out.unfinished-export").exists()


def test_a_projector_of_one_layer_is_refused(export, make_checkpoint, capfd, tmp_path):
    two = make_checkpoint(make_clip_checkpoint)
    original = write_as_the_original(two, tmp_path / "original")
    layers = torch.load(original / "other_params.bin", weights_only=True)
    torch.save({name: value for name, value in layers.items() if name.startswith("0.")}, original / "other_params.bin")
    bases = ("--base_language_model", two.parent / "qwen", "--base_value_model", two.parent / "tower")
    export(original, *bases, status=2)
    assert "one layer" in one_line_error(capfd.readouterr().err, "export.py")


def test_incomplete_bases_are_refused(export, make_checkpoint, capfd):
    checkpoint = make_checkpoint(make_clip_checkpoint)
    shutil.copytree(checkpoint.parent, checkpoint.parent.with_name("broken-lm"))
    lm, tower = (checkpoint.parent.with_name("broken-lm") / name for name in ("qwen", "tower"))
    original = write_as_the_original(checkpoint, checkpoint.parent / "original")  # nothing is fingerprinted
    bases = ("--base_language_model", lm, "--base_value_model", tower)
    rename_weights(lm, lambda name: None if name == "transformer.h.1.mlp.w2.weight" else name)
    folder = export(original, *bases, status=2)
    assert "transformer.h.1.mlp.w2.weight" in one_line_error(capfd.readouterr().err, "export.py")
    (tower / "preprocessor_config.json").unlink()
    export(original, *bases, status=2)
    assert "preprocessor_config.json" in one_line_error(capfd.readouterr().err, "export.py")
    assert not folder.exists()
    assert not folder.with_name("out.unfinished-export").exists()


def test_the_block_scale_rounds_nothing():
    assert torch.tensor(BLOCK_SCALE).log2() == 40
    assert torch.tensor(BLOCK_SCALE, dtype=torch.bfloat16).float() == BLOCK_SCALE
