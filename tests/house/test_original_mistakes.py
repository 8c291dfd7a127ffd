"""One test for each thing that went wrong in the original project.

What needs whole runs is shown in other files; the last test here says where, and that it is still there.
"""

from __future__ import annotations

import json
import re

import pytest
import torch
from tiny_run import MIXED_CAPTIONS, ROOT, load_test_py, make_bases, make_pictures, write_data
from tiny_towers import make_siglip_checkpoint, pixels

import train
from dataprocess import process_image
from dataset import ImageCaptionDataset, encode_prompt
from dataset.prompt import encode_sample
from model import VisionLanguageModel
from qwen import IMAGE_TOKEN_ID, MultimodalQWenLMHeadModel
from visual import build_vision_tower


@pytest.fixture(scope="module")
def bases(tmp_path_factory, qwen_tiktoken) -> list[str]:
    return make_bases(tmp_path_factory.mktemp("bases"), qwen_tiktoken)


@pytest.fixture(scope="module")
def model(bases) -> VisionLanguageModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = VisionLanguageModel.from_pretrained(bases[1], bases[3], device="cpu")
        with torch.no_grad():  # as it is drawn, the projector is so small that pictures hardly count
            for parameter in model.projector.parameters():
                parameter.normal_(0, 0.3)
    return model


@pytest.fixture
def argv(bases, tmp_path) -> list[str]:
    make_pictures(tmp_path / "pictures")
    data = write_data(tmp_path, MIXED_CAPTIONS, tmp_path / "pictures")
    flags = [
        "--lora_rank",
        "4",
        "--max_steps",
        "4",
        "--report_to",
        "none",
        "--disable_tqdm",
        "true",
        "--use_cpu",
        "true",
    ]
    return [*bases, *data, *flags, "--output_dir", str(tmp_path / "run")]


@pytest.fixture
def prepared(tmp_path) -> dict[str, tuple[str, dict]]:
    """What becomes of photo 7.png in both LLaVA files and twice in the first: key -> (photo, caption)."""

    def conversation(photo: str, answer: str) -> dict:
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": answer}]
        return {"id": photo, "image": photo, "conversations": turns}

    files = {
        "ali.json": [{"url": "", "image_id": "7.png", "caption": ["一", "二", "三", "四", "五"]}],
        "one.json": [conversation("7.png", "one 7"), conversation("7.png", "again 7"), conversation("8.png", "one 8")],
        "two.json": [conversation("7.png", "two 7"), conversation("9.png", "two 9")],
    }
    for name, records in files.items():
        (tmp_path / name).write_text(json.dumps(records), encoding="utf-8")
    (tmp_path / "config.yaml").write_text(
        "ali_image_path: ali\nali_image_path_label_file: ali.json\ncoco_image_path: coco\n"
        "coco_image_path_label_file1: one.json\ncoco_image_path_label_file2: two.json\n"
        "output_image_map: map.json\noutput_captions: captions.json\n"
    )
    assert process_image.main(["--config", str(tmp_path / "config.yaml")]) == 0
    captions = json.loads((tmp_path / "captions.json").read_text(encoding="utf-8"))
    entries = json.loads((tmp_path / "map.json").read_text(encoding="utf-8"))
    return {key: (e["image_file"], captions[str(e["ID"])]) for key, e in entries.items()}


def test_files_about_one_photo_overwrote_each_other_and_shifted_ids(prepared):
    found = sorted((photo, caption["a"]) for photo, caption in prepared.values() if isinstance(caption["a"], str))
    assert found == [
        ("7.png", "again 7"),
        ("7.png", "one 7"),
        ("7.png", "two 7"),
        ("8.png", "one 8"),
        ("9.png", "two 9"),
    ]


def test_one_random_caption_of_five_was_kept(prepared, argv, tmp_path, tokenizer, model):
    (five,) = [caption["a"] for _, caption in prepared.values() if isinstance(caption["a"], list)]
    assert five == ["一", "二", "三", "四", "五"]
    data = write_data(tmp_path / "five", [("red.png", ("<|extra_0|>", five))], tmp_path / "pictures")

    def drawn(seed: int) -> list[list[int]]:
        samples = ImageCaptionDataset(data[1], data[3], tokenizer, model.vision_tower.image_transform, 4, seed=seed)
        answers = []
        for epoch in range(30):
            samples.set_epoch(epoch)
            answers.append(samples[0]["labels"].tolist())
        return answers

    assert drawn(1) == drawn(1) != drawn(2)
    assert len({tuple(answer) for answer in drawn(1)}) == 5


def test_config_was_found_from_its_own_folder_only(prepared, tmp_path, tmp_path_factory, monkeypatch):
    written = (tmp_path / "captions.json").read_bytes()
    (tmp_path / "captions.json").unlink()
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert process_image.main(["--config", str(tmp_path / "config.yaml")]) == 0
    assert (tmp_path / "captions.json").read_bytes() == written


