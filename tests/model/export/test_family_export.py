"""Language models other than QWen leave as themselves, and compute there what they compute here."""

from __future__ import annotations

import json
import re

import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_families import FAMILIES, make_family
from tiny_run import ROOT, load_test_py, one_line_error
from tiny_towers import make_clip_checkpoint, make_dinov2_checkpoint, make_siglip_checkpoint
from tiny_vlm import enliven_trained, trainable_parameters
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    LlavaForConditionalGeneration,
)

from dataset.prompt import encode_prompt
from model import LoraSettings, VisionLanguageModel
from model.checkpoints.base_models import load_tokenizer
from model.export.family_text import FamilyText

ask = load_test_py()
TARGETS = ("q_proj", "v_proj", "down_proj")
SIGLIP_TOLERANCE, CLIP_TOLERANCE = 1e-4, 1e-5


@pytest.fixture
def export(run_export):
    return run_export


def load_ours(checkpoint, dtype=torch.float32) -> VisionLanguageModel:
    model = VisionLanguageModel.from_pretrained(model_weights=checkpoint, dtype=dtype, device="cpu")
    model.merge_lora()
    model.projector.to(dtype)
    return model.float().eval()


def load_theirs(folder) -> LlavaForConditionalGeneration:
    model, info = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert type(model) is LlavaForConditionalGeneration
    assert not info["missing_keys"]
    assert all("post_layernorm" in name for name in info["unexpected_keys"])
    return model.eval()


@torch.no_grad()
def difference(checkpoint, folder, dtype=torch.float32) -> float:
    """The largest difference of logits over two turns with two pictures; greedy tokens are compared as well."""
    ours, theirs = load_ours(checkpoint, dtype), load_theirs(folder)
    tokenizer = load_tokenizer(ours.base_language_model)
    history = [("左边<|extra_0|>和右边<|extra_0|>有什么不同？", "One is red.")]
    ids = torch.tensor([encode_prompt(tokenizer, "Which?", ours.num_image_tokens, history, None)[0]])
    generator = torch.Generator().manual_seed(5)
    pixels = torch.randn(2, 3, 28, 28, generator=generator)
    given = ids.masked_fill(ids == tokenizer.image_token_id, theirs.config.image_token_id)
    expected = ours(ids, pixel_values=pixels).logits
    assert (expected - ours(ids, pixel_values=pixels.flip(0)).logits).abs().max() > 0.02  # pictures matter
    how = {"pixel_values": pixels, "do_sample": False, "max_new_tokens": 12, "eos_token_id": list(tokenizer.stop_ids)}
    greedy = (
        model.generate(i, attention_mask=torch.ones_like(i), **how) for model, i in ((ours, ids), (theirs, given))
    )
    answers = [row[0, ids.shape[1] :].tolist() for row in greedy]
    assert answers[0] == answers[1]
    found = theirs(input_ids=given, pixel_values=pixels).logits
    return float((expected - found[..., : expected.shape[-1]]).abs().max())


# ---- LLaVA


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("make_tower", "vocab_size", "tolerance"),
    [(make_clip_checkpoint, 300, CLIP_TOLERANCE), (make_siglip_checkpoint, 320, SIGLIP_TOLERANCE)],
    ids=["clip, no row to spare", "siglip, rows to spare"],
)
def test_every_family_computes_the_same(export, make_family_checkpoint, family, make_tower, vocab_size, tolerance):
    checkpoint = make_family_checkpoint(family, make_tower, vocab_size=vocab_size)
    folder = export(checkpoint)
    assert difference(checkpoint, folder) <= tolerance
    config = json.loads((folder / "config.json").read_text())
    text, base = (config["text_config"], json.loads((checkpoint.parent / "language/config.json").read_text()))
    assert (text["model_type"], text["architectures"]) == (family, base["architectures"])
    assert text["max_position_embeddings"] == base["max_position_embeddings"]
    assert (config["image_token_index"], text["vocab_size"]) == (300, max(vocab_size, 301))
    tokenizer = load_tokenizer(str(checkpoint.parent / "language"))
    settings = json.loads((folder / "generation_config.json").read_text())
    assert set(settings["eos_token_id"]) == set(tokenizer.stop_ids)
    assert (settings["max_new_tokens"], settings["suppress_tokens"]) == (8, [300])
    names = load_file(folder / "model.safetensors")
    assert {"language_model.model.layers.1.self_attn.k_proj.weight", "language_model.lm_head.weight"} <= names.keys()


