"""`--train_only projector` and `--train_only all`, through train.py and test.py, for QWen and for another family."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny_families import make_family
from tiny_run import (
    MIXED_CAPTIONS,
    build_trainer,
    load_test_py,
    losses,
    make_language_model,
    make_pictures,
    one_line_error,
    start,
    write_data,
)
from tiny_towers import make_clip_checkpoint
from transformers import AutoModelForCausalLM

import train
from model import CheckpointError, LoraSettings, VisionLanguageModel, read_checkpoint
from model.checkpoints.base_models import load_language_model
from model.checkpoints.saving import write_checksums
from model.export.sources import read_sources
from model.trainer import optimizer_groups
from qwen import IGNORE_INDEX

QUICK = [
    *("--learning_rate", "5e-3", "--feature_proj_lr", "1e-2", "--use_cpu", "true", "--report_to", "none"),
    *("--disable_tqdm", "true", "--logging_steps", "1", "--num_train_epochs", "2", "--save_steps", "2"),
    *("--per_device_train_batch_size", "4"),
]
KINDS = ("projector", "all")
PROJECTOR_FILES = {"projector.safetensors", "multimodal_config.json", "checksums.json"}
RUN_FILES = {"train_config.json", "loss.png", "MODEL_CARD.md"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("inputs")


@pytest.fixture(scope="module", params=["qwen3", pytest.param("qwen", marks=pytest.mark.slow)])
def family(request) -> str:
    return request.param


only_qwen3 = pytest.mark.parametrize("family", ["qwen3"], indirect=True, scope="module")


@pytest.fixture(scope="module")
def bases(folder, family, qwen_tiktoken) -> tuple[str, str]:
    """Of Qwen3 the embedding is tied to the head; of QWen it is not."""
    if family == "qwen":
        language = make_language_model(folder / family, qwen_tiktoken, generation={"do_sample": False})
    else:
        language = make_family(folder / family, family, tie_word_embeddings=True)
    return language, make_clip_checkpoint(folder / "clip")


@pytest.fixture(scope="module")
def command(folder, bases) -> list[str]:
    make_pictures(folder / "pictures")
    flags = ["--base_language_model", bases[0], "--base_value_model", bases[1]]
    return [*flags, *write_data(folder / "data", MIXED_CAPTIONS, folder / "pictures"), *QUICK]


@pytest.fixture(scope="module")
def runs(command, tmp_path_factory) -> dict[str, Path]:
    """A run of six steps of each kind, never stopped; that of the projector comes first, and `all` starts from it."""
    folder = tmp_path_factory.mktemp("runs")
    made = {kind: folder / kind for kind in KINDS}
    assert train.main([*command, "--train_only", "projector", "--output_dir", str(made["projector"])]) == 0
    from_projector = ["--previous_lora_weights", str(made["projector"]), "--train_only", "all"]
    assert train.main([*command, *from_projector, "--output_dir", str(made["all"])]) == 0
    return made


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All that was trained, by file and name."""
    files = [folder / "projector.safetensors", *(folder / "language_model").glob("*.safetensors")]
    return {f"{file.name}/{name}": value for file in files for name, value in load_file(file).items()}


# ---- Training


