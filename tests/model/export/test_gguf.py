"""Two GGUF files hold the trained model's weights, and llama.cpp's own server answers from them as our model does."""

from __future__ import annotations

import importlib.util
import signal
import subprocess
import sys
import time

import pytest
import torch
from tiny_qwen import as_qwen2
from tiny_run import ROOT, environment, load_test_py, one_line_error, write_as_the_original
from tiny_towers import make_clip_checkpoint, make_dinov2_checkpoint, make_siglip_checkpoint, make_vit_checkpoint

from dataset.prompt import encode_prompt
from model import VisionLanguageModel
from model.export import gguf_files, gguf_text, llama_server
from model.export.processor_files import chat_template
from model.export.qwen_text import QwenText
from qwen import IMAGE_TOKEN_ID

gguf = pytest.importorskip("gguf", reason="--format gguf writes with it")
needs_llama_cpp = pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp is not installed")
SUFFIXES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
ask = load_test_py()


def read(file) -> tuple[dict[str, object], dict[str, torch.Tensor], dict[str, str]]:
    """Metadata, tensors in fp32 and the types that they are stored in, by gguf's own reader."""
    reader = gguf.GGUFReader(file)
    values = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {
        one.name: torch.tensor(gguf.dequantize(one.data, one.tensor_type)).reshape(tuple(one.shape.tolist())[::-1])
        for one in reader.tensors
    }
    return values, tensors, {one.name: one.tensor_type.name for one in reader.tensors}


def names_of_gguf(tensors: dict[str, torch.Tensor], arch, layers: int) -> dict[str, torch.Tensor]:
    """Rename transformers' tensors by the table of the gguf package."""
    table = gguf.get_tensor_name_map(arch, layers)
    return {table.get_name(name, (".weight", ".bias")): value for name, value in tensors.items()}


# ---- The files


@pytest.mark.parametrize("dtype", SUFFIXES, ids=SUFFIXES.values())
def test_the_files_hold_the_merged_weights(export, make_checkpoint, dtype):
    checkpoint = make_checkpoint(make_siglip_checkpoint, dtype=dtype)
    folder = export(checkpoint, "--format", "gguf")
    suffix = SUFFIXES[dtype]
    assert {path.name for path in folder.iterdir()} == {f"model-{suffix}.gguf", f"mmproj-{suffix}.gguf", "EXPORT.md"}

    ours = VisionLanguageModel.from_pretrained(model_weights=checkpoint, dtype=dtype, device="cpu")
    ours.merge_lora()
    ours.projector.to(dtype)
    ours.float()
    twin = as_qwen2(ours.qwen)
    _, tensors, kinds = read(folder / f"model-{suffix}.gguf")
    expected = names_of_gguf(twin.state_dict(), gguf.MODEL_ARCH.QWEN2, 2)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], value) for name, value in expected.items())
    assert {name: kind for name, kind in kinds.items() if kind != suffix.upper()} == (
        {} if suffix == "f32" else {name: "F32" for name, value in expected.items() if value.dim() == 1}
    )

    _, tensors, kinds = read(folder / f"mmproj-{suffix}.gguf")
    tower = {f"vision_tower.vision_model.{name}": value for name, value in vision_weights(ours).items()}
    expected = names_of_gguf(tower, gguf.MODEL_ARCH.MMPROJ, 2)
    expected |= {f"mm.{name}": value for name, value in ours.projector.state_dict().items()}
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], value) for name, value in expected.items())
    wide = {name for name, value in expected.items() if value.dim() != 2} | {"v.position_embd.weight"}
    assert {name for name, kind in kinds.items() if kind == "F32"} == (wide if suffix != "f32" else kinds.keys())


def vision_weights(model: VisionLanguageModel) -> dict[str, torch.Tensor]:
    [module] = [child for child in model.vision_tower.modules() if type(child).__name__ == "SiglipVisionModel"]
    return {name.removeprefix("vision_model."): value for name, value in module.state_dict().items()}