SCALED = {"rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
KINDS = {
    "smollm3": {"no_rope_layers": [1, 0]},
    "gemma3_text": {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    **{kind: {} for kind in ("gemma", "olmo2", "glm4", "starcoder2", "phi3")},
    "llama": {"rope_parameters": {"rope_type": "yarn", **SCALED}},
    "llama 3": {"rope_parameters": {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **SCALED}},
    "mistral": {"sliding_window": 24},
}


@pytest.mark.parametrize(
    "kind", [kind if kind == "smollm3" else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def test_further_kinds_keep_what_is_theirs(export, make_family_checkpoint, kind):
    """Layers without positions, scaled embeddings, learned positions, q, k and v in one matrix, scaled rotation."""
    config_class = CONFIG_MAPPING[kind.split()[0]]
    checkpoint = make_family_checkpoint(
        "qwen2", targets=None, config_class=config_class, vocab_size=300, tie_word_embeddings=True, **KINDS[kind]
    )
    folder = export(checkpoint, verify=True)
    assert difference(checkpoint, folder) <= CLIP_TOLERANCE
    export(checkpoint, "--format", "merged", verify=True, name="merged")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("phi", {}, "matrix of its head"),
        ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}, "renames"),
        ("gpt_neox", {}, "renames"),
    ],
)
def test_further_kinds_that_are_refused(export, make_family_checkpoint, capfd, kind, changes, reason):
    checkpoint = make_family_checkpoint("qwen2", targets=None, config_class=CONFIG_MAPPING[kind], **changes)
    folder = export(checkpoint, status=2)
    assert reason in one_line_error(capfd.readouterr().err, "export.py")
    assert not folder.exists()


def test_an_export_is_verified_and_answers_as_test_py(export, make_family_checkpoint, tmp_path, capsys):
    """Through plain transformers: pictures of another size, Chinese, no picture; the stored settings end answers."""
    checkpoint = make_family_checkpoint("qwen3", tie_word_embeddings=True)
    folder = export(checkpoint, verify=True)
    report = (folder / "EXPORT.md").read_text(encoding="utf-8")
    assert len(re.findall(r"(\d+) of \1 ", report)) == 6
    strip = tmp_path / "strip.png"
    Image.linear_gradient("L").convert("RGB").resize((301, 40)).save(strip)
    model, processor = load_theirs(folder), AutoProcessor.from_pretrained(folder, backend="pil")
    for question, path in (("这幅图像描述了什么？", strip), ("你好", None)):
        flags = [] if path is None else ["--image_path", str(path)]
        capsys.readouterr()
        assert ask.main(["--model_weights", str(checkpoint), "--prompt", question, "--greedy", *flags]) == 0
        expected = capsys.readouterr().out.removesuffix("\n")
        image = [] if path is None else [{"type": "image", "image": Image.open(path)}]
        messages = [{"role": "user", "content": [*image, {"type": "text", "text": question}]}]
        inputs = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        ids = model.generate(**inputs, do_sample=False)
        assert processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True) == expected


@pytest.mark.parametrize("make_tower", [make_clip_checkpoint, make_siglip_checkpoint], ids=["clip", "siglip"])
def test_bf16_holds_the_weights_that_test_py_computes_with(export, make_family_checkpoint, make_tower):
    checkpoint = make_family_checkpoint("llama", make_tower, dtype=torch.bfloat16, vocab_size=300)
    folder = export(checkpoint)
    assert {value.dtype for value in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((folder / "config.json").read_text())["text_config"]["dtype"] == "bfloat16"
    assert difference(checkpoint, folder, torch.bfloat16) <= SIGLIP_TOLERANCE


@pytest.mark.parametrize("vocab_size", [300, 320])
@pytest.mark.parametrize("targets", [TARGETS, ("q_proj", "lm_head")], ids=["lora elsewhere", "lora on the head"])
def test_a_tied_head_stays_tied_unless_lora_is_on_it(export, make_family_checkpoint, targets, vocab_size):
    checkpoint = make_family_checkpoint("qwen2", targets=targets, tie_word_embeddings=True, vocab_size=vocab_size)
    folder = export(checkpoint, verify=True)
    assert difference(checkpoint, folder) <= CLIP_TOLERANCE
    weights, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    is_tied = "lm_head" not in targets
    assert config["tie_word_embeddings"] is config["text_config"]["tie_word_embeddings"] is is_tied
    assert ("language_model.lm_head.weight" in weights) is not is_tied
    model = load_theirs(folder)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) is is_tied
    merged = export(checkpoint, "--format", "merged", verify=True, name="merged")
    assert ("lm_head.weight" in load_file(merged / "model.safetensors")) is not is_tied


