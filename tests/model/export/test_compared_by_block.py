"""`export.py --device_map auto`: the comparison of a model of which one block at a time is in memory."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_families import make_family
from tiny_run import one_line_error
from tiny_towers import make_clip_checkpoint
from tiny_vlm import enliven_trained
from transformers import LlamaConfig, Qwen2Config

from model.checkpoints.base_models import load_language_model
from model.export import qwen_text
from model.lora import LoraSettings, add_lora, merge_lora
from model.scaling.by_block import compute_by_block


@pytest.mark.parametrize("kind", [Qwen2Config, LlamaConfig])
def test_it_computes_what_the_whole_model_does(tmp_path, kind):
    """LoRA in the blocks and on a tied head; Qwen2's second block sees a window of the tokens alone."""
    changes = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1} if kind is Qwen2Config else {}
    folder = make_family(tmp_path / "language", "llama", config_class=kind, tie_word_embeddings=True, **changes)
    language = load_language_model(folder, torch.bfloat16)
    targets = ("q_proj", "down_proj", "lm_head")
    wrapped = add_lora(language, LoraSettings(rank=4, alpha=8, dropout=0.0, target_modules=targets))
    enliven_trained(wrapped, seed=3, std=0.4)
    ids = torch.randint(0, 100, (2, 7), generator=torch.Generator().manual_seed(0))
    whole = merge_lora(copy.deepcopy(wrapped)).float().eval()
    base = wrapped.get_base_model().eval()
    blocks = list(base.model.layers)
    compute_by_block(base)
    base.float()
    with torch.no_grad():
        expected, found = whole(ids).logits, base(ids).logits
        assert torch.equal(found, expected)
        assert torch.equal(base(ids).logits, expected)  # a block is as it was before it ran
    assert {p.dtype for block in blocks for name, p in block.named_parameters() if "lora" not in name} == {
        torch.bfloat16
    }
    assert not any(name.startswith("model.layers") for name, _ in base.named_parameters())


@pytest.mark.parametrize(
    "kind", ["llava", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("merged", "peft"))]
)
def test_an_export_is_compared_as_without(export, make_checkpoint, kind):
    checkpoint = make_checkpoint(make_clip_checkpoint, dtype=torch.bfloat16)
    reports = [
        (export(checkpoint, "--format", kind, *flags, verify=True, name=name) / "EXPORT.md").read_text(encoding="utf-8")
        for name, flags in (("whole", []), ("blocks", ["--device_map", "auto"]))
    ]
    assert "12 of 12" in reports[0]
    assert reports[1].replace("blocks", "whole") == reports[0]


@pytest.mark.slow
def test_an_export_that_differs_is_found(export, make_checkpoint, monkeypatch, capfd):
    checkpoint = make_checkpoint(make_clip_checkpoint)
    names = qwen_text._NAMES
    monkeypatch.setattr(qwen_text, "_NAMES", {**names, "mlp.w1": names["mlp.w2"], "mlp.w2": names["mlp.w1"]})
    output = export(checkpoint, "--device_map", "auto", status=1, verify=True)
    one_line_error(capfd.readouterr().err, "export.py")
    assert not output.exists()


def test_it_needs_a_comparison(export, trained, capfd):
    export(trained, "--device_map", "auto", status=2)
    assert "--no_verify" in one_line_error(capfd.readouterr().err, "export.py")
