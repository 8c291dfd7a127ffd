"""Exports of tiny checkpoints, made in this process; the tokenizer's files are built once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from tiny_families import make_family
from tiny_run import make_language_model
from tiny_towers import make_clip_checkpoint, make_siglip_checkpoint
from tiny_vlm import enliven_trained

from model import LoraSettings, VisionLanguageModel
from model.lora import default_targets

FAMILY_TARGETS = ("q_proj", "v_proj", "down_proj")


@pytest.fixture(scope="session")
def bpe(tokenizer) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The tokenizer's vocabulary and merges; finding these takes some seconds."""
    from model.export.processor_files import byte_level_bpe

    return byte_level_bpe(tokenizer)


@pytest.fixture(scope="session")
def tokenizer_files(tmp_path_factory, tokenizer, bpe) -> Path:
    """The tokenizer as exports have it."""
    from model.export import processor_files

    folder = tmp_path_factory.mktemp("tokenizer")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processor_files, "byte_level_bpe", lambda tokenizer: bpe)
        processor_files.write_tokenizer(folder, tokenizer, 512)
    return folder


@pytest.fixture
def run_export(tmp_path):
    """Call export.py in this process, without its own verification unless `verify` says so; return the new folder."""
    import export as program

    def call(checkpoint: object, *flags: object, status: int = 0, verify: bool = False, name: str = "out") -> Path:
        output = tmp_path / name
        words = ["--model_weights", checkpoint, "--output", output, *([] if verify else ["--no_verify"]), *flags]
        assert program.main([str(word) for word in words]) == status
        return output

    return call


@pytest.fixture
def export(run_export, tokenizer_files, bpe, monkeypatch):
    """Call export.py for a QWen, whose tokenizer's files are copied."""
    from model.export import gguf_tokenizer, qwen_text

    def copy_files(folder, tokenizer, max_length):
        shutil.copytree(tokenizer_files, folder, dirs_exist_ok=True)

    monkeypatch.setattr(qwen_text, "write_tokenizer", copy_files)
    monkeypatch.setattr(gguf_tokenizer, "byte_level_bpe", lambda tokenizer: bpe)
    return run_export


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory, qwen_tiktoken):
    """Write base models and a checkpoint whose LoRA and projector make a difference; return its folder."""

    def make(
        make_tower, vision=None, targets=("c_attn", "w1", "w2"), dtype=torch.float32, pixel_shuffle=1, **language
    ) -> Path:
        folder = tmp_path_factory.mktemp("checkpoint")
        base = make_language_model(folder / "qwen", qwen_tiktoken, **language)
        tower = make_tower(folder / "tower", **(vision or {}))
        model = VisionLanguageModel.from_pretrained(base, tower, dtype=dtype, device="cpu", pixel_shuffle=pixel_shuffle)
        model.add_lora(LoraSettings(rank=4, alpha=8, dropout=0.0, target_modules=targets))
        enliven_trained(model, seed=3, std=0.4).save_checkpoint(folder / "trained")
        return folder / "trained"

    return make


@pytest.fixture(scope="session")
def towers(tmp_path_factory) -> dict[str, str]:
    """A CLIP and a SigLIP of three blocks; not to be written to."""
    folder = tmp_path_factory.mktemp("towers")
    return {
        "clip": make_clip_checkpoint(folder / "clip", num_hidden_layers=3),
        "siglip": make_siglip_checkpoint(folder / "siglip", num_hidden_layers=3),
    }


@pytest.fixture(scope="session")
def language(tmp_path_factory, qwen_tiktoken) -> str:
    """A tiny QWen; not to be written to."""
    return make_language_model(tmp_path_factory.mktemp("language") / "qwen", qwen_tiktoken)


@pytest.fixture(scope="session")
def make_family_checkpoint(tmp_path_factory):
    """Do so for a language model other than QWen."""

    def make(family, make_tower=make_clip_checkpoint, targets=FAMILY_TARGETS, dtype=torch.float32, **language):
        folder = tmp_path_factory.mktemp(family)
        base = make_family(folder / "language", family, **language)
        tower = make_tower(folder / "tower")
        model = VisionLanguageModel.from_pretrained(base, tower, dtype=dtype, device="cpu")
        names = targets or default_targets(model.language_model)
        model.add_lora(LoraSettings(rank=4, alpha=8, dropout=0.0, target_modules=names))
        enliven_trained(model, seed=3, std=0.4).save_checkpoint(folder / "trained")
        return folder / "trained"

    return make
