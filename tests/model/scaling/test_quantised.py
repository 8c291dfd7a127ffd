"""A language model in 4 or 8 bits: what it computes, what is trained, and that its adapters fit the plain one."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from stopped_runs import KillAt, Killed, assert_same_end, logged, new_trainer
from tiny_families import make_family
from tiny_run import MIXED_CAPTIONS, ROOT, load_test_py, losses, one_line_error, start, trained_weights, write_data
from tiny_towers import make_clip_checkpoint
from tiny_vlm import (
    RANK,
    collate,
    enliven_trained,
    logits_of,
    make_language_model,
    sample,
    trainable_parameters,
)
from torch.testing import assert_close

import train
from benchmarks.training import quantised_table
from benchmarks.training.memory import parse_memory
from model import LoraSettings, VisionLanguageModel
from model.checkpoints.base_models import load_language_model, read_language_config
from model.dry_run.planned_model import model_shape
from model.runs.callbacks import parameter_counts
from qwen import IMAGE_TOKEN_ID
from visual import read_tower_shape

bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes, which `sh tests/run.sh` installs")

KINDS = ("4bit", "8bit")
WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
WIDE_QWEN = {"hidden_size": 64, "kv_channels": 32, "intermediate_size": 256}
QUICK = [
    *("--learning_rate", "5e-3", "--feature_proj_lr", "1e-2", "--use_cpu", "true", "--report_to", "none"),
    *("--disable_tqdm", "true", "--logging_steps", "1", "--num_train_epochs", "2", "--save_steps", "2"),
    *("--per_device_train_batch_size", "4"),
]
LORA = ["--lora_rank", "4", "--lora_dropout", "0.2"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    return make_clip_checkpoint(tmp_path_factory.mktemp("tower") / "clip")


@pytest.fixture(scope="module", params=["qwen", "qwen2", "llama"])
def base(request, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("base") / request.param
    if request.param == "qwen":
        return make_language_model(folder, **WIDE_QWEN)
    return make_family(folder, request.param, tie_word_embeddings=request.param == "qwen2", **WIDE)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> str:
    return make_language_model(tmp_path_factory.mktemp("base") / "qwen", **WIDE_QWEN)


def new_model(base: str, clip: str, kind: str | None, *, dtype=torch.float32, dropout: float = 0.0, seed: int = 0):
    """A model ready for training, whose LoRA and projector make a difference."""
    model = VisionLanguageModel.from_pretrained(
        base, clip, dtype=dtype, device="cpu", trainable=True, quantisation=kind
    )
    model.add_lora(LoraSettings(rank=RANK, alpha=8, dropout=dropout, target_modules=None))
    return enliven_trained(model, seed)


def quantise_and_back(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """What a layer computes with, by bitsandbytes' own functions and none of ours."""
    functions = bitsandbytes.functional
    if kind == "4bit":
        packed, state = functions.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
        return functions.dequantize_4bit(packed, state)
    rows, scales, _ = functions.int8_vectorwise_quant(weight.half())
    return functions.int8_vectorwise_dequant(rows, scales).to(weight.dtype)


def dequantised_copy(base: str, folder: Path, kind: str) -> str:
    """A plain model in whose files the weights of the blocks are what the quantised one computes with."""
    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        inside = (".h." in name or ".layers." in name) and tensor.dim() == 2
        tensors[name] = quantise_and_back(tensor, kind) if inside else tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def batch_for(model: VisionLanguageModel) -> dict[str, torch.Tensor]:
    """Three rows with one image, two or none, in the model's own vocabulary."""
    batch = collate(sample(1), sample(2, seed=1), sample(0, seed=2))
    is_image = batch["input_ids"] == IMAGE_TOKEN_ID
    ids = batch["input_ids"].clamp(max=model.qwen.config.vocab_size - 1)
    return {**batch, "input_ids": ids.masked_fill(is_image, model.qwen.image_token_id)}


