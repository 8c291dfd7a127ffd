"""export.py as people call it: flags, the folder it writes, its verification, and the formats other than LLaVA."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_run import ROOT, one_line_error, start, write_as_the_original
from tiny_towers import make_clip_checkpoint, make_dinov2_checkpoint, make_siglip_checkpoint, pixels
from tiny_vlm import logits_of, sample, trainable_parameters

from dataprocess.file_lock import hold
from dataset import VLMCollator
from model import VisionLanguageModel
from model.export import llava, own_layout, processor_files, qwen_text
from qwen import QWenLMHeadModel


def leftovers(output: Path) -> list[str]:
    return sorted(path.name for path in output.parent.iterdir() if "out" in path.name)


# ---- The folder


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--output", "x"], "--model_weights"),
        (["--model_weights", "x"], "--output"),
        (["--model_weights", "x", "--output", "y", "--format", "onnx"], "onnx"),
        (["--model_weights", "x", "--output", "y", "--dtype", "int8"], "int8"),
        (["--model_weights", "x", "--output", "y", "--max_shard_size", "5"], "5GB"),
        (["--model_weights", "x", "--output", "y", "--max_shard_size", "0GB"], "above 0"),
        (["--model_weights", "x", "--output", "y", "--max_shard_size", "1GB", "--format", "peft"], "no shards"),
        (["--model_weights", "x", "--output", "y", "--max_shard_size", "1GB", "--format", "gguf"], "no shards"),
        (["--model_weights", "x", "--output", "y", "--dtype", "float16", "--format", "peft"], "float32"),
        (["--model_weights", "no/such/folder", "--output", "y"], "no such folder"),
    ],
)
def test_flags_that_cannot_be(tmp_path, monkeypatch, capfd, flags, reason):
    import export as program

    monkeypatch.chdir(tmp_path)
    assert program.main(flags) == 2
    assert reason in one_line_error(capfd.readouterr().err, "export.py")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(export, trained, tmp_path, capfd):
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine").write_text("precious")
    export(trained, status=2)
    assert "has files already" in one_line_error(capfd.readouterr().err, "export.py")
    assert [path.name for path in output.iterdir()] == ["mine"]
    (output / "mine").rename(tmp_path / "elsewhere")
    (tmp_path / "link").symlink_to(output)
    export(trained, status=2, name="link")
    assert "link" in one_line_error(capfd.readouterr().err, "export.py")
    assert not any(output.iterdir())
    assert (export(trained) / "config.json").exists()  # an empty folder is taken


def test_what_is_stopped_has_no_name_and_the_next_export_clears_it(export, trained, monkeypatch, tmp_path):
    def stopped(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(qwen_text, "language_weights", stopped)
        output = export(trained, status=130)
    assert leftovers(output) == []
    part = tmp_path / "out.unfinished-export"  # as a process that was killed leaves it
    part.mkdir()
    (part / "model-00007-of-00009.safetensors").write_bytes(b"half")
    export(trained)
    assert leftovers(output) == ["out"]
    assert sorted(path.name for path in output.glob("*.safetensors")) == ["model.safetensors"]


def test_two_exports_to_one_place(export, trained, tmp_path, capfd):
    with hold(tmp_path / "out.export"):
        export(trained, status=2)
    assert "is writing to it" in one_line_error(capfd.readouterr().err, "export.py")


def test_a_full_disk_leaves_nothing(export, trained, monkeypatch, capfd):
    def full(self, name, tensor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("model.export.shards.ShardWriter._add", full)
    output = export(trained, status=2)
    assert "No space left" in one_line_error(capfd.readouterr().err, "export.py")
    assert leftovers(output) == []


KILLED = """
import os, signal, sys
from model.export import qwen_text
qwen_text.language_weights = lambda sources: os.kill(os.getpid(), signal.SIGKILL)
import export
export.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_killed_process_leaves_nothing_under_the_name(export, trained, tmp_path):
    output = tmp_path / "out"
    done = start("python", "-c", KILLED, "--model_weights", trained, "--output", output, "--no_verify")
    assert done.returncode == -9
    assert not output.exists()
    assert (tmp_path / "out.unfinished-export" / "tokenizer.json").exists()
    export(trained)  # the lock of a process that is gone is free
    assert leftovers(output) == ["out"]


