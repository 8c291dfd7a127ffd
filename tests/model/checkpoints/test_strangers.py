"""Checkpoints of strangers: nothing in them is run, leads elsewhere, blocks, or passes for what it is not."""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import shlex
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import (
    ROOT,
    environment,
    load_test_py,
    one_line_error,
    write_as_the_original,
)

import train
from model import CheckpointError, VisionLanguageModel
from model.checkpoints.readers import read_json
from model.checkpoints.saving import write_checksums
from model.runs.resuming import check_resumable

QUICK = shlex.split(
    "--lora_rank 4 --lora_alpha 8 --lora_dropout 0 --logging_steps 1 --save_steps 2 --max_steps 4 --use_cpu true "
    "--report_to none --disable_tqdm true --per_device_train_batch_size 4"
)
ask = load_test_py()


@pytest.fixture(scope="module")
def run(tmp_path_factory, base_flags, mixed_data) -> Path:
    """A run of four steps, with checkpoints 2 and 4; not to be written to."""
    folder = tmp_path_factory.mktemp("run")
    assert train.main([*QUICK, *base_flags, *mixed_data, "--output_dir", str(folder)]) == 0
    return folder


@pytest.fixture
def stranger(run, tmp_path) -> Path:
    """A copy of the run, to be spoilt; its checkpoint 4 is gone."""
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    shutil.rmtree(folder / "checkpoint-4")
    return folder / "checkpoint-2"


@pytest.fixture
def refused(base_flags, mixed_data, capsys):
    """Go on from a checkpoint; gives the one line that says why not."""

    def resume(checkpoint: Path, *flags: str) -> str:
        capsys.readouterr()
        flags = flags or ("--resume_from_checkpoint", str(checkpoint))
        output = checkpoint.parent if "--resume_from_checkpoint" in flags else checkpoint.parent.parent / "new"
        assert train.main([*QUICK, *base_flags, *mixed_data, "--output_dir", str(output), *flags]) == 2
        return one_line_error(capsys.readouterr().err, "train.py")

    return resume


