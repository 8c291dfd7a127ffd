"""`--shard_model`: the language model is split over the processes, and nothing else changes."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from several_runs import note_answers
from tiny_families import make_family
from tiny_qwen import tiny_model
from tiny_run import ROOT, losses, make_language_model, one_line_error, start, trained_weights
from tiny_towers import make_clip_checkpoint

import train
from benchmarks.training import split_table
from model import CheckpointError, LoraSettings, VisionLanguageModel
from model.arguments import parse_arguments
from model.dry_run.memory_estimate import BatchShape, Setting
from model.dry_run.planned_model import planned_model
from model.evaluation.answering_samples import AnswerSamples
from model.runs.resuming import newest_resumable
from model.scaling import hollow
from model.scaling.sharding import shard
from model.scaling.split_memory import estimate_split

SCRIPT = ROOT / "tests" / "several_runs.py"
SMALL_STEPS = ["--learning_rate", "1e-3", "--feature_proj_lr", "1e-3"]
"""Large ones multiply rounding."""
QUICK = [
    *("--use_cpu", "true", "--report_to", "none", "--disable_tqdm", "true", "--logging_steps", "1", *SMALL_STEPS),
    *("--per_device_train_batch_size", "4", "--lr_scheduler_type", "constant"),
]
LORA = ["--lora_rank", "4", "--lora_dropout", "0"]
ANSWERING = ["--eval_max_new_tokens", "6", "--per_device_eval_batch_size", "1", "--eval_generate"]
ALL_SORTS = [
    *(
        "--max_steps",
        "20",
        "--save_steps",
        "10",
        "--gradient_checkpointing",
        "true",
        "--load_best_model_at_end",
        "true",
    ),
    *("--eval_strategy", "steps", "--eval_steps", "10", "--train_sampling_strategy", "group_by_length", *LORA),
    *(*ANSWERING, "1"),
]
"""Of two processes, one has nothing to answer."""
SHORT = ["--max_steps", "4", "--save_steps", "2"]
CHECKED = ["--gradient_checkpointing", "true", "--eval_strategy", "steps", "--eval_steps", "2", *ANSWERING, "3"]
"""Of two processes, one answers two samples, and the other one."""
COUNTED = ("full", "4bit projector")
HALF = ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "2", "--shard_model", "true"]
"""What makes of `QUICK`'s steps those of two processes; in some of them one sees no image."""


@pytest.fixture(autouse=True)
def answers(monkeypatch) -> None:
    """Runs of this process write their answers too."""
    monkeypatch.setattr(AnswerSamples, "_measure", note_answers)


