"""Checkpoint folders: what is written, that it comes back bit for bit, and a clear error where it does not fit."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_run import write_as_the_original
from tiny_vlm import (
    ALPHA,
    RANK,
    VOCAB_SIZE,
    collate,
    enliven_trained,
    logits_of,
    make_language_model,
    new_model,
    sample,
    trainable_parameters,
)
from torch.testing import assert_close

from model import CheckpointError, LoraSettings, VisionLanguageModel, read_checkpoint
from model.checkpoints.checkpoint import resolve_checkpoint
from model.checkpoints.readers import read_tensors
from model.checkpoints.saving import write_checksums
from qwen import MultimodalQWenLMHeadModel

ADAPTER, PROJECTOR, MULTIMODAL = "adapter_model.safetensors", "projector.safetensors", "multimodal_config.json"
WEIGHTS = {"adapter_config.json", ADAPTER, PROJECTOR, MULTIMODAL}
FILES = WEIGHTS | {"checksums.json"}
LORA_A = "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"


@pytest.fixture(scope="module")
def batch():
    return collate(sample(1), sample(2, seed=1), sample(0, seed=2))


@pytest.fixture(scope="module")
def trained(tiny_bases):
    """A model with LoRA and projector weights that show in its answers."""
    return enliven_trained(new_model(tiny_bases)).eval()


@pytest.fixture(scope="module")
def other(tiny_bases):
    """One with other weights."""
    return enliven_trained(new_model(tiny_bases), seed=5).eval()


@pytest.fixture(scope="module")
def saved(trained, tmp_path_factory):
    """Its checkpoint; not to be written to."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoint-7"
    trained.save_checkpoint(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of the checkpoint, to be spoilt."""
    return Path(shutil.copytree(saved, tmp_path / "checkpoint-7"))


def load(folder, *bases, **options):
    return VisionLanguageModel.from_pretrained(*bases, model_weights=folder, device="cpu", **options)


def rewrite(file: Path, change) -> None:
    """Let `change` edit a file's tensors or JSON object in place, as somebody who then writes its checksum too."""
    content = load_file(file) if file.suffix == ".safetensors" else json.loads(file.read_text())
    change(content)
    if file.suffix == ".safetensors":
        save_file(content, file)
    else:
        file.write_text(json.dumps(content))
    if (file.parent / "checksums.json").exists():
        write_checksums(file.parent, [file.name])


# What is written


def test_files_and_names(saved, tiny_bases):
    assert {path.name for path in saved.iterdir()} == FILES
    assert set(load_file(saved / ADAPTER)) == {
        f"base_model.model.transformer.h.{i}.{target}.lora_{part}.weight"
        for i in range(2)
        for target in ("attn.c_attn", "mlp.w1", "mlp.w2")
        for part in "AB"
    }
    assert set(load_file(saved / PROJECTOR)) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    config = json.loads((saved / MULTIMODAL).read_text())
    prints = [config.pop(f"{base}_fingerprint") for base in ("vision_tower", "language_model")]
    assert all(re.fullmatch("v2-[0-9a-f]{16}", value) for value in prints)
    assert prints[0] != prints[1]
    assert set(config.pop("package_versions")) == {"torch", "transformers", "peft", "accelerate"}
    assert config == {
        "base_language_model": tiny_bases[0],
        "base_value_model": tiny_bases[1],
        "vision_tower": "clip",
        "num_image_tokens": 4,
        "vision_hidden_size": 32,
        "language_hidden_size": 16,
        "vocab_size": VOCAB_SIZE,
        "projector_layers": 2,
        "drop_first_patch": False,
        "dtype": "float32",
    }
    sums = json.loads((saved / "checksums.json").read_text())
    assert sums == {name: hashlib.sha256((saved / name).read_bytes()).hexdigest() for name in WEIGHTS}
    adapter = json.loads((saved / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"], adapter["base_model_name_or_path"]) == (RANK, ALPHA, tiny_bases[0])
    assert sorted(adapter["target_modules"]) == ["c_attn", "w1", "w2"]


def test_relative_folders_of_base_models_are_written_absolute(tiny_bases, tmp_path, monkeypatch):
    monkeypatch.chdir(Path(tiny_bases[0]).parent)
    new_model(("qwen", "clip")).save_checkpoint(tmp_path)
    config = json.loads((tmp_path / MULTIMODAL).read_text())
    assert (config["base_language_model"], config["base_value_model"]) == tiny_bases
    monkeypatch.chdir("/")
    load(tmp_path)


@pytest.mark.parametrize("done", range(5))
def test_new_weights_half_in_place_are_no_checkpoint(trained, folder, monkeypatch, done):
    replace, calls = Path.replace, []

    def fail_later(path, target):
        calls.append(target)
        if len(calls) > done:
            raise OSError("Input/output error")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", fail_later)
    with pytest.raises(OSError, match="Input/output error"):
        trained.save_checkpoint(folder)
    with pytest.raises(CheckpointError, match=r"multimodal_config\.json missing"):
        resolve_checkpoint(folder)


# What comes back


@pytest.mark.parametrize(
    "options",
    [{}, {"trainable": True, "lora_dropout": 0.25}, {"dtype": torch.bfloat16}],
    ids=["to ask", "to train", "over a base in bf16"],
)
def test_what_is_loaded_is_what_was_saved_bit_for_bit(trained, saved, batch, tmp_path, options):
    loaded = load(saved, **options)
    if not options:
        assert_close(logits_of(loaded, batch), logits_of(trained, batch), rtol=0, atol=0)
    assert loaded.training == ("trainable" in options)
    assert loaded.dtype == options.get("dtype", torch.float32)
    assert {p.dtype for name, p in loaded.named_parameters() if "lora_" in name} == {torch.float32}
    assert loaded.language_model.peft_config["default"].lora_dropout == options.get("lora_dropout", 0.0)
    assert trainable_parameters(loaded).keys() == (trainable_parameters(trained).keys() if loaded.training else set())
    loaded.save_checkpoint(tmp_path)
    for name in (ADAPTER, PROJECTOR):
        assert (tmp_path / name).read_bytes() == (saved / name).read_bytes()
    assert json.loads((tmp_path / MULTIMODAL).read_text())["dtype"] == str(loaded.dtype).removeprefix("torch.")


def test_peft_itself_reads_the_adapter(saved, tiny_bases, trained):
    base = MultimodalQWenLMHeadModel.from_pretrained(tiny_bases[0])
    ids = torch.arange(9)[None]
    wrapped = PeftModel.from_pretrained(base, str(saved)).eval()
    with torch.no_grad():
        assert_close(wrapped(input_ids=ids).logits, trained.language_model(input_ids=ids).logits, rtol=0, atol=0)


# Which folder is meant


def make_run(run: Path, saved: Path, *steps: int) -> list[Path]:
    return [Path(shutil.copytree(saved, run / f"checkpoint-{step}")) for step in steps]


def test_a_run_folder_means_its_newest_complete_checkpoint(saved, tmp_path):
    (*_, second, newest) = make_run(tmp_path, saved, 2, 30, 100)
    (tmp_path / "tmp-checkpoint-200").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-300").write_text("a file")
    assert resolve_checkpoint(tmp_path) == newest
    for missing in WEIGHTS:
        spoilt = Path(shutil.copytree(saved, tmp_path / "checkpoint-400"))
        (spoilt / missing).unlink()
        assert resolve_checkpoint(tmp_path) == newest, missing
        shutil.rmtree(spoilt)
    shutil.rmtree(newest)
    assert resolve_checkpoint(str(tmp_path) + os.sep) == second
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)  # a run's checkpoints come before the weights in its folder
    assert resolve_checkpoint(tmp_path) == second
    for step in (2, 30):
        (tmp_path / f"checkpoint-{step}" / PROJECTOR).unlink()
    assert resolve_checkpoint(tmp_path) == tmp_path
    (tmp_path / PROJECTOR).unlink()
    with pytest.raises(CheckpointError, match=r"none of its \d checkpoint-\* folders is complete"):
        resolve_checkpoint(tmp_path)


# Files that are not what was written


@pytest.mark.parametrize("name", sorted(FILES))
def test_every_flipped_bit_is_found(folder, trained, name):
    content = bytearray((folder / name).read_bytes())
    for place in (0, len(content) // 3, len(content) - 2):  # the last byte of a JSON file is a line break
        content[place] ^= 4
        (folder / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=name):
            load(folder)
        with pytest.raises(CheckpointError, match=name):
            trained.load_checkpoint(folder)
        content[place] ^= 4
    (folder / name).write_bytes(content)
    load(folder)


def test_other_files_in_the_folder_and_other_fields_are_ignored(folder, tmp_path):
    (folder / "notes.txt").symlink_to(tmp_path / "nowhere")
    os.mkfifo(folder / "optimizer.pt")
    rewrite(folder / MULTIMODAL, lambda c: c.update(something_new=1))  # a later version's
    load(folder)


def test_a_folder_that_is_older_than_checksums_loads_with_a_warning(folder, trained, batch, caplog):
    (folder / "checksums.json").unlink()
    rewrite(folder / MULTIMODAL, lambda c: c.update(vision_tower_fingerprint="0123456789abcdef"))
    rewrite(folder / MULTIMODAL, lambda c: c.update(language_model_fingerprint="fp16-0123456789abcdef"))
    assert_close(logits_of(load(folder), batch), logits_of(trained, batch), rtol=0, atol=0)
    assert "checksums.json" in caplog.text
    assert "vision_tower_fingerprint" in caplog.text
    assert "language_model_fingerprint" in caplog.text


# Folders of the original project


@pytest.mark.parametrize(
    ("adapter", "adapter_prefix", "projector_prefix"),
    [
        ("adapter_model.bin", "", ""),
        ("adapter_model.safetensors", "language_model.", "feature_proj."),
        ("adapter_model.bin", "module.", "base_model.model.transformer.feature_proj."),
    ],
)
def test_a_folder_of_the_original_project_loads(
    saved, trained, tiny_bases, tmp_path, adapter, adapter_prefix, projector_prefix
):
    folder = write_as_the_original(saved, tmp_path / "original")
    lora, projector = load_file(saved / ADAPTER), load_file(saved / PROJECTOR)
    if adapter_prefix:  # names may hold the adapter's own, `default`
        lora = {adapter_prefix + re.sub(r"(lora_[AB])", r"\1.default", name): value for name, value in lora.items()}
    (folder / "adapter_model.bin").unlink()
    (torch.save if adapter.endswith(".bin") else save_file)(lora, folder / adapter)
    torch.save({projector_prefix + name: value for name, value in projector.items()}, folder / "other_params.bin")
    assert read_checkpoint(folder).config is None
    loaded = load(folder, *tiny_bases)
    for name, parameter in trained.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter), name
    assert not loaded.vision_tower.drop_first_patch  # CLIP's class token went, and that is all


def test_what_the_original_project_wrote_on_a_gpu_is_read_to_the_cpu(tmp_path):
    file, tensor = tmp_path / "other_params.bin", torch.arange(6.0).view(2, 3)
    torch.save({"0.weight": tensor}, tmp_path / "cpu.bin")
    with zipfile.ZipFile(tmp_path / "cpu.bin") as archive, zipfile.ZipFile(file, "w") as written:
        for name in archive.namelist():
            content = archive.read(name)
            if name.endswith("data.pkl"):
                assert content.count(b"X\x03\0\0\0cpu") == 1
                content = content.replace(b"X\x03\0\0\0cpu", b"X\x06\0\0\0cuda:0")
            written.writestr(name, content)
    (found,) = read_tensors(file).values()
    assert found.device.type == "cpu"
    assert torch.equal(found, tensor)


def test_siglip_loses_its_first_patch_in_what_the_original_trained_and_only_there(
    saved, tiny_bases, tiny_siglip, tmp_path
):
    bases = tiny_bases[0], tiny_siglip
    original = write_as_the_original(saved, tmp_path / "original")
    old, new = load(original, *bases), VisionLanguageModel.from_pretrained(*bases, device="cpu")
    assert (old.num_image_tokens, new.num_image_tokens) == (3, 4)  # as 728 and 729 of SigLIP's own
    pixels = sample(2)["pixel_values"]
    assert_close(old.vision_tower(pixels), new.vision_tower(pixels)[:, 1:])

    # Training goes on from it, and what is saved then says so.
    further = load(original, *bases, trainable=True)
    assert further.num_image_tokens == 3
    further.save_checkpoint(tmp_path / "further")
    config = json.loads((tmp_path / "further" / MULTIMODAL).read_text())
    assert (config["drop_first_patch"], config["num_image_tokens"], config["vision_tower"]) == (True, 3, "siglip")
    again = load(tmp_path / "further")
    assert (again.num_image_tokens, again.vision_tower.drop_first_patch) == (3, True)

    # What this project trains from the start keeps it.
    fresh = new_model(bases)
    fresh.save_checkpoint(tmp_path / "fresh")
    assert read_checkpoint(tmp_path / "fresh").config.drop_first_patch is False
    assert load(tmp_path / "fresh").num_image_tokens == 4


# What does not fit


@pytest.mark.parametrize("name", ["adapter_model.bin", "other_params.bin"])
@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"PK\x03\x04 cut off", b"\x80\x02}q\x00(X\x05", b"text", pickle.dumps({"0.weight": [1, 2]}, protocol=2)),
        *([torch.ones(1)], {"0.weight": torch.ones(1), "step": 5}, {0: torch.ones(1)}),
    ],
    ids=["empty", "cut archive", "cut pickle", "text", "list as tensor", "list", "number", "name that is a number"],
)
def test_a_broken_file_of_the_original_is_named(saved, tiny_bases, tmp_path, name, content):
    folder = write_as_the_original(saved, tmp_path / "original")
    if isinstance(content, bytes):
        (folder / name).write_bytes(content)
    else:
        torch.save(content, folder / name)
    with pytest.raises(CheckpointError, match=rf"{name}: (can't be read|.*names and tensors)"):
        load(folder, *tiny_bases)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (ADAPTER, lambda w: w.pop(LORA_A), f"missing {LORA_A}"),
        (ADAPTER, lambda w: w.update(other=torch.ones(1)), "unexpected other"),
        (ADAPTER, lambda w: w.update({LORA_A: torch.ones(RANK, 17)}), rf"{LORA_A} is \(4, 17\), expected \(4, 16\)"),
        (ADAPTER, lambda w: w[LORA_A].fill_(float("nan")), f"{LORA_A} holds values that are not finite"),
        (ADAPTER, lambda w: w.update({LORA_A: torch.ones(RANK, 16).int()}), f"{LORA_A} is torch.int32"),
        (PROJECTOR, lambda w: w.pop("2.bias"), "missing 2.bias"),
        (PROJECTOR, lambda w: w["2.bias"].fill_(float("inf")), "2.bias holds values that are not finite"),
    ],
)
def test_weights_that_do_not_fit_are_named_and_change_nothing(folder, other, file, change, message):
    rewrite(folder / file, change)
    part, likely = {ADAPTER: ("adapter", "base language model or rank"), PROJECTOR: ("projector", "vision tower")}[file]
    message = rf"{part} in {re.escape(str(folder))} does not fit \(was it trained for another {likely}.*{message}"
    with pytest.raises(CheckpointError, match=message) as error:
        load(folder)
    assert len(str(error.value)) < 700
    before = {name: p.detach().clone() for name, p in other.named_parameters()}
    with pytest.raises(CheckpointError, match=message):
        other.load_checkpoint(folder)
    for name, parameter in other.named_parameters():
        assert torch.equal(parameter, before[name]), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("num_image_tokens"), "num_image_tokens missing"),
        (lambda c: c.update(base_language_model=5), "base_language_model"),
        (lambda c: c.update(drop_first_patch="no"), "drop_first_patch"),
        (lambda c: c.update(projector_layers=3), "projector_layers"),
        (lambda c: c.update(num_image_tokens=729), "num_image_tokens is 4, the checkpoint was trained with 729"),
        (lambda c: c.update(vision_hidden_size=48), "vision_hidden_size is 32, the checkpoint was trained with 48"),
    ],
)
def test_a_multimodal_configuration_that_is_none_or_does_not_fit(folder, change, message):
    rewrite(folder / MULTIMODAL, change)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_another_tower_is_refused(folder, tiny_bases, tiny_siglip, tmp_path):
    with pytest.raises(CheckpointError, match="vision_tower is siglip, the checkpoint was trained with clip"):
        load(folder, tiny_bases[0], tiny_siglip)
    same_shape = Path(shutil.copytree(tiny_bases[1], tmp_path / "same_shape"))
    patches = "vision_model.embeddings.patch_embedding.weight"
    rewrite(same_shape / "model.safetensors", lambda weights: weights[patches].add_(1))
    expected = f"weights or settings of --base_value_model differ from those of {re.escape(tiny_bases[1])}"
    with pytest.raises(CheckpointError, match=expected):
        load(folder, None, str(same_shape))
    rewrite(folder / MULTIMODAL, lambda config: config.update(vision_tower_fingerprint=""))  # not known
    load(folder, None, str(same_shape))