@pytest.mark.slow
def test_as_a_process(trained, tmp_path):
    done = start("python", ROOT / "export.py", "--model_weights", trained, "--output", tmp_path / "new" / "out")
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert "12 of 12" in done.stderr
    assert leftovers(tmp_path / "new" / "out") == ["out"]


# ---- Verification


def swapped(names):
    return {**names, "mlp.w1": names["mlp.w2"], "mlp.w2": names["mlp.w1"]}


@pytest.mark.parametrize(
    ("where", "name", "wrong"),
    [
        (qwen_text, "_NAMES", swapped(qwen_text._NAMES)),
        (processor_files, "SYSTEM_PROMPT", "你是一位助手。"),
        (llava, "norm_block", lambda weight, bias, inner: right_block(weight, 0 * bias, inner)),
    ],
    ids=["gate and value swapped", "another system prompt", "a norm without its bias"],
)
def test_an_export_that_differs_is_an_error(export, make_checkpoint, monkeypatch, capfd, where, name, wrong):
    checkpoint = make_checkpoint(make_siglip_checkpoint)
    monkeypatch.setattr(where, name, wrong)
    output = export(checkpoint, status=1, verify=True)
    one_line_error(capfd.readouterr().err, "export.py")
    assert not output.exists()
    assert (output.with_name("out.unfinished-export") / "config.json").exists()  # to be looked at


right_block = llava.norm_block


def test_the_report_names_no_path_of_this_machine(export, trained):
    folder = export(trained)
    for path in folder.iterdir():
        if path.suffix in (".md", ".json", ".jinja"):
            assert str(trained.parent.parent.parent) not in path.read_text(encoding="utf-8"), path
    report = (folder / "EXPORT.md").read_text(encoding="utf-8")
    assert "--no_verify" in report
    for engine in ("vllm serve", "sglang", "transformers serve", "llama.cpp", "mlx_vlm"):
        assert engine in report


# ---- Merged, and PEFT's


@pytest.mark.parametrize("make_tower", [make_clip_checkpoint, make_dinov2_checkpoint], ids=["clip", "dinov2"])
def test_merged_is_a_qwen_with_a_projector(export, make_checkpoint, make_tower):
    checkpoint = make_checkpoint(make_tower)
    folder = export(checkpoint, "--format", "merged", "--max_shard_size", "150KB", verify=True)
    ours = VisionLanguageModel.from_pretrained(model_weights=checkpoint, device="cpu")
    batch = VLMCollator(151643)([sample(2), sample(0)])
    expected = logits_of(ours, batch)
    # The loader of docs/serving.md, word by word.
    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    code = text.split("```python\nimport json", 1)[1].split("```")[0]
    names = {}
    exec("import json" + code.replace("exports/merged", str(folder)), names)
    assert torch.allclose(logits_of(names["model"], batch), expected, atol=1e-5)
    # It is a base model like any other.
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("qwen", ["QWenLMHeadModel"])
    assert "_name_or_path" not in config
    again = QWenLMHeadModel.from_pretrained(folder)
    assert torch.equal(again.transformer.h[1].mlp.w1.weight, names["model"].qwen.transformer.h[1].mlp.w1.weight)


def test_merged_keeps_the_dropped_patch(export, make_checkpoint, tmp_path):
    checkpoint = make_checkpoint(make_siglip_checkpoint)
    original = write_as_the_original(checkpoint, tmp_path / "original")
    bases = ("--base_language_model", checkpoint.parent / "qwen", "--base_value_model", checkpoint.parent / "tower")
    folder = export(original, *bases, "--format", "merged", verify=True)
    config = json.loads((folder / "multimodal_config.json").read_text())
    assert (config["drop_first_patch"], config["num_image_tokens"], config["projector_layers"]) == (True, 3, 2)