def test_the_metadata_says_what_llama_cpp_needs(export, make_checkpoint, tokenizer):
    language = {"num_hidden_layers": 3, "rotary_emb_base": 50000.0, "layer_norm_epsilon": 1e-5}
    vision = {"num_hidden_layers": 1, "image_size": 42, "intermediate_size": 50, "hidden_act": "quick_gelu"}
    checkpoint = make_checkpoint(make_siglip_checkpoint, vision, **language)
    folder = export(checkpoint, "--format", "gguf", "--dtype", "bfloat16")
    values, _, _ = read(folder / "model-bf16.gguf")
    expected = {
        "general.architecture": "qwen2",
        "qwen2.block_count": 3,
        "qwen2.context_length": 512,
        "qwen2.embedding_length": 16,
        "qwen2.feed_forward_length": 24,
        "qwen2.attention.head_count": 2,
        "qwen2.attention.head_count_kv": 2,
        "qwen2.attention.key_length": 8,
        "qwen2.attention.value_length": 8,
        "qwen2.rope.dimension_count": 8,
        "qwen2.rope.freq_base": 50000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.eos_token_id": 151643,
        "tokenizer.ggml.eot_token_id": 151645,
        "tokenizer.ggml.eom_token_id": 151644,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": chat_template(),
        # as in the base model's generation_config.json
        "general.sampling.temp": 1.0,
        "general.sampling.top_k": 0,
        "general.sampling.min_p": 0.0,
    }
    assert {name: values[name] for name in expected} == expected
    assert values["general.sampling.top_p"] == pytest.approx(0.8)
    assert values["qwen2.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    tokens, kinds = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    assert len(tokens) == len(set(tokens)) == len(kinds) == 151936
    assert tokens[151643:151647] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|extra_0|>"]
    assert (kinds[151642], kinds[151643], kinds[151850], kinds[151851]) == (1, 3, 3, 5)

    values, _, _ = read(folder / "mmproj-bf16.gguf")
    expected = {
        "general.architecture": "clip",
        "general.type": "mmproj",
        "clip.has_vision_encoder": True,
        "clip.projector_type": "mlp",
        "clip.use_gelu": False,
        "clip.vision.image_size": 42,
        "clip.vision.patch_size": 14,
        "clip.vision.embedding_length": 32,
        "clip.vision.feed_forward_length": 50,
        "clip.vision.projection_dim": 16,
        "clip.vision.block_count": 1,
        "clip.vision.attention.head_count": 4,
        "clip.vision.feature_layer": [1],
        "clip.vision.image_mean": [0.5] * 3,
        "clip.vision.image_std": [0.5] * 3,
    }
    assert {name: values[name] for name in expected} == expected


def test_a_base_that_does_not_sample_is_greedy(export, make_checkpoint):
    generation = {"do_sample": False, "repetition_penalty": 1.1}
    checkpoint = make_checkpoint(make_siglip_checkpoint, generation=generation)
    values, _, _ = read(export(checkpoint, "--format", "gguf") / "model-f32.gguf")
    assert values["general.sampling.temp"] == 0
    assert values["general.sampling.penalty_repeat"] == pytest.approx(1.1)


def test_a_tied_head_with_lora_is_written_out(export, make_checkpoint):
    checkpoint = make_checkpoint(make_siglip_checkpoint, targets=("c_attn", "lm_head"), tie_word_embeddings=True)
    _, tensors, _ = read(export(checkpoint, "--format", "gguf") / "model-f32.gguf")
    ours = VisionLanguageModel.from_pretrained(model_weights=checkpoint, device="cpu")
    ours.merge_lora()
    assert torch.equal(tensors["output.weight"], ours.qwen.lm_head.weight)
    assert not torch.equal(tensors["output.weight"], tensors["token_embd.weight"])


# ---- What cannot be expressed


@pytest.mark.parametrize(
    ("make_tower", "vision", "changes", "reason"),
    [
        (make_clip_checkpoint, {}, {}, "ggml-org/llama.cpp/issues/25814"),
        (make_dinov2_checkpoint, {}, {}, "the tower is dinov2"),
        (make_vit_checkpoint, {}, {}, "the tower is vit"),
        (make_siglip_checkpoint, {"hidden_act": "relu"}, {}, "hidden_act is 'relu'"),
        (make_siglip_checkpoint, {}, {"num_attention_heads": 3}, "24"),
        (make_siglip_checkpoint, {}, {"seq_length": 67}, "68 tokens or more"),
        (make_siglip_checkpoint, {"image_size": 84}, {"pixel_shuffle": 3}, "pixel_shuffle"),
    ],
    ids=["clip", "dinov2", "vit", "activation", "heads", "length", "pixel shuffle"],
)
def test_what_llama_cpp_cannot_express_is_refused(export, make_checkpoint, capfd, make_tower, vision, changes, reason):
    checkpoint = make_checkpoint(make_tower, vision, **changes)
    folder = export(checkpoint, "--format", "gguf", status=2)
    message = one_line_error(capfd.readouterr().err, "export.py")
    assert reason in message
    assert message.endswith("--format merged can")
    assert not folder.exists()
    assert not folder.with_name("out.unfinished-export").exists()


def test_a_dropped_patch_is_refused(export, make_checkpoint, tmp_path, capfd):
    checkpoint = make_checkpoint(make_siglip_checkpoint)
    original = write_as_the_original(checkpoint, tmp_path / "original")
    bases = ("--base_language_model", checkpoint.parent / "qwen", "--base_value_model", checkpoint.parent / "tower")
    export(original, *bases, "--format", "gguf", status=2)
    assert "first patch" in one_line_error(capfd.readouterr().err, "export.py")


def without(monkeypatch, package: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest))