def test_another_language_model_is_refused(folder, tiny_bases, saved, tmp_path):
    deeper = make_language_model(tmp_path / "deeper", num_hidden_layers=3)
    same_shape = make_language_model(tmp_path / "same_shape", seed=99)
    for other in (deeper, same_shape):
        with pytest.raises(CheckpointError, match="weights or settings of --base_language_model differ"):
            load(folder, other)
    original = write_as_the_original(saved, tmp_path / "original")  # which does not say what it was trained on
    with pytest.raises(CheckpointError, match=r"missing base_model.model.transformer.h.2.attn.c_attn.lora_A.weight"):
        load(original, deeper, tiny_bases[1])


def test_weights_go_into_no_model_with_another_scale(saved, tiny_bases):
    other_scale = VisionLanguageModel.from_pretrained(*tiny_bases, device="cpu")
    other_scale.add_lora(LoraSettings(rank=RANK, alpha=ALPHA + 1))
    with pytest.raises(CheckpointError, match="trained with lora_alpha 8, the model has 9"):
        other_scale.load_checkpoint(saved)


def test_a_base_model_that_has_gone_is_named(folder, tiny_bases, tmp_path):
    gone = str(tmp_path / "gone")
    rewrite(folder / MULTIMODAL, lambda c: c.update(base_language_model=gone))
    with pytest.raises(ValueError, match=r"base language model '.*gone': no local folder"):
        load(folder)
    load(folder, tiny_bases[0])  # it may be named anew