class Poison:
    """A pickle that would write a file when it is loaded."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return (Path.touch, (self.file,))


def load(folder, *base_flags, **options):
    return VisionLanguageModel.from_pretrained(*base_flags, model_weights=folder, device="cpu", **options)


def sign(file: Path) -> None:
    """Write the checksum of a file that was changed, as a stranger would."""
    write_checksums(file.parent, [file.name])


def edit(file: Path, **changes: object) -> None:
    values = json.loads(file.read_text())
    file.write_text(json.dumps({**values, **changes}))
    if (file.parent / "checksums.json").exists():
        sign(file)


# ---- Pickles


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_poisoned_training_state_is_refused_and_does_not_run(stranger, refused, tmp_path, name, zipped):
    proof = tmp_path / "it ran"
    state = torch.load(stranger / name, weights_only=False) if (stranger / name).exists() else {}
    torch.save({**state, "extra": Poison(proof)}, stranger / name, _use_new_zipfile_serialization=zipped)
    sign(stranger / name)
    said = refused(stranger)
    assert str(stranger) in said
    assert "weights_only" not in said  # no advice to switch the protection off
    assert not proof.exists()
    torch.load(stranger / name, weights_only=False)  # it is a poison indeed
    assert proof.exists()


def test_poison_in_files_that_nobody_reads_stays_there(stranger, base_flags, mixed_data, tmp_path, capsys):
    proof = tmp_path / "it ran"
    for name in ("training_args.bin", "pytorch_model.bin", "optimizer.bin", "trainer.pkl", "model.pt"):
        torch.save(Poison(proof), stranger / name)
    (stranger / "modeling_qwen.py").write_text(f"open({str(proof)!r}, 'w')")
    (stranger / "sitecustomize.py").write_text(f"open({str(proof)!r}, 'w')")
    load(stranger)
    flags = ["--output_dir", str(stranger.parent), "--resume_from_checkpoint", str(stranger)]
    assert train.main([*QUICK, *base_flags, *mixed_data, *flags]) == 0, capsys.readouterr().err
    assert not proof.exists()


@pytest.mark.parametrize("name", ["adapter_model.bin", "other_params.bin"])
def test_poison_of_the_original_is_refused_by_both_programs(
    run, base_flags, tmp_path, refused, capsys, monkeypatch, name
):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # no variable lets a pickle run
    folder = write_as_the_original(run / "checkpoint-2", tmp_path / "folder" / "original")
    proof = tmp_path / "it ran"
    torch.save({"0.weight": torch.ones(1), "extra": Poison(proof)}, folder / name)
    assert name in refused(folder, "--previous_lora_weights", str(folder))
    assert ask.main(["--model_weights", str(folder), *base_flags, "--prompt", "What?", "--device", "cpu"]) == 2
    assert name in one_line_error(capsys.readouterr().err, "test.py")
    assert not proof.exists()


def test_a_compressed_archive_is_refused_unopened(run, base_flags, tmp_path):
    """Ten gigabytes of zeros are ten megabytes."""
    folder = write_as_the_original(run / "checkpoint-2", tmp_path / "original")
    with zipfile.ZipFile(folder / "other_params.bin") as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(folder / "other_params.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    with pytest.raises(CheckpointError, match=r"other_params\.bin: .*compressed"):
        load(folder, base_flags[1], base_flags[3])


# ---- Remote code


def test_no_remote_code_is_run_whatever_auto_map_says(stranger, base_flags, tmp_path):
    """In a process of its own: an import that has happened can't be told from one that is refused."""
    proof = tmp_path / "it ran"
    poison = f"open({str(proof)!r}, 'w').close()\n"
    names = ("Config", "Model", "ModelForCausalLM", "ImageProcessor", "Processor")
    auto_map = {f"Auto{name}": f"evil.{name}" for name in names} | {"AutoTokenizer": ["evil.Tokenizer", None]}
    qwen, clip = (Path(shutil.copytree(base, tmp_path / Path(base).name)) for base in (base_flags[1], base_flags[3]))
    for folder in (qwen, clip, stranger):
        (folder / "evil.py").write_text(poison)
        (folder / "custom_generate").mkdir()
        (folder / "custom_generate/generate.py").write_text(poison)
        for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json", "generation_config.json"):
            if (folder / name).is_file():
                edit(folder / name, auto_map=auto_map, trust_remote_code=True, custom_generate="./custom_generate")
    auto_mapping = {"base_model_class": "Model", "parent_library": "evil"}
    edit(stranger / "adapter_config.json", auto_mapping=auto_mapping, task_type=None)
    edit(stranger / "multimodal_config.json", auto_map=auto_map, trust_remote_code=True)
    bases = ["--base_language_model", qwen, "--base_value_model", clip]
    flags = ["--model_weights", stranger, *bases, "--prompt", "What?", "--device", "cpu", "--greedy"]
    command = [sys.executable, ROOT / "test.py", *flags]
    # From the checkpoint's own folder, where evil.py would be found by its name.
    done = subprocess.run(command, cwd=stranger, env=environment(), capture_output=True, text=True, input="y\n" * 9)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert not proof.exists()