def plain_losses(trainer, steps: int, kind: str) -> list[float]:
    """Train by a loop of our own, which puts features in by hand and computes all logits."""
    ours = trainer.model
    base = load_language_model(ours.base_language_model, torch.float32)
    base.requires_grad_(kind == "all")
    tower, width = ours.vision_tower, base.config.hidden_size
    projector = torch.nn.Sequential(torch.nn.Linear(32, width), torch.nn.GELU(), torch.nn.Linear(width, width))
    projector.load_state_dict(ours.projector.state_dict())
    groups = [{"params": [p for p in base.parameters() if p.requires_grad], "lr": 5e-3}] if kind == "all" else []
    groups.append({"params": list(projector.parameters()), "lr": 1e-2})
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    rates = [group["lr"] for group in groups]
    table, found = base.get_input_embeddings(), []
    for step, batch in zip(range(steps), trainer.get_train_dataloader(), strict=False):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (1 - step / 6)
        is_image = batch["input_ids"] == base.image_token_id
        embeds = table(batch["input_ids"].masked_fill(is_image, 0)).clone()
        if "pixel_values" in batch:
            embeds[is_image] = projector(tower(batch["pixel_values"])).flatten(0, 1)
        logits = base(inputs_embeds=embeds, attention_mask=batch["attention_mask"]).logits
        loss = F.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORE_INDEX
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], 1.0)
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_those_of_a_plain_loop(command, kind, tmp_path):
    trainer = build_trainer([*command, "--train_only", kind, "--output_dir", str(tmp_path / "run")])
    expected = plain_losses(trainer, 3, kind)
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged[:3] == pytest.approx(expected, rel=1e-4)
    if kind == "all":
        assert logged[-1] < logged[0]


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_and_rates_are_where_they_should_be(command, bases, kind, tmp_path):
    trainer = build_trainer([*command, "--train_only", kind, "--weight_decay", "0.1", "--output_dir", str(tmp_path)])
    model = trainer.model
    batch = next(iter(trainer.get_train_dataloader()))
    batch.pop("ids", None)
    model(**batch, return_logits=False).loss.backward()
    have = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    parts = {"projector.": "projector", "language_model.": "all"}
    expected = {name for name, _ in model.named_parameters() if name.startswith(tuple(parts)[: 1 + (kind == "all")])}
    assert have == expected
    assert all(model.get_parameter(name).grad.abs().sum() > 0 for name in have if not name.endswith("k_proj.bias"))
    groups = {group["name"]: group for group in optimizer_groups(model, trainer.args)}
    rates = {"projector matrices": (1e-2, 0.1), "projector vectors": (1e-2, 0.0)}
    if kind == "all":
        rates |= {"language model matrices": (5e-3, 0.1), "language model vectors": (5e-3, 0.0)}
        assert model.language_model.get_input_embeddings().weight.grad is not None
        assert model.language_model.get_output_embeddings().weight.grad is not None
    assert {name: (group["lr"], group["weight_decay"]) for name, group in groups.items()} == rates
    assert sum(len(group["params"]) for group in groups.values()) == len(have)
    assert list(groups)[-1].startswith("projector")


def test_a_whole_language_model_is_fp32_whatever_is_frozen(bases):
    model = VisionLanguageModel.from_pretrained(
        *bases, dtype=torch.bfloat16, device="cpu", trainable=True, train_only="all"
    )
    assert {parameter.dtype for parameter in model.language_model.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in model.vision_tower.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in model.vision_tower.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_equals_never_stopped(command, runs, kind, tmp_path):
    shutil.copytree(runs[kind] / "checkpoint-2", tmp_path / "checkpoint-2")
    again = [*command, "--train_only", kind, "--output_dir", str(tmp_path), "--resume_from_checkpoint", "auto"]
    assert train.main(again) == 0
    assert losses(tmp_path / "checkpoint-6") == losses(runs[kind] / "checkpoint-6")
    ours, theirs = weights(tmp_path), weights(runs[kind])
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# ---- Files


def test_files_of_a_projector(runs):
    run = runs["projector"]
    assert {path.name for path in run.iterdir() if path.is_file()} == PROJECTOR_FILES | RUN_FILES
    assert json.loads((run / "multimodal_config.json").read_text())["train_only"] == "projector"
    checkpoint = read_checkpoint(run)
    assert checkpoint.lora_config is None
    assert checkpoint.train_only == "projector"


def test_files_of_a_whole_model_are_a_base_model(runs, bases, family):
    run = runs["all"]
    inside = run / "language_model"
    sums = json.loads((run / "checksums.json").read_text())
    assert {path.name for path in run.iterdir() if path.is_file()} == PROJECTOR_FILES | RUN_FILES
    assert {f"language_model/{path.name}" for path in inside.iterdir()} | PROJECTOR_FILES == {*sums, "checksums.json"}
    base = Path(bases[0])
    for name in ("generation_config.json", "tokenizer_config.json"):
        assert (inside / name).read_bytes() == (base / name).read_bytes()
    before, after = (json.loads((path / "config.json").read_text()) for path in (base, inside))
    assert {**before, "dtype": None} == {**after, "dtype": None}
    stored = load_file(inside / "model.safetensors")
    assert stored.keys() == load_file(base / "model.safetensors").keys()
    assert {value.dtype for value in stored.values()} == {torch.float32}
    if family == "qwen3":  # tied: one matrix in the file and in memory
        assert "lm_head.weight" not in stored
        loaded = AutoModelForCausalLM.from_pretrained(inside)
        assert torch.equal(loaded.lm_head.weight, stored["model.embed_tokens.weight"])
        model = VisionLanguageModel.from_pretrained(model_weights=run, device="cpu", trainable=True)
        assert model.qwen.get_output_embeddings().weight is model.qwen.get_input_embeddings().weight
    read = VisionLanguageModel.from_pretrained(str(inside), bases[1], device="cpu").get_input_embeddings().weight
    assert any(torch.equal(read, value) for value in stored.values())


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_loaded_as_it_was_saved(runs, bases, kind, tmp_path):
    model = VisionLanguageModel.from_pretrained(model_weights=runs[kind], device="cpu")
    assert model.train_only == kind
    assert not model.has_lora
    model.save_checkpoint(tmp_path)
    ours, theirs = weights(tmp_path), weights(runs[kind])
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    "name", ["projector.safetensors", "language_model/model.safetensors", "language_model/new.json"]
)
def test_a_changed_file_is_noticed(runs, tmp_path, name):
    shutil.copytree(runs["all"] / "checkpoint-2", tmp_path / "copy")
    file = tmp_path / "copy" / name
    content = bytearray(file.read_bytes() if file.exists() else b"{}")
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        read_checkpoint(tmp_path / "copy")


