"""Checkpoint files: every published layout loads unchanged, runs no code of theirs, and what is missing is an error."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_qwen import enliven, random_ids, tiny_config, tiny_model
from torch.testing import assert_close
from transformers import GenerationConfig

from qwen import MultimodalQWenLMHeadModel, QWenConfig, QWenLMHeadModel

PUBLISHED_CONFIG = {
    **{"architectures": ["QWenLMHeadModel"], "model_type": "qwen", "tokenizer_class": "QWenTokenizer"},
    "auto_map": {
        "AutoConfig": "configuration_qwen.QWenConfig",
        "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
    },
    **{"hidden_size": 16, "intermediate_size": 48, "kv_channels": 8, "num_attention_heads": 2, "num_hidden_layers": 2},
    **{"max_position_embeddings": 32768, "seq_length": 512, "vocab_size": 200, "transformers_version": "4.32.0"},
    **{"attn_dropout_prob": 0.0, "emb_dropout_prob": 0.0, "initializer_range": 0.02, "layer_norm_epsilon": 1e-06},
    **{"rotary_emb_base": 10000, "rotary_pct": 1.0, "onnx_safe": None, "use_flash_attn": "auto"},
    **dict.fromkeys(("no_bias", "scale_attn_weights", "use_cache", "use_dynamic_ntk", "use_logn_attn"), True),
    **dict.fromkeys(("bf16", "fp16", "fp32", "softmax_in_fp32", "tie_word_embeddings"), False),
    **dict.fromkeys(("use_cache_kernel", "use_cache_quantization"), False),
}
PUBLISHED_GENERATION_CONFIG = {
    **{"chat_format": "chatml", "max_window_size": 24000, "max_new_tokens": 512, "transformers_version": "4.31.0"},
    **{"do_sample": True, "top_k": 0, "top_p": 0.8, "eos_token_id": 151643, "pad_token_id": 151643},
}
IDS = random_ids(2, 9)


@pytest.fixture
def model():
    return tiny_model()


@pytest.fixture
def folder(tmp_path):
    """A published folder without its weights. The Python files beside them must never run."""
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED_CONFIG))
    (tmp_path / "generation_config.json").write_text(json.dumps(PUBLISHED_GENERATION_CONFIG))
    poison = f"open({str(tmp_path / 'poisoned')!r}, 'w').close()\nraise SystemExit('remote code was run')\n"
    for name in ("configuration_qwen", "modeling_qwen", "tokenization_qwen", "__init__"):
        (tmp_path / f"{name}.py").write_text(poison)
    yield tmp_path
    assert not (tmp_path / "poisoned").exists()


def write_shards(folder, state, suffix):
    """Two shards and their index, split in the middle, as the published ones are named."""
    names = sorted(state)
    parts = names[: len(names) // 2], names[len(names) // 2 :]
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    weight_map = {}
    for i, part in enumerate(parts, start=1):
        file = f"{stem}-{i:05}-of-00002.{suffix}"
        shard = {name: state[name].clone() for name in part}
        if suffix == "safetensors":
            save_file(shard, folder / file, metadata={"format": "pt"})
        else:
            torch.save(shard, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    size = sum(value.numel() * value.element_size() for value in state.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


def write_safetensors(folder, state):
    save_file({name: value.clone() for name, value in state.items()}, folder / "model.safetensors", {"format": "pt"})


def write_bin(folder, state):
    torch.save(state, folder / "pytorch_model.bin")


WRITERS = {
    "one safetensors file": write_safetensors,
    "safetensors shards": lambda folder, state: write_shards(folder, state, "safetensors"),
    "one bin file": write_bin,
    "bin shards": lambda folder, state: write_shards(folder, state, "bin"),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=list(WRITERS))
def test_every_layout_loads(folder, model, write):
    write(folder, model.state_dict())
    loaded = MultimodalQWenLMHeadModel.from_pretrained(folder)
    assert type(loaded) is MultimodalQWenLMHeadModel
    assert not loaded.training
    assert_close(loaded(IDS).logits, model(IDS).logits, atol=0, rtol=0)


def test_state_dict_has_the_published_names_and_shapes(model):
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    block = {
        "ln_1.weight": (16,),
        "attn.c_attn.weight": (48, 16),
        "attn.c_attn.bias": (48,),
        "attn.c_proj.weight": (16, 16),
        "ln_2.weight": (16,),
        "mlp.w1.weight": (24, 16),
        "mlp.w2.weight": (24, 16),
        "mlp.c_proj.weight": (16, 24),
    }
    want = {f"transformer.h.{i}.{name}": shape for i in range(2) for name, shape in block.items()}
    want["transformer.wte.weight"] = want["lm_head.weight"] = (200, 16)
    want["transformer.ln_f.weight"] = (16,)
    assert shapes == want


def test_defaults_are_those_of_the_7b_model():
    config = QWenConfig()
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (151936, 4096, 32)
    assert (config.num_attention_heads, config.kv_channels, config.intermediate_size) == (32, 128, 22016)
    assert (config.seq_length, config.max_position_embeddings, config.rotary_emb_base) == (8192, 32768, 10000)
    assert config.use_dynamic_ntk
    assert config.use_logn_attn
    with torch.device("meta"):
        assert sum(p.numel() for p in QWenLMHeadModel(config).parameters()) == 7_721_324_544


def test_old_buffers_are_ignored_silently(folder, model):
    state = model.state_dict()
    for i in range(2):
        state[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
        state[f"transformer.h.{i}.attn.rotary_emb.inv_freq"] = torch.full((4,), 7.0)
    state["transformer.rotary_emb.inv_freq"] = torch.full((4,), 7.0)
    write_bin(folder, state)
    loaded, info = QWenLMHeadModel.from_pretrained(folder, output_loading_info=True)
    assert not info["unexpected_keys"]
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_published_config_survives_and_loses_its_remote_code(folder, model, tmp_path_factory):
    write_safetensors(folder, model.state_dict())
    loaded = QWenLMHeadModel.from_pretrained(folder)
    assert not hasattr(loaded.config, "auto_map")
    saved = tmp_path_factory.mktemp("saved")
    loaded.save_pretrained(saved)
    written = json.loads((saved / "config.json").read_text())
    assert "auto_map" not in written
    for key in set(PUBLISHED_CONFIG) - {"auto_map", "transformers_version", "tokenizer_class"}:
        assert QWenConfig.from_pretrained(saved).to_dict()[key] == PUBLISHED_CONFIG[key], key
    assert not list(saved.glob("*.py"))
    for config in (loaded.generation_config, GenerationConfig.from_pretrained(saved)):
        for key in set(PUBLISHED_GENERATION_CONFIG) - {"transformers_version"}:
            assert getattr(config, key) == PUBLISHED_GENERATION_CONFIG[key], key


def test_a_weight_that_is_missing_or_of_another_shape_is_an_error(folder, model):
    state = model.state_dict()
    del state["transformer.h.1.mlp.w2.weight"]
    write_bin(folder, state)
    with pytest.raises(ValueError, match=r"lacks 1 of .*transformer\.h\.1\.mlp\.w2\.weight"):
        QWenLMHeadModel.from_pretrained(folder)
    write_safetensors(folder, {**state, "lm_head.weight": torch.zeros(100, 16)})
    with pytest.raises(ValueError, match=r"lacks 2 of .*lm_head\.weight: \(100, 16\), expected \(200, 16\)"):
        QWenLMHeadModel.from_pretrained(folder)


def test_pickled_code_in_a_bin_file_does_not_run(folder, model):
    class Trap:
        def __reduce__(self):
            return eval, (f"open({str(folder / 'poisoned')!r}, 'w').close()",)

    torch.save({**model.state_dict(), "transformer.trap": Trap()}, folder / "pytorch_model.bin")
    with pytest.raises(Exception, match=r"(?i)weights.only|unpickl|unsafe|unsupported"):
        QWenLMHeadModel.from_pretrained(folder)


def test_dtype_is_the_file_s_or_what_is_asked(tmp_path, model):
    want = model(IDS).logits
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    assert {p.dtype for p in QWenLMHeadModel.from_pretrained(tmp_path).parameters()} == {torch.bfloat16}
    loaded = QWenLMHeadModel.from_pretrained(tmp_path, dtype=torch.float32)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    # The weights were rounded to bf16 once; the computation is fp32.
    assert (loaded(IDS).logits - want).norm() / want.norm() < 0.02


def test_nothing_stays_on_the_meta_device(tmp_path, model):
    """Models are built without memory and filled afterwards: a buffer that no file fills would hold garbage."""
    long = random_ids(1, 40)
    model = enliven(QWenLMHeadModel(tiny_config(seq_length=16)))
    model.save_pretrained(tmp_path)
    loaded = QWenLMHeadModel.from_pretrained(tmp_path)
    tensors = [*loaded.named_parameters(), *loaded.named_buffers()]
    assert {tensor.device.type for _, tensor in tensors} == {"cpu"}
    assert {name for name, _ in tensors} == set(model.state_dict())
    assert torch.equal(loaded(long).logits, model(long).logits)


def test_tied_embeddings(tmp_path):
    model = enliven(QWenLMHeadModel(tiny_config(tie_word_embeddings=True)))
    assert model.lm_head.weight is model.transformer.wte.weight
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = QWenLMHeadModel.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
