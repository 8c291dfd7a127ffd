"""A language model spread over CPU and disk gives the tokens that it gives whole; `--device_map` of test.py."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_families import make_family
from tiny_run import load_test_py, one_line_error, write_data
from tiny_towers import make_clip_checkpoint
from tiny_vlm import enliven_trained

import evaluate
import export
import train
from model import LoraSettings, VisionLanguageModel
from model.scaling.offload import place_blocks, read_max_memory, spread

DISK = ["--device_map", "auto", "--max_memory", "cpu=1KB"]
"""Every block on the disk."""


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A checkpoint over a Llama, whose LoRA and projector make a difference."""
    folder = tmp_path_factory.mktemp("llama")
    base = make_family(folder / "llama", "llama", num_hidden_layers=3)
    model = VisionLanguageModel.from_pretrained(base, make_clip_checkpoint(folder / "clip"), device="cpu")
    model.add_lora(LoraSettings(rank=4, alpha=8, dropout=0.0, target_modules=None))
    enliven_trained(model, std=0.4).save_checkpoint(folder / "run")
    return folder / "run"


@pytest.fixture(params=["qwen", "llama"])
def checkpoint(request):
    return request.getfixturevalue("trained" if request.param == "qwen" else "llama")


@pytest.fixture
def ask(capsys, pictures):
    program = load_test_py()

    def ask_with(checkpoint, *flags: object, expected: int = 0) -> str:
        asked = ["--image_path", str(pictures["red"]), "--prompt", "What colour?", "--greedy", "--max_new_tokens", "12"]
        command = ["--model_weights", checkpoint, "--device", "cpu", *asked, *flags]
        assert program.main([str(word) for word in command]) == expected
        said = capsys.readouterr()
        return said.out if expected == 0 else one_line_error(said.err, "test.py")

    return ask_with


def test_the_same_tokens_from_the_disk_and_from_the_memory(ask, checkpoint, tmp_path):
    whole = ask(checkpoint)
    assert whole.strip()
    folder = tmp_path / "offload"
    assert ask(checkpoint, *DISK, "--offload_folder", folder) == whole
    stored = json.loads((folder / "index.json").read_text())
    assert any("lora_A" in name for name in stored)
    assert ask(checkpoint, *DISK) == whole
    assert ask(checkpoint, "--device_map", "auto") == whole
    assert ask(checkpoint, *DISK, "--stream") == whole


def test_a_file_of_questions_is_answered_from_the_disk(llama, pictures, tmp_path):
    """As evaluate.py answers: in batches, from prompts of several lengths, with a picture or without."""
    program = load_test_py()
    lines = [
        {"id": 1, "image": str(pictures["red"]), "prompt": "What colour?"},
        {"id": 2, "image": str(pictures["blue"]), "prompt": "And what colour is the picture that you see here?"},
        {"id": 3, "prompt": "1 + 1?"},
    ]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    answers = []
    for name, flags in {"whole": [], "disk": DISK}.items():
        command = ["--model_weights", str(llama), "--device", "cpu", "--greedy", "--batch_size", "2", *flags]
        command += ["--batch", str(tmp_path / "questions.jsonl"), "--output", str(tmp_path / f"{name}.jsonl")]
        assert program.main(command) == 0
        answers.append((tmp_path / f"{name}.jsonl").read_text())
    assert answers[0] == answers[1]
    assert len(answers[0].splitlines()) == 3


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["--questions", "--image_map"])
def test_evaluate_py_scores_a_model_on_the_disk_as_the_whole_one(checkpoint, pictures, tmp_path, capsys, kind):
    """The same answers and metrics, from questions and from samples, with --blind."""
    prompts = [("red", "What colour?"), ("blue", "And what colour is the picture that you see here?")]
    lines = [{"id": n, "image": str(pictures[c]), "prompt": text} for n, (c, text) in enumerate(prompts)]
    asked = tmp_path / "questions.jsonl"
    asked.write_text("".join(json.dumps({**line, "answers": ["red"]}) + "\n" for line in lines))
    samples = [(f"{colour}.png", (f"<|extra_0|>{text}", colour)) for colour, text in prompts]
    data = write_data(tmp_path / "data", [*samples, (None, ("1 + 1?", "2"))], pictures["red"].parent)
    given = ["--questions", str(asked)] if kind == "--questions" else data
    folder, found = tmp_path / "offload", {}
    for name, flags in {"whole": [], "disk": [*DISK, "--offload_folder", str(folder)]}.items():
        command = ["--model_weights", str(checkpoint), "--device", "cpu", "--max_new_tokens", "6", "--blind", *given]
        assert evaluate.main([*command, *flags, "--output", str(tmp_path / name)]) == 0
        found[name] = json.loads((tmp_path / name / "results.json").read_text())
    assert (folder / "index.json").exists()
    assert (tmp_path / "whole/answers.jsonl").read_text() == (tmp_path / "disk/answers.jsonl").read_text()
    assert found["whole"]["metrics"]
    assert found["disk"]["metrics"] == found["whole"]["metrics"]
    capsys.readouterr()