def test_a_language_model_elsewhere_is_not_read(runs, tmp_path):
    shutil.copytree(runs["all"] / "checkpoint-2", tmp_path / "copy")
    (tmp_path / "copy/language_model").rename(tmp_path / "elsewhere")
    (tmp_path / "copy/language_model").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"language_model/.*link that leads out"):
        read_checkpoint(tmp_path / "copy")


@pytest.mark.parametrize("kind", [*KINDS, "passes for projector"])
def test_no_version_wrote_one_without_checksums(runs, caplog, tmp_path, kind):
    shutil.copytree(runs[kind if kind in KINDS else "all"] / "checkpoint-2", tmp_path / "copy")
    (tmp_path / "copy/checksums.json").unlink()
    config = tmp_path / "copy/multimodal_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "train_only": kind.split()[-1]}))
    with pytest.raises(CheckpointError, match=r"checksums\.json: missing"):
        read_checkpoint(tmp_path / "copy")
    assert "older versions" not in caplog.text


def test_a_cut_language_model_is_one_line(runs, folder, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(runs["all"] / "checkpoint-2", copy)
    file = copy / "language_model/model.safetensors"
    file.write_bytes(file.read_bytes()[:2000])
    write_checksums(copy, ["language_model/model.safetensors"])  # as a stranger would
    ask = ["--image_path", str(folder / "pictures/red.png"), "--prompt", "What colour?", "--device", "cpu"]
    assert load_test_py().main(["--model_weights", str(copy), *ask]) == 2
    assert str(copy / "language_model") in one_line_error(capsys.readouterr().err, "test.py")
    with pytest.raises(CheckpointError, match=r"language_model/model\.safetensors: can't be read"):
        read_sources(copy, None, None, None)


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_file_makes_it_no_checkpoint(runs, tmp_path, kind):
    needed = PROJECTOR_FILES - {"checksums.json"} | ({"language_model"} if kind == "all" else set())
    for name in needed:
        run = tmp_path / name
        for step in (2, 4):
            shutil.copytree(runs[kind] / f"checkpoint-{step}", run / f"checkpoint-{step}")
        gone = run / "checkpoint-4" / name
        shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
        assert read_checkpoint(run).folder.name == "checkpoint-2"


def test_the_files_of_another_kind_do_not_stay(runs, bases, tmp_path):
    shutil.copytree(runs["all"] / "checkpoint-2", tmp_path / "run")
    model = VisionLanguageModel.from_pretrained(*bases, device="cpu", trainable=True)
    model.add_lora(LoraSettings(rank=2, target_modules=None))
    model.save_checkpoint(tmp_path / "run")
    assert read_checkpoint(tmp_path / "run").train_only == "lora"
    assert not (tmp_path / "run/language_model").exists()
    with pytest.raises(CheckpointError, match="train_only all"):
        model.load_checkpoint(runs["all"])


# ---- Runs


@only_qwen3
def test_checkpointing_overwriting_and_few_checkpoints(command, runs, tmp_path):
    shutil.copytree(runs["projector"], tmp_path / "run")
    flags = ["--previous_lora_weights", str(runs["projector"]), "--train_only", "all", "--save_total_limit", "1"]
    flags += ["--gradient_checkpointing", "true", "--overwrite_output_dir", "true"]
    assert train.main([*command, *flags, "--output_dir", str(tmp_path / "run")]) == 0
    assert losses(tmp_path / "run/checkpoint-6") == pytest.approx(losses(runs["all"] / "checkpoint-6"), abs=1e-5)
    names = {"checkpoint-6", "language_model", *RUN_FILES, *PROJECTOR_FILES}
    assert {path.name for path in (tmp_path / "run").iterdir()} == names


@only_qwen3
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_as_one(command, runs, kind, tmp_path):
    """Of some steps one process sees no image."""
    flags = ["--train_only", kind, "--per_device_train_batch_size", "2", "--output_dir", tmp_path]
    if kind == "all":
        flags += ["--previous_lora_weights", runs["projector"]]
    done = start("torchrun", "--standalone", "--nproc_per_node=2", "train.py", *command, *flags)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "checkpoint-6") == pytest.approx(losses(runs[kind] / "checkpoint-6"), abs=1e-4)
    ours, theirs = weights(tmp_path), weights(runs[kind])
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_dry_run_tells_the_parameters_of_the_run(command, runs, kind, tmp_path, capsys):
    flags = ["--train_only", kind, "--output_dir", str(tmp_path / "run"), "--dry_run"]
    assert train.main([*command, *flags]) == 0
    trained = sum(value.numel() for value in weights(runs[kind]).values())
    assert f" {trained:,} " in capsys.readouterr().out
    again = ["--previous_lora_weights", str(runs["all"]), *flags]
    assert train.main([*command, *again]) == 0