@pytest.mark.parametrize(
    "changes",
    [
        *({"peft_type": "IA3"}, {"peft_type": None}, {"megatron_config": {"a": 1}, "megatron_core": "evil"}),
        *({"target_modules": "(a+)+$"}, {"target_modules": "all-linear"}, {"target_modules": []}),
        *({"target_modules": ["c_attn", 5]}, {"target_modules": [".*"]}, {"modules_to_save": ["lm_head"]}),
        *({"rank_pattern": {"(a+)+$": 1}}, {"alpha_pattern": {"c_attn": 1e30}}, {"layer_replication": [[0, 1000000]]}),
        *({"use_dora": True}, {"use_rslora": True}, {"loftq_config": {"loftq_bits": 4}}, {"bias": "all"}),
        *({"lora_alpha": float("nan")}, {"lora_alpha": "8"}, {"lora_alpha": 10**400}, {"lora_alpha": 0}),
        *({"lora_dropout": 1.5}, {"lora_dropout": 10**400}),
        *({"r": 10**9}, {"r": -4}, {"r": True}, {"of_a_later_version": 1}),
    ],
    ids=str,
)
def test_an_adapter_that_asks_for_more_than_plain_lora_is_refused(stranger, changes):
    edit(stranger / "adapter_config.json", **changes)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json") as error:
        load(stranger)
    assert re.search(rf"\b{next(iter(changes))}\b", str(error.value))
    assert "\n" not in str(error.value)


def test_how_layers_were_initialised_does_not_matter_any_more(stranger):
    """PEFT would compute, or download, for `init_lora_weights`; the weights come from the file."""
    before = dict(load(stranger).named_parameters())
    edit(stranger / "adapter_config.json", init_lora_weights="eva", base_model_name_or_path="somebody/else")
    edit(stranger / "adapter_config.json", peft_version="99.0", of_a_later_version=None)
    for name, parameter in load(stranger).named_parameters():
        assert torch.equal(parameter, before[name]), name


# ---- Paths


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "projector.safetensors", "adapter_config.json"])
def test_a_link_out_of_a_checkpoint_is_refused(stranger, refused, tmp_path, name):
    (stranger / name).rename(tmp_path / "secret")
    (stranger / name).symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=f"{name}: .*link"):
        load(stranger)
    assert f"{name}: " in refused(stranger)
    assert f"{name}: " in refused(stranger, "--previous_lora_weights", str(stranger))


def test_links_inside_and_to_a_checkpoint_are_fine(stranger, tmp_path):
    (stranger / "adapter_model.safetensors").rename(stranger / "weights")
    (stranger / "adapter_model.safetensors").symlink_to("weights")
    (tmp_path / "link").symlink_to(stranger)
    before, after = (dict(load(folder).named_parameters()) for folder in (stranger, tmp_path / "link"))
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("name", ["run_state.json", "checksums.json", "adapter_config.json"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_is_no_file_is_refused_and_not_waited_for(stranger, refused, name, kind):
    (stranger / name).unlink()
    if kind == "pipe":
        os.mkfifo(stranger / name)
    else:
        (stranger / name).symlink_to("/dev/zero")
    assert name in refused(stranger)
    if name == "run_state.json":
        load(stranger)  # asking does not read it
    else:
        with pytest.raises(CheckpointError, match=name):
            load(stranger)


def test_the_best_checkpoint_is_one_of_this_run(stranger, base_flags, mixed_data, capsys):
    """trainer_state.json names a folder, which could be anywhere."""
    edit(stranger / "trainer_state.json", best_model_checkpoint="/etc/checkpoint-2", best_global_step=2, best_metric=-9)
    flags = ["--output_dir", str(stranger.parent), "--resume_from_checkpoint", "auto"]
    evaluation = ["--eval_image_map", mixed_data[1], "--eval_captions_file", mixed_data[3], "--eval_strategy", "steps"]
    best = ["--load_best_model_at_end", "true", "--eval_steps", "2", "--save_strategy", "steps"]
    capsys.readouterr()
    status = train.main([*QUICK, *base_flags, *mixed_data, *flags, *evaluation, *best])
    err = capsys.readouterr().err
    assert status == 0, err
    assert f"loading the best checkpoint {stranger}" in err
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (stranger, stranger.parent))
    assert all(torch.equal(before[name], after[name]) for name in before)


# ---- What is damaged, oversized or of something else


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b"{" + b'"a":{' * 100_000, b"9" * 5000, b"\xff\xfe", b"[]", b"", None]
)
def test_json_that_is_none_or_huge_is_one_line(stranger, content):
    file = stranger / "multimodal_config.json"
    if content is None:
        with file.open("r+b") as opened:
            opened.truncate(1 << 40)  # a terabyte of nothing
    else:
        file.write_bytes(content)
    with pytest.raises(CheckpointError, match=file.name) as error:
        read_json(file)
    assert len(str(error.value)) < 600
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        *({"epoch": -1}, {"epoch": 10**12}, {"epoch": math.inf}, {"epoch": 10**4000}, {"position": 1.5}),
        *({"position": 10**9}, {"position": 12}, {"position": 7}, {"geometry": {}}),
        {"geometry": {"num_samples": 12, "batch_size": 4, "accumulation": 1, "num_processes": 10**9}},
        *({"loss_sums": []}, {"loss_sums": ["a"]}, {"loss_sums": [10**400]}, {"loss_sums": [True]}, {"identity": []}),
        *({"bad": 5}, {"bad": [-1]}, {"bad": [10**6]}, {"more": 1}),
    ],
    ids=lambda changes: str(changes)[:40],
)
def test_a_run_state_that_is_none(stranger, changes):
    edit(stranger / "run_state.json", **changes)
    with pytest.raises(CheckpointError, match=r"run_state\.json"):
        check_resumable(stranger)