# ---- What it computes


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_are_those_of_the_dequantised_weights(base, clip, tmp_path, kind):
    ours = new_model(base, clip, kind)
    plain = new_model(dequantised_copy(base, tmp_path / "plain", kind), clip, None)
    batch = batch_for(ours)
    found = []
    for model in (ours, plain):
        out = model.train()(**batch)
        out.loss.backward()
        found.append((out.logits, {name: p.grad for name, p in trainable_parameters(model).items()}))
    assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-4)
    assert found[0][1].keys() == found[1][1].keys()
    for name, grad in found[0][1].items():
        assert_close(grad, found[1][1][name], rtol=1e-3, atol=1e-4 * float(grad.abs().max()))
    if kind == "4bit":  # LLM.int8 rounds inputs too when it answers
        assert_close(logits_of(ours, batch), logits_of(plain, batch), rtol=1e-4, atol=1e-4)
    else:
        error = logits_of(ours, batch) - logits_of(plain, batch)
        assert error.norm() < 0.05 * logits_of(plain, batch).norm()


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_quantised_and_near_the_whole_model(base, clip, kind):
    ours, whole = new_model(base, clip, kind), new_model(base, clip, None)
    head, table = ours.qwen.get_output_embeddings(), ours.get_input_embeddings()
    classes = {type(m).__name__ for m in ours.qwen.modules() if isinstance(m, torch.nn.Linear) and m is not head}
    assert {"4bit": "Linear4bit", "8bit": "Linear8bitLt"}[kind] in classes
    assert classes <= {"Linear4bit", "Linear8bitLt", "Linear"}  # LoRA's own are plain
    for part in (head, table, ours.vision_tower, ours.projector):
        assert all(parameter.dtype == torch.float32 for parameter in part.parameters())
    batch = batch_for(ours)
    expected = logits_of(whole, batch)
    error = float((logits_of(ours, batch) - expected).norm() / expected.norm())
    assert 1e-4 < error < {"4bit": 0.6, "8bit": 0.1}[kind]  # random weights, as lively as these, suffer most