@pytest.fixture
def alone() -> Iterator[None]:
    """Leave no process group behind: without torchrun, a sharded run makes one of its own process."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def with_eval(data: list[str]) -> list[str]:
    return [*data, "--eval_image_map", data[1], "--eval_captions_file", data[3]]


def assert_same(ours: Path, theirs: Path, step: int) -> None:
    """Losses within 1e-5, weights within 1e-6, and files of the same names, shapes and sizes."""
    one, other = (folder / f"checkpoint-{step}" for folder in (ours, theirs))
    assert losses(one) == pytest.approx(losses(other), abs=1e-5)
    assert len(losses(one)) == step
    histories = [json.loads((folder / "trainer_state.json").read_text())["log_history"] for folder in (one, other)]
    evaluated = [
        [value for entry in history for name, value in entry.items() if re.match("eval_(?!runtime|.*per_second)", name)]
        for history in histories
    ]
    assert evaluated[0] == pytest.approx(evaluated[1], abs=1e-5)
    answers = [{path.name: path.read_text() for path in folder.glob("answers-*.json")} for folder in (ours, theirs)]
    assert all(answers[0][name] == answers[1][name] for name in answers[0].keys() & answers[1].keys())
    assert len(answers[0].keys() & answers[1].keys()) >= min(len(evaluated[0]), 1)
    names = [{str(path.relative_to(folder)) for path in folder.rglob("*")} for folder in (one, other)]
    assert {name for name in names[0] ^ names[1] if not name.startswith("rng_state")} == set()
    for name in (name for name in names[1] if name.endswith(".safetensors")):
        mine, yours = load_file(one / name), load_file(other / name)
        assert {key: value.dtype for key, value in mine.items()} == {key: value.dtype for key, value in yours.items()}
        for key, value in yours.items():
            torch.testing.assert_close(mine[key], value, rtol=0, atol=1e-6)
    states = [torch.load(folder / "optimizer.pt", weights_only=True) for folder in (one, other)]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    assert states[0]["state"].keys() == states[1]["state"].keys()
    for number, state in states[1]["state"].items():
        for key, value in state.items():
            mine = states[0]["state"][number][key]
            assert type(mine) is type(value)
            torch.testing.assert_close(mine, value, rtol=0, atol=1e-5)


# ---- One process


def test_a_single_process_trains_as_without(base_flags, mixed_data, tmp_path, alone):
    """Also what it saves and resumes from; the rest of this file asks two processes."""
    command = [*base_flags, *mixed_data, *QUICK, *LORA, *SHORT]
    assert train.main([*command, "--output_dir", str(tmp_path / "whole")]) == 0
    split = [*command, "--shard_model", "true", "--output_dir", str(tmp_path / "split")]
    assert train.main(split) == 0
    assert_same(tmp_path / "split", tmp_path / "whole", 4)
    shutil.rmtree(tmp_path / "split" / "checkpoint-4")
    assert train.main([*split, "--resume_from_checkpoint", "auto"]) == 0
    assert_same(tmp_path / "split", tmp_path / "whole", 4)


def test_a_hollow_model_has_shapes_and_no_memory(tiny_bases):
    torch.manual_seed(5)
    light = VisionLanguageModel.from_pretrained(*tiny_bases, device="cpu", trainable=True, hollow=True)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    whole = VisionLanguageModel.from_pretrained(*tiny_bases, device="cpu", trainable=True)
    assert torch.equal(torch.rand(1), drawn)  # so LoRA and projector are those of a run without the flag
    ours, theirs = (dict(model.language_model.named_parameters()) for model in (light, whole))
    assert {name: (p.shape, p.dtype) for name, p in ours.items()} == {
        name: (p.shape, p.dtype) for name, p in theirs.items()
    }
    assert all(parameter.untyped_storage().nbytes() <= 8 for parameter in ours.values())
    assert light.fingerprints == whole.fingerprints


def test_weights_of_a_hub_name_are_downloaded(tmp_path, monkeypatch):
    """Nothing else would: what comes later reads the hub's cache alone."""
    files = ["model-1.safetensors", "model-2.safetensors"]
    index = tmp_path / "index.json"
    index.write_text(json.dumps({"weight_map": {"a": files[1], "b": files[0], "c": files[1]}}))
    asked: list[str] = []

    def cached_file(name, file):
        asked.append(file)
        return str(index)

    monkeypatch.setattr(hollow, "cached_file", cached_file)
    hollow._download_weights("Some/Model")
    assert asked == ["model.safetensors.index.json", *files]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--fsdp", "full_shard"], "--shard_model"),
        (["--deepspeed", "zero.json"], "--shard_model"),
        (["--shard_model", "true", "--optim", "adafactor"], "adamw_torch"),
        (["--shard_model", "true", "--fp16", "true"], "--bf16 true"),
        (["--shard_model", "true", "--torch_compile", "true"], "--torch_compile"),
    ],
)
def test_what_it_does_not_go_with_is_refused(base_flags, mixed_data, tmp_path, capsys, flags, named):
    command = [*base_flags, *mixed_data, *QUICK, *flags, "--output_dir", str(tmp_path / "run")]
    assert train.main(command) == 2
    line = one_line_error(capsys.readouterr().err, "train.py")
    assert flags[-2] in line
    assert named in line


def test_a_weight_that_is_missing_is_named(tiny_bases, tmp_path, alone):
    folder = shutil.copytree(tiny_bases[0], tmp_path / "base")
    weights = load_file(folder / "model.safetensors")
    weights.pop("transformer.ln_f.weight")
    weights["transformer.h.0.mlp.w1.weight"] = torch.zeros(3, 2)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model = VisionLanguageModel.from_pretrained(str(folder), tiny_bases[1], device="cpu", trainable=True, hollow=True)
    model.add_lora(LoraSettings(rank=2))
    with pytest.raises(ValueError, match=r"h\.0\.mlp\.w1\.weight: \(3, 2\).*ln_f\.weight: missing"):
        shard(model, torch.device("cpu"))