def test_without_the_package_nothing_is_written(export, make_checkpoint, monkeypatch, capfd, tmp_path):
    checkpoint = make_checkpoint(make_siglip_checkpoint)
    without(monkeypatch, "gguf")
    export(checkpoint, "--format", "gguf", status=2)
    assert "pip install gguf" in one_line_error(capfd.readouterr().err, "export.py")
    assert list(tmp_path.iterdir()) == []


def test_without_llama_cpp_the_export_says_that_it_was_not_compared(export, make_checkpoint, monkeypatch, capfd):
    checkpoint = make_checkpoint(make_siglip_checkpoint)
    without(monkeypatch, "xllamacpp")
    folder = export(checkpoint, "--format", "gguf", verify=True)
    said = "Not compared with the model that was trained: llama.cpp's server is not installed: pip install xllamacpp"
    assert said in (folder / "EXPORT.md").read_text(encoding="utf-8")
    assert said in capfd.readouterr().err


def test_what_is_stopped_has_no_name(export, make_checkpoint, monkeypatch, capfd):
    def full(sources):
        raise OSError(28, "No space left on device")

    checkpoint = make_checkpoint(make_siglip_checkpoint)
    with monkeypatch.context() as patch:
        patch.setattr(gguf_files, "tower_weights", full)
        folder = export(checkpoint, "--format", "gguf", status=2)
    assert "No space left" in one_line_error(capfd.readouterr().err, "export.py")
    assert not [path.name for path in folder.parent.iterdir() if "out" in path.name]
    folder.with_name("out.unfinished-export").mkdir()  # as a process that was killed leaves it
    folder.with_name("out.unfinished-export").joinpath("model-f16.gguf").write_bytes(b"half")
    export(checkpoint, "--format", "gguf")
    assert sorted(path.name for path in folder.glob("*.gguf")) == ["mmproj-f32.gguf", "model-f32.gguf"]


# ---- llama.cpp's server


@needs_llama_cpp
def test_the_server_answers_as_test_py(export, make_checkpoint, tokenizer, tmp_path, capsys):
    """Pictures of another size, Chinese, none at all: the same greedy text over HTTP; and prompts of other shapes."""
    checkpoint = make_checkpoint(make_siglip_checkpoint)
    folder = export(checkpoint, "--format", "gguf")
    picture = llama_server.sample_picture(56)  # not the tower's size
    picture.save(tmp_path / "picture.png")
    with llama_server.serving(folder / "model-f32.gguf", folder / "mmproj-f32.gguf", 256) as server:
        for question, image in (("这幅图像描述了什么？", picture), ("Colour?", picture), ("你好", None)):
            flags = [] if image is None else ["--image_path", str(tmp_path / "picture.png")]
            capsys.readouterr()
            assert ask.main(["--model_weights", str(checkpoint), "--prompt", question, "--greedy", *flags]) == 0
            expected = capsys.readouterr().out.removesuffix("\n")
            reply = server.post(
                "/v1/chat/completions",
                messages=llama_server._messages(question, image),
                **{"temperature": 0, "max_tokens": 8},
            )
            assert reply["choices"][0]["message"]["content"] == expected
        for messages, kwargs, query in conversations(picture):
            theirs = llama_server._ask(server, messages, [IMAGE_TOKEN_ID] * 4, [])
            assert theirs.prompt == encode_prompt(tokenizer, query, 4, **kwargs)[0]
            assert theirs.num_prompt_tokens == len(theirs.prompt)
        for text in ("é à 한국어 🙂🙃 नमस्ते مرحبا", "  two  spaces\n\n\ttab", "1234567 ½ don't I'LL", "<b>x</b>\r\n"):
            found = server.post("/tokenize", content=text, add_special=False)["tokens"]
            assert found == tokenizer.encode_text(text), text


