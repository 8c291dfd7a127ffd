"""The demo's own parts: its questions, drawings, texts, label files, losses and measures."""

import json
import random

import pytest
import torch

from benchmarks.easy_vqa import evaluate, prepare_data, pretrain_clip, pretrain_qwen
from benchmarks.easy_vqa.questions import (
    Question,
    load_questions,
    scenes_told,
)
from benchmarks.easy_vqa.shapes import Scene, draw_scene
from dataprocess import llava
from qwen import QWenLMHeadModel, QWenTokenizer


@pytest.fixture(scope="module")
def training():
    return load_questions("train")


def test_told_scenes_contradict_no_question(training):
    scenes = scenes_told(training)
    assert len(scenes) > 3500
    for question in training:
        scene = scenes.get(question.image_id)
        if scene and question.kind == "what color":
            assert question.answer == scene.color
        if scene and question.kind == "what shape":
            assert question.answer == scene.shape


def test_every_training_question_is_in_the_llava_file_once(training):
    records = prepare_data.llava_records(training)
    asked = []
    for record in records:
        sample = llava.parse(record)
        assert sample.images == (record["image"],)
        assert len(sample.turns) <= prepare_data.TURNS
        assert [question.count("<|extra_0|>") for question, _ in sample.turns] == [1] + [0] * (len(sample.turns) - 1)
        for question, answer in sample.turns:
            asked.append((question.replace("<|extra_0|>", ""), answer, int(record["image"].removesuffix(".png"))))
    assert sorted(asked) == sorted((q.text, q.answer, q.image_id) for q in training)
    assert records == prepare_data.llava_records(training)


def test_the_clip_tower_is_a_published_one(tmp_path):
    from visual import build_vision_tower

    tokenizer = pretrain_clip.make_tokenizer()
    assert tokenizer("a blue circle")["input_ids"][0] == tokenizer.bos_token_id
    pretrain_clip.make_model(tokenizer).save_pretrained(str(tmp_path))
    pretrain_clip.make_processor().save_pretrained(str(tmp_path))
    tower = build_vision_tower(str(tmp_path))
    assert (tower.kind, tower.num_image_tokens, tower.hidden_size) == ("clip", 64, 96)
    image = draw_scene(Scene("circle", "red"), random.Random(0))
    torch.testing.assert_close(tower.image_transform(image), pretrain_clip.pixels(image).float() / 127.5 - 1)


def test_small_vocabulary_gives_the_full_vocabularys_loss(tokenizer, training):
    torch.manual_seed(0)
    ids = pretrain_qwen.occurring_ids(tokenizer, training)
    small = pretrain_qwen.SmallVocabulary(ids, torch.device("cpu"))
    turns = [[("a red circle\nwhat shape is present?", "circle")], [("is there a circle?", "yes")]]
    rows, labels = small.batch(tokenizer, turns)
    full = small.full_size()
    token_of = torch.tensor([*ids, -1])
    supervised = labels >= 0
    full_labels = labels.clone()
    full_labels[supervised] = token_of[labels[supervised]]
    expected = full(input_ids=token_of[rows], labels=full_labels).loss
    torch.testing.assert_close(small.loss(rows, labels), expected, rtol=1e-4, atol=1e-4)


def test_the_language_model_is_a_published_one(tmp_path, tokenizer):
    model = QWenLMHeadModel(pretrain_qwen.config_of(pretrain_qwen.VOCAB_SIZE)).eval()
    pretrain_qwen.save(model, tokenizer, tmp_path / "qwen")
    loaded = QWenLMHeadModel.from_pretrained(str(tmp_path / "qwen")).eval()
    again = QWenTokenizer.from_pretrained(str(tmp_path / "qwen"))
    ids = torch.tensor([again.encode("what color?")])
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    assert loaded.generation_config.chat_format == "chatml"
    assert loaded.generation_config.eos_token_id == 151643


def test_accuracy_counts_exact_answers_of_each_kind():
    questions = [
        Question("what color is the shape?", "red", 0),
        Question("what color is the circle?", "blue", 1),
        Question("is a circle present?", "yes", 1),
    ]
    measured = evaluate.accuracies(questions, ["red", "blue ", "yes"])
    assert measured == {"what color": 0.5, "a shape?": 1.0, "all": pytest.approx(2 / 3)}
    shown = evaluate.table(questions, {"model": measured})
    assert "50.0%" in shown
    assert "66.7%" in shown


def test_every_question_is_measured_seeing_and_blind(tmp_path):
    asked = []

    def oracle(questions, images, title):
        asked.append(list(images))
        return [question.answer for question in questions]

    evaluate.measure(oracle, tmp_path / "results")
    results = json.loads((tmp_path / "results" / "results.json").read_text())
    assert results["model"]["all"] == 1.0
    assert 0.4 < results["majority"]["all"] < 0.7
    assert [len(images) for images in asked] == [9673, 9673]
    lines = (tmp_path / "results" / "answers.jsonl").read_text().splitlines()
    assert len(lines) == 9673


def test_respondent_pads_on_the_left_and_keeps_the_order(tiny_bases, tokenizer):
    """A batch of different lengths gives every question the answer it gets alone."""
    from model import VisionLanguageModel

    model = VisionLanguageModel.from_pretrained(*tiny_bases, device="cpu").eval()
    questions = [
        Question("what shape is in the image?", "", 0),
        Question("is a circle present?", "", 1),
        Question("what is the color of the rectangle?", "", 2),
    ]
    respondent = evaluate.Respondent(model, tokenizer)
    together = respondent.answer_all(questions, [0, 1, 2], "all")
    alone = [respondent.answer_all([question], [question.image_id], "one")[0] for question in questions]
    assert together == alone