def test_files_with_a_head_of_their_own_are_believed(export, make_family_checkpoint, tmp_path):
    """The configuration says that it is tied, and the file has another head: transformers takes the file's."""
    language = tmp_path / "language"
    make_family(language, "qwen2", tie_word_embeddings=False)
    config = json.loads((language / "config.json").read_text())
    (language / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    model = VisionLanguageModel.from_pretrained(str(language), make_clip_checkpoint(tmp_path / "clip"), device="cpu")
    model.add_lora(LoraSettings(rank=4, alpha=8, dropout=0.0, target_modules=TARGETS))
    enliven_trained(model, seed=3, std=0.4).save_checkpoint(tmp_path / "trained")
    folder = export(tmp_path / "trained", verify=True)
    assert difference(tmp_path / "trained", folder) <= CLIP_TOLERANCE
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False


def test_shards_and_bases_in_bin_files(export, make_family_checkpoint):
    checkpoint = make_family_checkpoint("mistral")
    whole = load_file(export(checkpoint, name="whole") / "model.safetensors")
    folder = export(checkpoint, "--max_shard_size", "60KB", name="parts")
    files = sorted(folder.glob("model-*.safetensors"))
    assert len(files) > 2
    found = {name: value for file in files for name, value in load_file(file).items()}
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], value) for name, value in whole.items())
    language = checkpoint.parent / "language"
    torch.save(load_file(language / "model.safetensors"), language / "pytorch_model.bin")
    (language / "model.safetensors").unlink()
    again = load_file(export(checkpoint, name="again") / "model.safetensors")
    assert all(torch.equal(again[name], value) for name, value in whole.items())


# ---- Merged, and PEFT's


@pytest.mark.parametrize("family", ["qwen3", "mistral"])
def test_merged_is_a_base_model_like_any_other(export, make_family_checkpoint, family):
    checkpoint = make_family_checkpoint(family, make_dinov2_checkpoint)
    folder = export(checkpoint, "--format", "merged", "--max_shard_size", "60KB", verify=True)
    ours = load_ours(checkpoint)
    ids = torch.arange(40, 60)[None]
    stranger = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = ours(ids).logits
        assert torch.allclose(stranger(input_ids=ids).logits, expected, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(checkpoint.parent / "language").chat_template
    # It is trained on, with the projector beside it.
    again = VisionLanguageModel.from_pretrained(str(folder), str(checkpoint.parent / "tower"), device="cpu")
    again.add_lora(LoraSettings(rank=2, alpha=4, dropout=0.0, target_modules=TARGETS))
    with torch.no_grad():
        assert torch.allclose(again.eval()(ids).logits, expected, atol=1e-5)
    # The loader of docs/serving.md, word by word.
    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    code = text.split("```python\nimport json", 1)[1].split("```")[0]
    names = {}
    exec("import json" + code.replace("exports/merged", str(folder)), names)
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(5))
    seen = torch.tensor([[7, *[320] * 4, 9, 12]])
    with torch.no_grad():
        expected = ours(seen, pixel_values=pixels).logits
        assert torch.allclose(names["model"](seen, pixel_values=pixels).logits, expected, atol=1e-5)


def test_peft_loads_its_own_format(export, make_family_checkpoint):
    checkpoint = make_family_checkpoint("llama", make_dinov2_checkpoint)
    folder = export(checkpoint, "--format", "peft", verify=True)
    base = AutoModelForCausalLM.from_pretrained(checkpoint.parent / "language", dtype=torch.float32)
    ids = torch.arange(40, 60)[None]
    with torch.no_grad():
        stranger = PeftModel.from_pretrained(base, folder).eval()
        assert torch.allclose(stranger(input_ids=ids).logits, load_ours(checkpoint)(ids).logits, atol=1e-5)


# ---- Without LoRA