@pytest.mark.parametrize("kind", KINDS)
def test_an_evaluation_between_two_steps_changes_nothing(qwen, clip, kind):
    """bitsandbytes' kernel for some CPUs repacks weights in `eval()`, and training would fail or lose gradients."""
    model = new_model(qwen, clip, kind)
    batch = batch_for(model)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model.train()(**batch, return_logits=False).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in trainable_parameters(model).items()}

    before = gradients()
    with torch.no_grad():
        model.eval()(**batch)
    model.generate(batch["input_ids"][:1, :5], max_new_tokens=2)
    after = gradients()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(grad.abs().sum() > 0 for grad in before.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_only_where_they_should_be_also_with_checkpointing(base, clip, kind, dtype):
    found = []
    for checkpointing in (False, True):
        model = new_model(base, clip, kind, dtype=dtype).train()
        if checkpointing:
            model.gradient_checkpointing_enable()  # by the name that all supported versions have
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            model(**batch_for(model), return_logits=False).loss.backward()
        have = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert have.keys() == {n for n, _ in model.named_parameters() if "lora_" in n or n.startswith("projector.")}
        assert {grad.dtype for grad in have.values()} == {torch.float32}  # of fp32 masters, whatever the base is
        assert all(grad.abs().sum() > 0 for name, grad in have.items() if "k_proj" not in name)
        found.append(have)
    for name, grad in found[0].items():
        assert_close(found[1][name], grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_merging_dequantises_and_adds_the_update(qwen, clip, tmp_path, kind):
    """The layers under LoRA are then what they compute with, LoRA included; the others stay in their bits."""
    model = VisionLanguageModel.from_pretrained(qwen, clip, device="cpu", dtype=torch.float32, quantisation=kind)
    model.add_lora(LoraSettings(rank=RANK, alpha=8, dropout=0.0, target_modules=("c_attn", "w1")))
    enliven_trained(model)
    layer = model.qwen.transformer.h[1].attn.c_attn
    A, B = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
    stored = load_file(Path(qwen) / "model.safetensors")["transformer.h.1.attn.c_attn.weight"]
    expected = quantise_and_back(stored, kind) + 2.0 * (B @ A)
    batch = batch_for(model)
    before = logits_of(model, batch)
    model.merge_lora()
    assert not model.has_lora
    assert_close(model.qwen.transformer.h[1].attn.c_attn.weight, expected, rtol=1e-5, atol=1e-5)
    assert type(model.qwen.transformer.h[1].mlp.w2) is not torch.nn.Linear
    after = logits_of(model, batch)
    assert (after - before).norm() < {"4bit": 1e-5, "8bit": 0.05}[kind] * before.norm()
    model.merge_lora()  # a second time changes nothing
    assert torch.equal(logits_of(model, batch), after)


# ---- Training, stopping and loading


@pytest.mark.parametrize("kind", ["4bit", pytest.param("8bit", marks=pytest.mark.slow)])
def test_losses_are_near_those_of_the_whole_model_and_a_resumed_run_equals_one_never_stopped(
    qwen, clip, tmp_path, kind
):
    bases = (qwen, clip)
    every = {"size": 8, "num_train_epochs": 4, "logging_steps": 1, "save_steps": 3}
    every |= {"eval_strategy": "steps", "eval_steps": 2}
    runs = {}
    for name, quantisation in {"whole": None, "quantised": kind}.items():
        model = new_model(qwen, clip, quantisation, dropout=0.3)
        runs[name] = new_trainer(bases, tmp_path / name, model=model, **every)
        runs[name].train()
    whole, ours = (torch.tensor([entry[2] for entry in logged(run)]) for run in runs.values())
    assert len(ours) == len(whole) == 8
    assert not torch.equal(ours, whole)
    assert (ours - whole).abs().max() < 0.25 * whole.max()
    assert ours[-1] < ours[0]

    with pytest.raises(Killed):
        new_trainer(
            *(bases, tmp_path / "killed"),
            model=new_model(qwen, clip, kind, dropout=0.3),
            callbacks=[KillAt("on_step_begin", 6)],
            **every,
        ).train()
    again = new_trainer(bases, tmp_path / "killed", model=new_model(qwen, clip, kind, dropout=0.3, seed=5), **every)
    torch.manual_seed(99)
    again.train(resume_from_checkpoint=True)
    assert_same_end(again, runs["quantised"])


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, clip, pictures) -> tuple[str, list[str]]:
    """A Llama, and the command line that trains over it."""
    folder = tmp_path_factory.mktemp("inputs")
    base = make_family(folder / "llama", "llama", **WIDE)
    data = write_data(folder / "data", MIXED_CAPTIONS, pictures["red"].parent)
    return base, ["--base_language_model", base, "--base_value_model", clip, *data, *QUICK]


@pytest.fixture(scope="module")
def runs(inputs, tmp_path_factory) -> dict[str, Path]:
    """A run of six steps over the plain model, and one in 4 bits."""
    folder = tmp_path_factory.mktemp("runs")
    for name, flags in {"plain": [], "4bit": ["--load_in_4bit", "true"]}.items():
        assert train.main([*inputs[1], *LORA, *flags, "--output_dir", str(folder / name)]) == 0
    return {name: folder / name for name in ("plain", "4bit")}


def test_a_run_in_4_bits_writes_the_files_of_any_run(runs):
    plain, quantised = (trained_weights(runs[name]) for name in ("plain", "4bit"))
    assert {name: value.shape for name, value in plain.items()} == {n: v.shape for n, v in quantised.items()}
    assert {value.dtype for value in quantised.values()} == {torch.float32}
    for name in ("adapter_config.json", "multimodal_config.json"):
        ours, theirs = (json.loads((runs[run] / name).read_text()) for run in ("plain", "4bit"))
        assert {**ours, "target_modules": None} == {**theirs, "target_modules": None}  # a set: in any order
    assert json.loads((runs["4bit"] / "train_config.json").read_text())["model"]["load_in_4bit"] is True
    step_losses = {name: torch.tensor(losses(run / "checkpoint-6")) for name, run in runs.items()}
    error = (step_losses["4bit"] - step_losses["plain"]).abs()
    assert 0 < error.max() < 0.25 * step_losses["plain"].max()


def test_a_run_in_4_bits_resumes_as_if_never_stopped(inputs, runs, tmp_path):
    shutil.copytree(runs["4bit"] / "checkpoint-2", tmp_path / "checkpoint-2")
    flags = ["--load_in_4bit", "true", "--resume_from_checkpoint", "auto", "--output_dir", str(tmp_path)]
    assert train.main([*inputs[1], *LORA, *flags]) == 0
    assert losses(tmp_path / "checkpoint-6") == losses(runs["4bit"] / "checkpoint-6")
    theirs = trained_weights(runs["4bit"])
    assert all(torch.equal(value, theirs[name]) for name, value in trained_weights(tmp_path).items())


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_as_one(inputs, tmp_path, kind):
    """Each quantises the whole model for itself. AdamW would turn the rounding of gradients near 0 into whole steps."""
    common = [*inputs[1], f"--load_in_{kind}", "true", "--lora_rank", "4", "--lora_dropout", "0", "--optim", "sgd"]
    assert train.main([*common, "--output_dir", str(tmp_path / "one")]) == 0
    half = [*common, "--per_device_train_batch_size", "2", "--output_dir", tmp_path / "two"]
    done = start("torchrun", "--standalone", "--nproc_per_node=2", "train.py", *half)
    assert done.returncode == 0, done.stderr
    one, two = (torch.tensor(losses(tmp_path / name / "checkpoint-6")) for name in ("one", "two"))
    assert_close(two, one, rtol=1e-5, atol=1e-5)
    expected = trained_weights(tmp_path / "one")
    for name, value in trained_weights(tmp_path / "two").items():
        assert_close(value, expected[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("before", "now"), [("4bit", []), ("4bit", ["--load_in_8bit", "true"]), ("plain", ["--load_in_4bit", "true"])]
)
def test_resuming_over_other_weights_is_refused(inputs, runs, tmp_path, capsys, before, now):
    """As it is with another language model; a new run may begin with these weights, over whatever."""
    shutil.copytree(runs[before] / "checkpoint-2", tmp_path / "checkpoint-2")
    common = [*inputs[1], *LORA, *now]
    said = refused([*common, "--resume_from_checkpoint", "auto", "--output_dir", tmp_path], capsys)
    assert all(f"load_in_{kind}" in said for kind in KINDS if kind == before or f"--load_in_{kind}" in now)
    assert "--previous_lora_weights" in said
    weights = ["--previous_lora_weights", tmp_path / "checkpoint-2", "--max_steps", "1"]
    assert train.main([str(word) for word in (*common, *weights, "--output_dir", tmp_path / "new")]) == 0


@pytest.mark.parametrize("trained_in", ["plain", "4bit"])
def test_one_adapter_serves_both(runs, trained_in):
    """It loads over the plain model and over a quantised one, whichever it was trained on, with the same weights."""
    expected = trained_weights(runs[trained_in])
    for kind in (None, *KINDS):
        model = VisionLanguageModel.from_pretrained(model_weights=runs[trained_in], device="cpu", quantisation=kind)
        loaded = {n.replace(".default", ""): p for n, p in model.language_model.named_parameters() if "lora_" in n}
        assert len(loaded) == len([name for name in expected if "lora_" in name]) > 0
        for name, value in loaded.items():
            assert torch.equal(value, expected[name])
        again = VisionLanguageModel.from_pretrained(
            model_weights=runs[trained_in], device="cpu", trainable=True, quantisation=kind
        )
        assert again.fingerprints == model.fingerprints
        assert all(again.fingerprints.values())


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_projector_is_trained_over_a_quantised_model(inputs, clip, tmp_path, kind):
    flags = ["--train_only", "projector", f"--load_in_{kind}", "true", "--output_dir", str(tmp_path)]
    assert train.main([*inputs[1], *flags]) == 0
    run = losses(tmp_path / "checkpoint-6")
    assert run[-1] < run[0]
    assert not (tmp_path / "adapter_config.json").exists()


# ---- Asking


@pytest.fixture
def ask(runs, pictures, capsys):
    program = load_test_py()

    def ask_with(*flags: str, weights: str = "4bit", expected: int = 0) -> str:
        command = ["--model_weights", str(runs[weights]), "--device", "cpu", "--greedy", *flags]
        assert program.main(command) == expected
        said = capsys.readouterr()
        return said.out if expected == 0 else one_line_error(said.err, "test.py")

    return ask_with


def question(pictures) -> list[str]:
    return ["--image_path", str(pictures["red"]), "--prompt", "What colour?"]


def test_asking_in_4_bits_gives_the_tokens_of_the_dequantised_model(ask, runs, inputs, pictures, tmp_path):
    plain = dequantised_copy(inputs[0], tmp_path / "plain", "4bit")
    config = tmp_path / "run/multimodal_config.json"
    shutil.copytree(runs["4bit"], tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*", "checksums.json"))
    known = json.loads(config.read_text())
    config.write_text(json.dumps({**known, "base_language_model": plain, "language_model_fingerprint": ""}))
    quantised = ask(*question(pictures), "--load_in_4bit")
    assert quantised == ask(*question(pictures), "--load_in_4bit")
    program_weights = ["--model_weights", str(tmp_path / "run")]
    assert quantised == ask(*question(pictures), *program_weights)  # the last --model_weights counts
    assert quantised.strip()


def test_answers_of_one_file_are_all_of_one_precision(ask, pictures, tmp_path):
    line = {"id": 1, "image": str(pictures["red"]), "prompt": "What colour?"}
    (tmp_path / "questions.jsonl").write_text(json.dumps(line) + "\n")
    files = ["--batch", str(tmp_path / "questions.jsonl"), "--output", str(tmp_path / "answers.jsonl")]
    ask(*files, "--load_in_8bit")
    assert "answers.jsonl" in ask(*files, expected=2)
    assert json.loads((tmp_path / "answers.jsonl").read_text())["id"] == 1


# ---- What is refused


def refused(argv: list[str], capsys) -> str:
    assert train.main([str(word) for word in argv]) == 2
    return one_line_error(capsys.readouterr().err, "train.py")


@pytest.mark.parametrize("dry", [False, True], ids=["run", "dry run"])
def test_flags_that_do_not_go_together(inputs, tmp_path, capsys, monkeypatch, dry):
    common = [*inputs[1], "--output_dir", tmp_path / "run", *(["--dry_run"] if dry else [])]
    for one, other in (
        ("--load_in_4bit true", "--load_in_8bit true"),
        ("--train_only all", "--load_in_4bit true"),
        ("--shard_model true", "--load_in_8bit true"),
        ("--torch_compile true", "--load_in_4bit true"),
    ):
        said = refused([*common, *one.split(), *other.split()], capsys)
        assert one.removesuffix(" true") in said
        assert other.removesuffix(" true") in said
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert "quantised-requirements.txt" in refused([*common, "--load_in_8bit", "true"], capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("dry", [False, True], ids=["run", "dry run"])
def test_rows_that_share_a_block_are_refused(inputs, clip, tmp_path, capsys, dry):
    """bitsandbytes takes them, and computes something else without an error."""
    base = make_family(tmp_path / "narrow", "llama", **{**WIDE, "intermediate_size": 96})
    flags = [*inputs[1], "--base_language_model", base, "--output_dir", tmp_path / "run"]
    said = refused([*flags, "--load_in_4bit", "true", *(["--dry_run"] if dry else [])], capsys)
    assert "layers.0.mlp.down_proj" in said
    assert "96" in said


def test_asking_refuses_what_training_refuses(ask, pictures, monkeypatch):
    said = ask(*question(pictures), "--load_in_4bit", "--load_in_8bit", expected=2)
    assert "--load_in_4bit" in said
    assert "--load_in_8bit" in said
    monkeypatch.setattr("model.asking.assistant.pick_device", lambda name: torch.device("mps"))
    assert "mps" in ask(*question(pictures), "--load_in_4bit", expected=2)
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert "quantised-requirements.txt" in ask(*question(pictures), "--load_in_8bit", expected=2)


def test_a_base_model_whose_files_are_quantised_is_refused(inputs, tmp_path):
    shutil.copytree(inputs[0], tmp_path / "base")
    config = tmp_path / "base/config.json"
    how = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": how}))
    for kind in (None, "4bit"):
        with pytest.raises(ValueError, match=r"quantised already.*bitsandbytes"):
            load_language_model(str(tmp_path / "base"), torch.float32, quantisation=kind)


# ---- How much memory it takes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="/proc is Linux's")
def test_no_file_of_the_whole_weights_stays_mapped(base, clip, kind):
    """Norms and embedding of the file's own dtype are views of it, and would keep what was quantised in memory."""
    model = VisionLanguageModel.from_pretrained(base, clip, dtype=torch.float32, device="cpu", quantisation=kind)
    assert f"{base}/model.safetensors" not in Path("/proc/self/maps").read_text()
    head, table = model.qwen.get_output_embeddings(), model.get_input_embeddings()
    assert (head.weight is table.weight) == bool(model.qwen.config.tie_word_embeddings)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dry_run_knows_the_bytes_of_the_weights(base, clip, kind, dtype):
    model = VisionLanguageModel.from_pretrained(base, clip, dtype=dtype, device="cpu", quantisation=kind)
    held = {tensor.untyped_storage().data_ptr(): tensor for tensor in [*model.qwen.parameters()]}
    for module in model.qwen.modules():
        scales = (
            [getattr(getattr(module, "state", None), "SCB", None), getattr(module.weight, "SCB", None)]
            if (type(module).__name__ == "Linear8bitLt")
            else []
        )
        if type(module).__name__ == "Linear4bit":
            state = module.weight.quant_state
            scales = [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
        held |= {t.untyped_storage().data_ptr(): t for t in scales if t is not None}
    lora = LoraSettings(rank=RANK, target_modules=None)
    shape = model_shape(read_language_config(base), read_tower_shape(clip), lora, quantisation=kind)
    whole = dtype.itemsize * (shape.language_parameters - shape.quantised_parameters)
    assert shape.quantised_bytes + whole == sum(tensor.nbytes for tensor in held.values())
    assert parameter_counts(model)["language_model"][0] == shape.language_parameters


def test_the_table_of_the_documents_is_printed():
    assert quantised_table.markdown() in (ROOT / "docs/scaling.md").read_text(encoding="utf-8")


def test_the_dry_run_prints_them(inputs, tmp_path, capsys):
    """Of a model that is not there: its configuration and its tokenizer are enough."""
    shutil.copytree(inputs[0], tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    config = tmp_path / "base/config.json"
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "head_dim": 128, "num_attention_heads": 32}
    config.write_text(json.dumps({**json.loads(config.read_text()), **sizes, "num_hidden_layers": 8}))
    found = {}
    for kind in ("", *KINDS):
        flags = [*inputs[1], "--base_language_model", str(tmp_path / "base"), "--output_dir", str(tmp_path / "run")]
        flags += [f"--load_in_{kind}", "true"] if kind else []
        assert train.main([*flags, "--dry_run"]) == 0
        _, _, gpu, _ = parse_memory(capsys.readouterr().out)
        found[kind] = gpu["frozen weights"]
    weights = 8 * 4096 * (2 * 4096 + 2 * 256 + 3 * 11008)
    assert found[""] / 2 == pytest.approx(weights, rel=0.02)
    assert found[""] - found["8bit"] == pytest.approx(weights, rel=0.02)
    assert found[""] - found["4bit"] == pytest.approx(weights * (2 - 0.5 - (1 + 4 / 256) / 64), rel=0.02)