def refused(capsys, *flags: object) -> str:
    assert train.main([str(flag) for flag in flags]) == 2
    return one_line_error(capsys.readouterr().err, "train.py")


@only_qwen3
def test_what_does_not_go_together_is_refused(command, runs, tmp_path, capsys):
    new = [*command, "--output_dir", tmp_path / "new"]
    said = refused(capsys, *new, "--train_only", "all", "--lora_rank", "4", "--lora_dropout", "0.2")
    assert "--lora_rank and --lora_dropout" in said
    assert "'half'" in refused(capsys, *new, "--train_only", "half")
    lora = tmp_path / "lora"
    assert train.main([*command, "--max_steps", "1", "--output_dir", str(lora)]) == 0
    assert "holds LoRA" in refused(capsys, *new, "--train_only", "all", "--previous_lora_weights", lora)
    previous = ["--previous_lora_weights", runs["projector"]]
    assert "trained with 1" in refused(capsys, *new, *previous, "--pixel_shuffle", "2")
    auto = [*command, "--resume_from_checkpoint", "auto"]
    said = refused(capsys, *auto, "--output_dir", lora, "--train_only", "all")
    assert "train_only was 'lora' and is now 'all'" in said
    shutil.copytree(runs["projector"], tmp_path / "run")
    said = refused(capsys, *auto, "--output_dir", tmp_path / "run", "--train_only", "all")
    assert "train_only was 'projector' and is now 'all'" in said
    said = refused(capsys, *auto, "--output_dir", tmp_path / "run")
    assert "train_only was 'projector' and is now 'lora'" in said
    assert "None" not in said


@only_qwen3
def test_a_language_model_that_a_run_needs_is_not_overwritten(command, runs, tmp_path, capsys):
    shutil.copytree(runs["all"], tmp_path / "run")
    flags = ["--previous_lora_weights", tmp_path / "run", "--overwrite_output_dir", "true", "--max_steps", "1"]
    for kind in ([], ["--train_only", "all"]):
        assert "can't be overwritten" in refused(capsys, *command, *flags, *kind, "--output_dir", tmp_path / "run")
    assert read_checkpoint(tmp_path / "run").folder.name == "checkpoint-6"