def test_pixel_shuffle_is_refused_for_llava_and_kept_by_the_others(export, make_checkpoint, capfd):
    checkpoint = make_checkpoint(make_siglip_checkpoint, vision={"image_size": 84}, pixel_shuffle=3)
    export(checkpoint, status=2)
    message = one_line_error(capfd.readouterr().err, "export.py")
    assert "pixel_shuffle" in message
    assert message.endswith("--format merged can")
    folder = export(checkpoint, "--format", "merged", verify=True)
    config = json.loads((folder / "multimodal_config.json").read_text())
    assert (config["pixel_shuffle"], config["num_image_tokens"]) == (3, 4)
    code = (
        (ROOT / "docs" / "serving.md").read_text(encoding="utf-8").split("```python\nimport json", 1)[1].split("```")[0]
    )
    names = {}
    exec("import json" + code.replace("exports/merged", str(folder)), names)
    ours = VisionLanguageModel.from_pretrained(model_weights=checkpoint, device="cpu")
    batch = VLMCollator(151643)([{**sample(2), "pixel_values": pixels(2, 84)}])
    assert torch.allclose(logits_of(names["model"], batch), logits_of(ours, batch), atol=1e-5)
    export(checkpoint, "--format", "peft", verify=True, name="peft")


def test_peft_loads_its_own_format(export, make_checkpoint, tmp_path):
    checkpoint = make_checkpoint(make_clip_checkpoint)
    original = write_as_the_original(checkpoint, tmp_path / "original")
    base = checkpoint.parent / "qwen"
    bases = ("--base_language_model", base, "--base_value_model", checkpoint.parent / "tower")
    folder = export(original, *bases, "--format", "peft", verify=True)
    assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "EXPORT.md"}
    expected, found = (load_file(path / "adapter_model.safetensors") for path in (checkpoint, folder))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    ours = VisionLanguageModel.from_pretrained(model_weights=checkpoint, device="cpu")
    ids = torch.arange(40, 60)[None]
    with torch.no_grad():
        stranger = PeftModel.from_pretrained(QWenLMHeadModel.from_pretrained(base), folder).eval()
        assert torch.allclose(stranger(input_ids=ids).logits, ours(ids).logits, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["projector", "all"])
def test_checkpoints_of_train_only(export, make_checkpoint, tmp_path, capfd, kind):
    bases = [str(make_checkpoint(make_clip_checkpoint).parent / name) for name in ("qwen", "tower")]
    model = VisionLanguageModel.from_pretrained(*bases, device="cpu", trainable=True, train_only=kind)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in trainable_parameters(model).values():
            value.add_(torch.randn(value.shape, generator=generator), alpha=0.1)
    model.save_checkpoint(tmp_path / "trained")
    folder = export(tmp_path / "trained", verify=True, name="llava")
    weights = load_file(folder / "model.safetensors")
    published = load_file(Path(bases[0]) / "model.safetensors")["transformer.h.0.mlp.w1.weight"]
    found = weights["language_model.model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(found, published) is (kind == "projector")
    export(tmp_path / "trained", "--format", "merged", verify=True, name="merged")
    export(tmp_path / "trained", "--format", "peft", status=2, name="peft")
    assert f"--train_only {kind}" in one_line_error(capfd.readouterr().err, "export.py")


def test_verification_sees_a_wrong_scale(export, make_checkpoint, monkeypatch):
    checkpoint = make_checkpoint(make_clip_checkpoint)
    write = own_layout.write_peft

    def wrong(sources, folder):
        write(sources, folder)
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 9}))

    monkeypatch.setattr("export.write_peft", wrong)
    output = export(checkpoint, "--format", "peft", status=1, verify=True)
    assert not output.exists()
    shutil.rmtree(output.with_name("out.unfinished-export"))
