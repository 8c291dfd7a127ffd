"""Forms in which language models are published: bf16, shards, several stop tokens, sampling by default, no padding."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from tiny_families import make_family, make_tokenizer
from tiny_run import MIXED_CAPTIONS, losses, with_generation_config, write_data
from tiny_towers import make_clip_checkpoint, pixels
from transformers import AutoModelForCausalLM

import train
from dataset import VLMCollator
from dataset.chat_template import ChatTokenizer
from dataset.prompt import encode_sample
from model import VisionLanguageModel
from model.asking.assistant import Assistant
from model.checkpoints.base_models import load_tokenizer
from qwen import IGNORE_INDEX

QUICK = [
    *("--use_cpu", "true", "--report_to", "none", "--disable_tqdm", "true", "--logging_steps", "1"),
    *("--max_steps", "2", "--per_device_train_batch_size", "4", "--lora_rank", "4", "--learning_rate", "1e-2"),
]


def assistant_of(base: str, clip: str, **options: object) -> Assistant:
    model = VisionLanguageModel.from_pretrained(base, clip, device="cpu")
    return Assistant(model, load_tokenizer(base), None, {"max_new_tokens": 8, **options})


def test_bf16_in_shards_trains_as_in_one_file_and_is_the_same_base(tmp_path, pictures):
    whole, clip = make_family(tmp_path / "whole", "qwen2"), make_clip_checkpoint(tmp_path / "clip")
    model = AutoModelForCausalLM.from_pretrained(whole).to(torch.bfloat16)
    model.save_pretrained(whole)
    sharded = str(shutil.copytree(whole, tmp_path / "sharded"))
    (Path(sharded) / "model.safetensors").unlink()
    model.save_pretrained(sharded, max_shard_size="20KB")
    assert len(list(Path(sharded).glob("model-*.safetensors"))) > 2
    data = write_data(tmp_path / "data", MIXED_CAPTIONS, pictures["red"].parent)
    for name, base in (("one", whole), ("many", sharded)):
        flags = ["--base_language_model", base, "--base_value_model", clip, *data, *QUICK]
        assert train.main([*flags, "--output_dir", str(tmp_path / name)]) == 0
    assert losses(tmp_path / "one/checkpoint-2") == losses(tmp_path / "many/checkpoint-2")
    moved = VisionLanguageModel.from_pretrained(sharded, model_weights=tmp_path / "one", device="cpu")
    assert moved.base_language_model == sharded


def test_an_answer_ends_at_each_stop_token_of_the_generation_config(tmp_path):
    base, clip = make_family(tmp_path / "base", "llama"), make_clip_checkpoint(tmp_path / "clip")
    assistant = assistant_of(base, clip, do_sample=False)
    prompt = torch.tensor([assistant.prompt_ids("What?")])
    new = assistant.model.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=None)[0, prompt.shape[1] :]
    stop = new.tolist()[3]
    stops = [assistant.tokenizer.stop_ids[0], stop]
    other = str(with_generation_config(base, tmp_path / "other", eos_token_id=stops))
    expected = new.tolist()[: new.tolist().index(stop)]
    again = assistant_of(other, clip, do_sample=False)
    assert again.answer("What?", None) == assistant.tokenizer.decode(expected)
    assert len(again.answer("What?", None)) < len(assistant.answer("What?", None))


def test_sampling_by_default_gives_each_question_the_answer_that_it_has_alone(tmp_path):
    """As Qwen3 is published."""
    base, clip = make_family(tmp_path / "first", "qwen3"), make_clip_checkpoint(tmp_path / "clip")
    published = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95}
    assistant = assistant_of(str(with_generation_config(base, tmp_path / "base", **published)), clip)
    with torch.no_grad():
        features = [assistant.model.encode_images(pixels(1, seed=number)) for number in range(2)]
    asked = [("<|extra_0|>What?", features[0]), ("Is this <|extra_0|> a long question?", features[1]), ("Hello", None)]
    alone = []
    for prompt, row in asked:
        torch.manual_seed(7)
        alone.append(assistant.answer(prompt, row))
    ids = [assistant.prompt_ids(prompt) for prompt, _ in asked]
    rows = [None if row is None else row.flatten(0, 1) for _, row in asked]
    assert assistant.answer_rows(ids, rows, seed=7) == alone
    torch.manual_seed(8)
    assert assistant.answer(*asked[0]) != alone[0]


@pytest.mark.parametrize("pad", ["<|im_end|>", None])
def test_the_end_token_may_be_the_padding_too(pad):
    tokenizer = make_tokenizer("qwen2")
    tokenizer.pad_token = pad
    ours = ChatTokenizer(tokenizer, 1000)
    assert ours.pad_token_id == ours.answer_end()
    samples = []
    for answer in ("Red.", "A long answer, of many tokens."):
        encoded = encode_sample(ours, [("What?", answer)], 4, None)
        samples.append({"input_ids": torch.tensor(encoded.input_ids), "labels": torch.tensor(encoded.labels)})
    batch = VLMCollator(ours.pad_token_id)([{**sample, "ids": 0} for sample in samples])
    for row, sample in zip(batch["labels"], samples, strict=True):
        length = len(sample["labels"])
        assert row[length - 1] == ours.answer_end()
        assert (row[length:] == IGNORE_INDEX).all()
    assert batch["attention_mask"].sum(1).tolist() == [len(sample["input_ids"]) for sample in samples]
    assert ours.stop_ids == (ours.answer_end(),)