def test_another_language_model_is_refused(runs, bases, family, tmp_path, qwen_tiktoken):
    """A copy of the one that training started from is not."""
    shutil.copytree(bases[0], tmp_path / "copy")
    for same in (tmp_path / "copy", runs["all"] / "checkpoint-6/language_model"):
        VisionLanguageModel.from_pretrained(str(same), model_weights=runs["all"], device="cpu")
    if family == "qwen":
        other = make_language_model(tmp_path / "other", qwen_tiktoken, seed=1)
    else:
        other = make_family(tmp_path / "other", family, seed=1, tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match=r"--base_language_model .*other"):
        VisionLanguageModel.from_pretrained(other, model_weights=runs["all"], device="cpu")


# ---- What may follow


def test_lora_from_a_projector(command, runs, tmp_path):
    still = ["--learning_rate", "0", "--feature_proj_lr", "0", "--lora_rank", "3", "--lora_alpha", "5"]
    flags = [*still, "--lora_dropout", "0", "--previous_lora_weights", str(runs["projector"])]
    assert train.main([*command, *flags, "--output_dir", str(tmp_path), "--max_steps", "1"]) == 0
    checkpoint = read_checkpoint(tmp_path)
    assert (checkpoint.train_only, checkpoint.lora_config.r, checkpoint.lora_config.lora_alpha) == ("lora", 3, 5)
    ours, theirs = (load_file(run / "projector.safetensors") for run in (tmp_path, runs["projector"]))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_flag_the_base_is_the_checkpoints(command, bases, runs, kind, tmp_path, capsys):
    rest = command[2:]
    assert command[:2] == ["--base_language_model", bases[0]]
    flags = ["--previous_lora_weights", str(runs[kind]), "--train_only", "projector", "--max_steps", "1"]
    assert train.main([*rest, *flags, "--output_dir", str(tmp_path), "--dry_run"]) == 0
    assert train.main([*rest, *flags, "--output_dir", str(tmp_path)]) == 0
    expected = str(runs[kind] / "checkpoint-6/language_model") if kind == "all" else bases[0]
    assert read_checkpoint(tmp_path).config.base_language_model == expected
    config = json.loads((tmp_path / "train_config.json").read_text())
    assert config["model"]["base_language_model"] == expected


@only_qwen3
def test_without_a_flag_and_earlier_weights_the_base_is_the_published_one(command, tmp_path, capsys):
    for dry in ([], ["--dry_run"]):
        said = refused(capsys, *command[2:], "--max_steps", "1", "--output_dir", tmp_path, *dry)
        assert "'Qwen/Qwen-7B-Chat': no local folder" in said


def test_lora_from_a_whole_model(command, runs, bases, tmp_path):
    flags = ["--previous_lora_weights", str(runs["all"]), "--lora_rank", "3", "--max_steps", "1"]
    assert train.main([*command, *flags, "--output_dir", str(tmp_path)]) == 0
    checkpoint = read_checkpoint(tmp_path)
    assert checkpoint.config.base_language_model == str(runs["all"] / "checkpoint-6/language_model")
    assert losses(tmp_path / "checkpoint-1")[0] < losses(runs["all"] / "checkpoint-6")[0]
    VisionLanguageModel.from_pretrained(model_weights=tmp_path, device="cpu").merge_lora()
    with pytest.raises(CheckpointError, match="base_language_model"):
        VisionLanguageModel.from_pretrained(bases[0], model_weights=tmp_path, device="cpu")


@pytest.mark.parametrize("kind", KINDS)
def test_asking(runs, bases, folder, kind, tmp_path, capsys):
    ask = ["--device", "cpu", "--greedy", "--max_new_tokens", "4"]
    one = ["--image_path", str(folder / "pictures/red.png"), "--prompt", "What colour?"]
    assert load_test_py().main(["--model_weights", str(runs[kind]), *ask, *one]) == 0
    answer = capsys.readouterr().out
    named = ["--base_language_model", bases[0], "--base_value_model", bases[1]]
    assert load_test_py().main(["--model_weights", str(runs[kind]), *named, *ask, *one]) == 0
    assert capsys.readouterr().out == answer
    line = json.dumps({"id": 1, "image": str(folder / "pictures/red.png"), "prompt": "What colour?"})
    (tmp_path / "questions.jsonl").write_text(line + "\n")
    batch = ["--batch", str(tmp_path / "questions.jsonl"), "--output", str(tmp_path / "answers.jsonl")]
    assert load_test_py().main(["--model_weights", str(runs[kind]), *ask, *batch]) == 0
    assert json.loads((tmp_path / "answers.jsonl").read_text())["answer"] == answer.rstrip("\n")