@pytest.mark.parametrize("kind", ["projector", "all"])
def test_checkpoints_of_train_only(export, tmp_path, capfd, kind):
    base, tower = make_family(tmp_path / "language", "qwen3", tie_word_embeddings=True), tmp_path / "tower"
    make_clip_checkpoint(tower)
    model = VisionLanguageModel.from_pretrained(base, str(tower), device="cpu", trainable=True, train_only=kind)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in trainable_parameters(model).values():
            value.add_(torch.randn(value.shape, generator=generator), alpha=0.1)
    model.save_checkpoint(tmp_path / "trained")
    folder = export(tmp_path / "trained", verify=True, name="llava")
    assert difference(tmp_path / "trained", folder) <= CLIP_TOLERANCE
    weights = load_file(folder / "model.safetensors")
    assert "language_model.lm_head.weight" not in weights
    published = load_file(tmp_path / "language" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    is_published = torch.equal(weights["language_model.model.layers.0.mlp.up_proj.weight"], published)
    assert is_published is (kind == "projector")
    merged = export(tmp_path / "trained", "--format", "merged", verify=True, name="merged")
    assert AutoTokenizer.from_pretrained(merged).chat_template
    export(tmp_path / "trained", "--format", "peft", status=2, name="peft")
    assert f"--train_only {kind}" in one_line_error(capfd.readouterr().err, "export.py")


@pytest.mark.parametrize(("kind", "dtype"), [("projector", "bfloat16"), ("all", "float32")])
def test_a_model_trained_as_a_whole_in_bf16_is_exported_in_fp32(export, tmp_path, kind, dtype):
    """Its weights in the checkpoint are fp32, whatever the frozen tower was in."""
    base, tower = make_family(tmp_path / "small-llama", "llama"), make_clip_checkpoint(tmp_path / "tower")
    (tmp_path / "small-llama" / "LICENSE.txt").write_text("free", encoding="utf-8")
    model = VisionLanguageModel.from_pretrained(
        base, tower, dtype=torch.bfloat16, device="cpu", trainable=True, train_only=kind
    )
    model.save_checkpoint(tmp_path / "trained")
    folder = export(tmp_path / "trained", "--format", "merged")
    assert json.loads((folder / "config.json").read_text())["dtype"] == dtype
    assert {str(value.dtype) for value in load_file(folder / "model.safetensors").values()} == {f"torch.{dtype}"}
    assert (folder / "LICENSE.txt").read_text(encoding="utf-8") == "free"
    assert "\nsmall-llama " in (folder / "EXPORT.md").read_text(encoding="utf-8")
    smaller = export(tmp_path / "trained", "--format", "merged", "--dtype", "bfloat16", name="smaller")
    assert json.loads((smaller / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(("kind", "beginning"), [("merged", ""), ("peft", "LoRA of ")])
def test_the_report_names_the_checkpoint_that_lora_was_trained_on(export, tmp_path, kind, beginning):
    base, tower = make_family(tmp_path / "language", "llama"), make_clip_checkpoint(tmp_path / "tower")
    whole = VisionLanguageModel.from_pretrained(base, tower, device="cpu", trainable=True, train_only="all")
    whole.save_checkpoint(tmp_path / "stage1")
    model = VisionLanguageModel.from_pretrained(str(tmp_path / "stage1" / "language_model"), tower, device="cpu")
    model.add_lora(LoraSettings(rank=4, alpha=8, dropout=0.0, target_modules=TARGETS))
    enliven_trained(model, seed=3, std=0.4).save_checkpoint(tmp_path / "stage2")
    folder = export(tmp_path / "stage2", "--format", kind)
    report = (folder / "EXPORT.md").read_text(encoding="utf-8")
    assert f"\n{beginning}stage1/language_model" in report
    assert str(tmp_path) not in report


# ---- What cannot be expressed


def test_a_tower_that_engines_do_not_read_is_refused(export, make_family_checkpoint, capfd):
    export(make_family_checkpoint("llama", make_dinov2_checkpoint), status=2)
    message = one_line_error(capfd.readouterr().err, "export.py")
    assert "the tower is dinov2" in message
    assert "--format merged can" in message


@pytest.mark.parametrize(("name", "changed"), [("_decoder_names", set()), ("_differs", True)])
def test_what_llava_would_compute_otherwise_is_refused(
    export, make_family_checkpoint, monkeypatch, capfd, name, changed
):
    """No family here has a head with a bias, or a tokenizer that reads a text after a picture otherwise."""
    monkeypatch.setattr(FamilyText, name, lambda self, *args: changed)
    export(make_family_checkpoint("llama"), status=2)
    message = one_line_error(capfd.readouterr().err, "export.py")
    assert {"_decoder_names": "matrix of its head", "_differs": "after a picture"}[name] in message


def test_weights_that_are_missing_are_named(export, make_family_checkpoint, capfd):
    checkpoint = make_family_checkpoint("qwen2")
    note = json.loads((checkpoint / "multimodal_config.json").read_text())
    (checkpoint / "checksums.json").unlink()
    (checkpoint / "multimodal_config.json").write_text(json.dumps({**note, "language_model_fingerprint": ""}))
    file = checkpoint.parent / "language" / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    folder = export(checkpoint, status=2)
    assert "model.layers.1.mlp.up_proj.weight" in one_line_error(capfd.readouterr().err, "export.py")
    assert not folder.exists()


def test_the_report_names_no_path_of_this_machine(export, make_family_checkpoint):
    checkpoint = make_family_checkpoint("mistral")
    folder = export(checkpoint)
    for path in folder.iterdir():
        if path.suffix in (".md", ".json", ".jinja"):
            assert str(checkpoint.parent) not in path.read_text(encoding="utf-8"), path