def test_siglips_first_patch_was_lost(tmp_path):
    tower = build_vision_tower(make_siglip_checkpoint(tmp_path))
    x = pixels(1)
    first = x.clone()
    first[:, :, :14, :14] += 1
    assert tower.num_image_tokens == tower(x).shape[1] == 4
    assert not torch.allclose(tower(x)[:, 0], tower(first)[:, 0])


def test_images_moved_between_rows_where_a_row_had_none_or_two(model):
    """Rows with two images, none and one: each gives what it gives alone, and wrong counts are an error."""
    image, pad = [IMAGE_TOKEN_ID] * 4, 151643
    rows = [[1, *image, 2, *image, 3], [4, 5, 6], [7, *image, 8]]
    width = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    x = pixels(3)
    with torch.no_grad():
        together = model(ids, mask, pixel_values=x).logits
        for row, own, logits in zip(rows, (x[:2], None, x[2:]), together, strict=True):
            alone = model(torch.tensor([row]), pixel_values=own).logits[0]
            torch.testing.assert_close(logits[: len(row)], alone, rtol=0, atol=1e-4)
        with pytest.raises(ValueError, match=r"12.*8"):
            model(ids, mask, pixel_values=x[:2])


def test_batched_generation_crashed_on_the_mask(model):
    image, pad = [IMAGE_TOKEN_ID] * 4, 151643
    rows, x = [[1, *image, 2, 3], [7, *image]], pixels(2)
    ids = torch.tensor([[pad] * (7 - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (7 - len(row)) + [1] * len(row) for row in rows])
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    together = model.generate(ids, mask, x, **settings)[:, 7:]
    for i, row in enumerate(rows):
        alone = model.generate(torch.tensor([row]), torch.ones(1, len(row), dtype=torch.long), x[i : i + 1], **settings)
        assert together[i].tolist() == alone[0, len(row) :].tolist()


def test_every_last_token_was_dropped_even_at_the_length_limit(tokenizer):
    whole = encode_sample(tokenizer, [("What?", "A red sign.")], 4)
    exact = encode_sample(tokenizer, [("What?", "A red sign.")], 4, max_length=len(whole.input_ids))
    assert exact == whole
    assert exact.labels[-1] == tokenizer.eod_id


def test_evaluate_crashed(argv):
    trainer = train.build_trainer([*argv, "--eval_image_map", argv[5], "--eval_captions_file", argv[7]])
    assert 0 < trainer.evaluate()["eval_loss"] < 30


def test_pure_bf16_left_half_of_lora_unchanged(argv):
    """At a learning rate of 3e-5, every LoRA weight moves in four steps, though the frozen weights are bf16."""
    trainer = train.build_trainer([*argv, "--bf16", "true", "--learning_rate", "3e-5", "--lora_dropout", "0"])
    assert trainer.model.dtype == torch.bfloat16
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    before = {name: p.detach().clone() for name, p in trained.items()}
    trainer.train()
    matrices = [name for name in trained if "lora_A" in name]
    moved = torch.cat([(trained[name] != before[name]).flatten() for name in matrices]).float().mean()
    assert moved > 0.99


def test_cuda_and_nccl_were_hard_coded():
    sources = [
        *ROOT.glob("*.py"),
        *(p for d in ("dataset", "model", "qwen", "visual") for p in (ROOT / d).glob("*.py")),
    ]
    assert len(sources) > 20
    assert [p.name for p in sources if re.search(r"\.cuda\(|nccl", p.read_text(encoding="utf-8"))] == []


def test_the_language_model_was_built_twice(argv, monkeypatch):
    built = []
    init = MultimodalQWenLMHeadModel.__init__
    monkeypatch.setattr(
        MultimodalQWenLMHeadModel, "__init__", lambda self, *a, **k: (built.append(1), init(self, *a, **k))[1]
    )
    train.build_trainer(argv)
    assert len(built) == 1


def test_words_were_put_before_prompts(tokenizer):
    ask = load_test_py()
    ids, _ = encode_prompt(tokenizer, ask.with_placeholders("What?", 1), 4)
    assert tokenizer.decode(ids) == (
        "<|im_start|>system\n你是一位图像理解助手。<|im_end|>\n<|im_start|>user\n"
        + "<|extra_0|>" * 4
        + "What?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


ELSEWHERE = {
    "Trainer wrapped twice in DDP, so gradients were never reduced": "test_two_processes_train_as_one_and_write_once",
    "all ranks wrote the same file": "test_two_processes_train_as_one_and_write_once",
    "no final save": "test_the_run_folder_holds_checkpoints_a_last_save_and_the_settings",
    "no resume": "test_resuming_continues_as_if_never_stopped",
    "previous_lora_weights never read": "test_previous_weights_are_where_training_starts",
}


@pytest.mark.parametrize("mistake", ELSEWHERE)
def test_what_needs_whole_runs_is_shown_in_test_train_cli(mistake):
    text = (ROOT / "tests/programs/test_train_cli.py").read_text(encoding="utf-8")
    assert f"\ndef {ELSEWHERE[mistake]}(" in text