@pytest.mark.parametrize(
    "changes",
    [{"of_a_later_version": 1}, {"log_history": 5}, {"stateful_callbacks": [1]}, {"global_step": "x"}],
    ids=str,
)
def test_a_trainer_state_that_is_none(stranger, refused, changes):
    edit(stranger / "trainer_state.json", **changes)
    assert str(stranger) in refused(stranger)


@pytest.mark.parametrize(
    ("length", "header", "rest"),
    [
        (1 << 62, b"{}", b""),
        (99_000_000, b" " * 1000, b""),
        (100, b'{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}', b""),
        (100, b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[-8,8]}}', bytes(16)),
    ],
    ids=["longer than any file", "longer than its file", "tensors beyond the end", "tensors before the start"],
)
def test_a_header_bomb_is_one_line(stranger, length, header, rest):
    file = stranger / "projector.safetensors"
    file.write_bytes(struct.pack("<Q", length) + header.ljust(min(length, 100)) + rest)
    sign(file)
    with pytest.raises(CheckpointError, match=file.name) as error:
        load(stranger)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("optimizer.pt", lambda state: state["param_groups"].pop()),
        ("optimizer.pt", lambda state: state["state"][0].update(exp_avg=torch.ones(3))),
        ("optimizer.pt", lambda state: state.clear()),
        ("scheduler.pt", lambda state: state.update(optimizer=7)),
        ("scheduler.pt", lambda state: state.update(last_epoch="x")),
        ("rng_state.pth", lambda state: state.clear()),
        ("rng_state.pth", lambda state: state.update(cpu=state["cpu"][:9])),
    ],
)
def test_a_training_state_of_something_else(stranger, refused, name, change):
    state = torch.load(stranger / name, weights_only=False)
    change(state)
    torch.save(state, stranger / name)
    sign(stranger / name)
    said = refused(stranger)
    assert str(stranger) in said
    assert len(said) < 600


@pytest.mark.parametrize("content", [b"", b"[1, 2]", pickle.dumps({"last_epoch": 1}), "list", "end record"])
@pytest.mark.parametrize("signed", [True, False])
def test_a_training_state_that_is_damaged(stranger, refused, content, signed):
    file = stranger / "scheduler.pt"
    if content == "list":
        torch.save([1, 2], file)
    elif content == "end record":
        whole = file.read_bytes()
        file.write_bytes(whole[:-20] + bytes([whole[-20] ^ 255]) + whole[-19:])
    else:
        file.write_bytes(content)
    if signed:
        sign(file)
    else:  # an older checkpoint
        (stranger / "checksums.json").unlink()
    assert str(stranger) in refused(stranger)