def test_a_dry_run_tells_the_memory_by_the_number_of_processes(base_flags, mixed_data, tmp_path, capsys):
    command = [*base_flags, *mixed_data, *QUICK, *LORA, "--dry_run", "--output_dir", str(tmp_path / "run")]
    assert train.main(command) == 0
    assert "--shard_model" not in capsys.readouterr().out
    assert train.main([*command, "--shard_model", "true"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if " process" in line and "step" not in line]
    peaks = {line.split()[0]: [float(cell) for cell in line.split()[2:]] for line in lines if line[0].isdigit()}
    assert list(peaks) == ["1", "2", "4", "8", "16", "32", "64"]
    for one, other in itertools.pairwise(list(peaks.values())[1:]):
        assert all(more >= fewer for more, fewer in zip(one, other, strict=True))


def test_the_table_of_the_documents_is_printed():
    table = split_table.markdown()
    assert table in (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")


def test_a_single_process_trains_in_4_bits_as_without(commands, tmp_path, alone):
    """What begins with the flag ends without it, and the other way round."""
    pytest.importorskip("bitsandbytes")
    for name in ("4bit", "4bit projector"):
        paths = [tmp_path / name / flag for flag in ("false", "true")]
        for folder in paths:
            flags = ["--shard_model", folder.name, "--output_dir", str(folder)]
            assert train.main([*commands[name], *flags]) == 0
        assert_same(*paths, 4)
        cards = [(folder / "MODEL_CARD.md").read_text().splitlines() for folder in paths]
        counts = [[line for line in card if line.startswith(("| language_model", "| all"))] for card in cards]
        assert counts[0] == counts[1]
        assert len(counts[0]) == 2
        for folder, other in (paths, paths[::-1]):
            shutil.rmtree(folder / "checkpoint-4")
            flags = ["--shard_model", other.name, "--resume_from_checkpoint", "auto", "--output_dir", str(folder)]
            assert train.main([*commands[name], *flags]) == 0
        assert_same(*paths, 4)


# ---- Two processes


@pytest.fixture(scope="module")
def commands(tmp_path_factory, base_flags, mixed_data, qwen_tiktoken) -> dict[str, list[str]]:
    """Runs, less their output folders."""
    family = make_family(tmp_path_factory.mktemp("family") / "qwen3", "qwen3", tie_word_embeddings=True)
    other = ["--base_language_model", family, *base_flags[2:]]
    wide = tmp_path_factory.mktemp("wide")
    wide_family = make_family(wide / "qwen2", "qwen2", hidden_size=64, intermediate_size=128, head_dim=16)
    sizes = {"hidden_size": 64, "kv_channels": 32, "intermediate_size": 256}
    wide_qwen = make_language_model(wide / "qwen", qwen_tiktoken, **sizes)
    in_4_bits = [*base_flags[2:], *QUICK, *SHORT, "--load_in_4bit", "true", "--base_language_model"]
    return {
        "lora": [*base_flags, *with_eval(mixed_data), *QUICK, *ALL_SORTS],
        "all": [*base_flags, *mixed_data, *QUICK, *SHORT, "--train_only", "all"],
        "family": [*other, *mixed_data, *QUICK, *SHORT, *LORA],
        "4bit": [*in_4_bits, wide_qwen, *with_eval(mixed_data), *LORA, *CHECKED],
        "4bit projector": [*in_4_bits, wide_family, *mixed_data, "--train_only", "projector"],
        "full": [*base_flags, *mixed_data, *QUICK, *SHORT, *LORA],
    }


def torchrun(folder: Path, processes: int = 2, **asked: object):
    (folder / "asked.json").write_text(json.dumps(asked))
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    number = f"--nproc_per_node={processes}"
    # Freed memory goes back to the system at once.
    settings = {"PYTHONPATH": path, "MALLOC_MMAP_THRESHOLD_": "100000"}
    return start("torchrun", "--standalone", number, SCRIPT, folder / "asked.json", **settings)


@pytest.fixture(scope="module")
def two(commands, tmp_path_factory) -> Path:
    """The folder in which two processes ran all of them."""
    out = tmp_path_factory.mktemp("two")
    runs = [[*words, *HALF, "--output_dir", str(out / name)] for name, words in commands.items()]
    one_step = ["--max_steps", "1", "--gradient_accumulation_steps", "1", "--save_strategy", "no"]
    one_step += ["--overwrite_output_dir", "true", "--output_dir", str(out / "counted")]
    counted = [[*commands[name], *HALF, *one_step] for name in COUNTED]
    done = torchrun(out, runs=runs[:-1], count=counted, full=0, **{"full run": runs[-1]})
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "step"), [("lora", 20), ("all", 4), ("family", 4), ("4bit", 4), ("4bit projector", 4)]
)
def test_two_processes_train_as_one(two, commands, name, step, tmp_path):
    assert train.main([*commands[name], "--output_dir", str(tmp_path)]) == 0
    assert_same(two / name, tmp_path, step)
    final = [folder / name for folder in (two / name, tmp_path) for name in ("language_model", "")][name != "all" :: 2]
    for path in final[0].glob("*.safetensors"):
        for key, value in load_file(final[1] / path.name).items():
            torch.testing.assert_close(load_file(path)[key], value, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "step"), [("lora", 20), ("all", 4), ("4bit", 4)])
def test_what_two_began_one_ends(two, commands, name, step, tmp_path, alone):
    """With the flag and without it: the files are the same, so two can read what one wrote as well."""
    flags = ["--resume_from_checkpoint", "auto", "--output_dir"]
    for folder, is_split in (("whole", "false"), ("split", "true")):
        shutil.copytree(two / name / f"checkpoint-{step // 2}", tmp_path / folder / f"checkpoint-{step // 2}")
        assert train.main([*commands[name], "--shard_model", is_split, *flags, str(tmp_path / folder)]) == 0
        assert_same(tmp_path / folder, two / name, step)