def test_logits_are_those_of_the_whole_model(checkpoint, tmp_path):
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    whole = VisionLanguageModel.from_pretrained(model_weights=checkpoint, device="cpu")
    spread_out = VisionLanguageModel.from_pretrained(model_weights=checkpoint, device="cpu")
    spread(spread_out, torch.device("cpu"), ["cpu=1KB"], str(tmp_path))
    blocks = [part for part in spread_out.qwen.modules() if type(part).__name__ in ("QWenBlock", "LlamaDecoderLayer")]
    assert len(blocks) > 1
    assert {parameter.device.type for block in blocks for parameter in block.parameters()} == {"meta"}
    assert spread_out.device.type == "cpu"
    with torch.inference_mode():
        found, expected = (model.qwen(input_ids=ids).logits for model in (spread_out, whole))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_blocks_fill_the_devices_in_their_order(llama):
    language = VisionLanguageModel.from_pretrained(model_weights=llama, device="cpu").qwen
    blocks = [f"model.layers.{number}" for number in range(3)]
    size = sum(parameter.nbytes for parameter in language.get_submodule(blocks[0]).parameters())
    others = sum(p.nbytes for p in language.parameters()) - 3 * size
    room = {0: others + size + size // 2 + 10_000, 1: size // 2, "cpu": size + size // 2}
    places = place_blocks(language, blocks, room, 0)
    assert [places[name] for name in blocks] == [0, "cpu", "disk"]
    assert {places[name] for name in places if name not in blocks} == {0}
    named = tuple(f"{name}." for name in places)
    assert all(name.startswith(named) for name, _ in language.named_parameters())


def test_sizes_are_read_or_refused():
    assert read_max_memory(["0=20GiB", "cpu=60GB"]) == {0: 20 * 2**30, "cpu": 60 * 10**9}
    for word in ("20GiB", "gpu=1GB", "cpu=", "cpu=many", "-1=1GB"):
        with pytest.raises(ValueError, match="--max_memory"):
            read_max_memory([word])


def test_flags_that_do_not_go_together(ask, llama, tmp_path, capsys):
    assert "--device_map" in ask(llama, "--max_memory", "cpu=1GB", expected=2)
    assert "--load_in_8bit" in ask(llama, *DISK, "--load_in_8bit", expected=2)
    assert "--max_memory" in ask(llama, "--device_map", "auto", "--max_memory", "cpu", expected=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        assert "torchrun" in ask(llama, *DISK, expected=2)
    files = ["--image_map", "none.json", "--captions_file", "none.json", "--output_dir", str(tmp_path)]
    assert train.main([*files, "--device_map", "auto"]) == 2
    said = one_line_error(capsys.readouterr().err, "train.py")
    assert "--device_map" in said
    assert "--shard_model" in said
    for flag in ("--load_in_4bit", "--load_in_8bit=true"):
        assert export.main(["--model_weights", str(llama), "--output", str(tmp_path / "export"), flag]) == 2
        assert "plain base model" in one_line_error(capsys.readouterr().err, "export.py")
    assert not (tmp_path / "export").exists()