def conversations(picture):
    """Messages as clients send them, and the same as `encode_prompt` takes it."""
    [message] = llama_server._messages("What?", picture)
    image, text = message["content"]
    after = {"type": "text", "text": "Which?"}
    yield [{"role": "system", "content": "Be brief."}, message], {"system": "Be brief."}, "<|extra_0|>What?"
    yield [{"role": "user", "content": [text, image, image, after]}], {}, "What?<|extra_0|><|extra_0|>Which?"
    history = [("<|extra_0|>What?", "红色。")]
    turns = [message, {"role": "assistant", "content": "红色。"}, {"role": "user", "content": "为什么？"}]
    yield turns, {"history": history}, "为什么？"


@needs_llama_cpp
@pytest.mark.slow
@pytest.mark.parametrize(
    ("vision", "language", "dtype"),
    [
        ({}, {}, torch.float16),
        ({}, {}, torch.bfloat16),
        ({"hidden_act": "quick_gelu", "num_hidden_layers": 1}, {"kv_channels": 32, "hidden_size": 64}, torch.float32),
        (
            {"hidden_size": 48, "num_hidden_layers": 4, "image_size": 43, "hidden_act": "gelu"},
            {"num_hidden_layers": 3, "num_attention_heads": 3, "hidden_size": 24, "rotary_emb_base": 500.0},
            torch.float32,
        ),
    ],
    ids=["float16", "bfloat16", "one layer", "wider"],
)
def test_verification_compares_with_the_server(export, make_checkpoint, vision, language, dtype):
    checkpoint = make_checkpoint(make_siglip_checkpoint, vision, dtype=dtype, **language)
    report = (export(checkpoint, "--format", "gguf", verify=True) / "EXPORT.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1:-1] for line in report.splitlines() if " of 12 |" in line]
    assert len(rows) == 6
    equal = [int(row[3].split()[0]) for row in rows]
    assert equal == [12] * 6 if dtype == torch.float32 else min(equal) >= 1
    assert all(float(row[4]) <= llama_server.TOLERANCES[dtype] * float(row[5]) for row in rows)


def swapped(names, first, second):
    return {**names, first: names[second], second: names[first]}


@needs_llama_cpp
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("_NAMES", swapped(gguf_text._NAMES, "mlp.gate_proj", "mlp.up_proj")),
        ("_VISION_NAMES", swapped(gguf_files._VISION_NAMES, "layer_norm1", "layer_norm2")),
        ("prompt", lambda half: chat_template().replace("助手", "助理")),
        ("layer", None),
    ],
    ids=["gate and value swapped", "norms swapped", "another system prompt", "a layer too few"],
)
def test_an_export_that_differs_is_an_error(export, make_checkpoint, monkeypatch, capfd, name, wrong):
    checkpoint = make_checkpoint(make_siglip_checkpoint)
    if name == "prompt":
        monkeypatch.setattr(QwenText, "chat_template", wrong)
    elif wrong is not None:
        monkeypatch.setattr(gguf_text if name == "_NAMES" else gguf_files, name, wrong)
    else:
        add = gguf.GGUFWriter.add_array
        less = lambda self, key, value: add(self, key, [1] if key.endswith("feature_layer") else value)  # noqa: E731
        monkeypatch.setattr(gguf.GGUFWriter, "add_array", less)
    output = export(checkpoint, "--format", "gguf", status=1, verify=True)
    one_line_error(capfd.readouterr().err, "export.py")
    assert not output.exists()
    assert (output.with_name("out.unfinished-export") / "model-f32.gguf").exists()  # to be looked at


@needs_llama_cpp
def test_files_that_llama_cpp_cannot_read_are_an_error(export, make_checkpoint, monkeypatch, capfd):
    checkpoint = make_checkpoint(make_siglip_checkpoint)
    monkeypatch.setattr(gguf.GGUFWriter, "add_clip_projector_type", lambda self, value: None)
    export(checkpoint, "--format", "gguf", status=1, verify=True)
    assert "can't load" in one_line_error(capfd.readouterr().err, "export.py")


KILLED = """
import os, signal, sys
from model.export import llama_server
def die(server, *rest):
    print(server.address, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
llama_server._ask = die
import export
export.main(sys.argv[1:])
"""


@needs_llama_cpp
@pytest.mark.slow
def test_a_killed_export_leaves_no_server_behind(make_checkpoint, tmp_path):
    words = ["--model_weights", make_checkpoint(make_siglip_checkpoint), "--output", tmp_path / "out"]
    command = [sys.executable, "-c", KILLED, *map(str, words), "--format", "gguf"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), text=True, capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    port = int(done.stdout.rsplit(":", 1)[1])
    import socket

    while True:  # until nobody listens any more
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return
        time.sleep(0.1)