@pytest.mark.slow
def test_a_full_disk_of_the_process_that_writes_stops_none(two):
    assert not list((two / "full").glob("checkpoint-*"))
    with pytest.raises(CheckpointError):
        VisionLanguageModel.from_pretrained(model_weights=two / "full")
    assert newest_resumable(two / "full") is None


@pytest.mark.slow
def test_loading_holds_a_share_and_one_file(commands, tmp_path):
    """In 4 bits, one layer more. LoRA, tower and what Python allocates for the first time take some megabytes more."""
    sizes = {"hidden_size": 512, "num_attention_heads": 8, "kv_channels": 64, "intermediate_size": 2816}
    model = tiny_model(vocab_size=4000, num_hidden_layers=8, **sizes)
    model.save_pretrained(str(tmp_path / "qwen"), max_shard_size="15MB")
    size = sum(path.stat().st_size for path in (tmp_path / "qwen").glob("*.safetensors"))
    assert size > 110e6
    words, tower = commands["4bit"], make_clip_checkpoint(tmp_path / "clip")
    small = words[words.index("--base_language_model") + 1]
    done = torchrun(tmp_path, runs=[], small=[small, tower], measure=[str(tmp_path / "qwen"), tower])
    assert done.returncode == 0, done.stderr
    ends = sum(weight.nbytes for weight in model.parameters() if len(weight) == 4000)  # embedding and head stay whole
    in_4_bits = ends + (size - ends) * 4.13 / 32
    for rank in range(2):
        found = json.loads((tmp_path / f"loading-{rank}.json").read_text())
        for kind, whole, layer in (("None", size, 0), ("4bit", in_4_bits, 512 * 1408 * 4)):
            assert whole / 2 - 5e6 < found[kind]["kept"] < whole / 2 + 15e6
            assert found[kind]["most"] < whole / 2 + 15e6 + 15e6 + layer


@pytest.mark.slow
def test_what_a_step_sends_is_what_was_computed(two, commands):
    """Everything that is gathered or reduced; each of P processes sends (P - 1) / P of that."""
    setting, expected = Setting(dtype_bytes=4, processes=2), []
    for name in COUNTED:
        shape, _ = planned_model(parse_arguments([*commands[name], "--output_dir", str(two / "other")])[0])
        sent = 2 * estimate_split(shape, setting, BatchShape(4, 64, 8, 4)).sent
        # The projector's gradients are summed by all, each of which sends them twice.
        expected.append(sent - 2 * 4 * shape.projector_parameters)
    for rank in range(2):
        assert json.loads((two / f"sent-{rank}.json").read_text()) == expected


@pytest.mark.slow
@pytest.mark.parametrize(("name", "broken"), [("full", "break"), ("4bit", "break answering")])
def test_a_process_that_fails_ends_all_and_is_named_last(commands, tmp_path, name, broken):
    run = [*commands[name], *HALF, "--output_dir", str(tmp_path / "run")]
    began = time.monotonic()
    done = torchrun(tmp_path, runs=[run], **{broken: 1})
    assert done.returncode == 1
    assert time.monotonic() - began < 300
    assert "Input/output error" in done.stderr.rstrip().splitlines()[-1]
    assert name == "4bit" or trained_weights(tmp_path / "run" / "checkpoint-2")


# ---- Four processes


@pytest.mark.release
def test_four_processes_train_as_one_and_two_end_what_they_began(commands, tmp_path):
    quarter = ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "1", "--shard_model", "true"]
    steps = {"lora": 20, "all": 4, "4bit": 4}
    runs = [[*commands[name], *quarter, "--output_dir", str(tmp_path / "four" / name)] for name in steps]
    done = torchrun(tmp_path, processes=4, runs=runs)
    assert done.returncode == 0, done.stderr
    for name, step in steps.items():
        half = f"{name}/checkpoint-{step // 2}"
        shutil.copytree(tmp_path / "four" / half, tmp_path / "two" / half)
        assert train.main([*commands[name], "--output_dir", str(tmp_path / "one" / name)]) == 0
        assert_same(tmp_path / "four" / name, tmp_path / "one" / name, step)
    resumed = [*HALF, "--resume_from_checkpoint", "auto", "--output_dir"]
    runs = [[*commands[name], *resumed, str(tmp_path / "two" / name)] for name in steps]
    done = torchrun(tmp_path, runs=runs)
    assert done.returncode == 0, done.stderr
    for name, step in steps.items():
        assert_same(tmp_path / "two" / name, tmp_path / "one" / name, step)
