"""The demo's own parts: its questions, drawings, texts, label files, losses and measures."""

import json
import math
import random

import pytest
import torch
import yaml

from benchmarks.easy_vqa import evaluate, figure, prepare_data, pretrain_clip, pretrain_qwen
from benchmarks.easy_vqa.fitting import Schedule, fit, written_whole
from benchmarks.easy_vqa.questions import (
    KINDS,
    Question,
    load_questions,
    questions_by_image,
    scenes_told,
)
from benchmarks.easy_vqa.shapes import COLORS, IMAGE_SIZE, SHAPES, Scene, draw_scene
from benchmarks.easy_vqa.texts import captioning, conversation
from dataprocess import ai_challenger, llava
from dataset import load_image
from qwen import QWenLMHeadModel, QWenTokenizer


@pytest.fixture(scope="module")
def training():
    return load_questions("train")


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("what color is the circle?", "what color"),
        ("what is the blue shape?", "what shape"),
        ("is there a teal shape in the image?", "a color?"),
        ("does the image contain a circle?", "a shape?"),
        ("is no triangle present?", "no shape?"),
    ],
)
def test_kind_of_a_question(text, kind):
    assert Question(text, "yes", 0).kind == kind


def test_the_official_split_is_read_whole(training):
    test = load_questions("test")
    assert (len(training), len(test)) == (38575, 9673)
    assert {question.kind for question in test} == set(KINDS)


@pytest.mark.parametrize(
    ("questions", "scene"),
    [
        ([("what is the blue shape?", "circle")], Scene("circle", "blue")),
        ([("is there not a red shape?", "no"), ("is a triangle present?", "yes")], Scene("triangle", "red")),
        ([("what color is the shape?", "gray")], None),
        ([("is a red shape present?", "no"), ("what shape is present?", "circle")], None),
    ],
)
def test_what_questions_tell_of_a_picture(questions, scene):
    told = scenes_told([Question(text, answer, 7) for text, answer in questions])
    assert told == ({} if scene is None else {7: scene})


def test_told_scenes_contradict_no_question(training):
    scenes = scenes_told(training)
    assert len(scenes) > 3500
    for question in training:
        scene = scenes.get(question.image_id)
        if scene and question.kind == "what color":
            assert question.answer == scene.color
        if scene and question.kind == "what shape":
            assert question.answer == scene.shape


@pytest.mark.parametrize("scene", [Scene(shape, color) for shape, color in zip(SHAPES, COLORS, strict=False)])
def test_a_drawing_shows_the_color_on_a_light_background(scene):
    image = draw_scene(scene, random.Random(1))
    assert (image.mode, image.size) == ("RGB", (IMAGE_SIZE, IMAGE_SIZE))
    counts = {color: number for number, color in image.getcolors(IMAGE_SIZE**2)}
    background = max(counts, key=counts.get)
    assert min(background) >= 230
    assert counts[COLORS[scene.color]] > 20


def test_chinese_captions_are_five_and_name_what_is_there():
    captions = Scene("triangle", "teal").chinese_captions
    assert len(set(captions)) == 5
    assert all("三角形" in caption and "青色" in caption for caption in captions)


def test_text_conversations_hold_no_image():
    rng = random.Random(0)
    asked = [Question("what shape is present?", "circle", 0), Question("is no circle present?", "no", 0)]
    turns = conversation(Scene("circle", "red"), asked, rng)
    assert [turn[1] for turn in turns] == ["circle", "no"]
    assert turns[0][0].endswith("\nwhat shape is present?")
    assert turns[1][0] == "is no circle present?"
    question, answer = captioning(Scene("circle", "red"), rng)[0]
    assert "<|extra_0|>" not in question
    assert answer in Scene("circle", "red").chinese_captions


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


def test_annotations_are_what_process_image_reads(tmp_path):
    folder = tmp_path / "annotations"
    prepare_data.write_annotations(folder)
    assert yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["output_captions"] == "../captions.json"
    records = json.loads((folder / "ai_challenger.json").read_text(encoding="utf-8"))
    sample = ai_challenger.parse(records[0], 0, 42)
    assert len(sample.turns[0][1]) == 5


def test_contrastive_loss_is_least_where_pictures_meet_their_captions():
    true = torch.tensor([2, 0, 2])
    right = torch.nn.functional.one_hot(true, 4) * 50.0
    assert pretrain_clip.contrastive_loss(right, true) > 0
    # Caption 2 belongs to two pictures, so that half of each is the best: log 2 for one of the two captions present.
    assert float(pretrain_clip.contrastive_loss(right, true)) == pytest.approx(math.log(2) / 4, abs=1e-4)
    assert pretrain_clip.contrastive_loss(right.roll(1, dims=1), true) > 10


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


def test_patch_features_get_a_gradient_in_the_last_layer():
    model = pretrain_clip.make_model(pretrain_clip.make_tokenizer())
    states = []
    model.vision_model.encoder.layers[-1].register_forward_hook(
        lambda module, inputs, output: states.append(output if torch.is_tensor(output) else output[0])
    )
    _, patches = pretrain_clip.image_embeddings(model, torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE))
    gradient = torch.autograd.grad(patches[0, 0], states[0])[0]
    assert (gradient[0, 1:].abs().sum(dim=1) > 0).all()


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


def test_whatever_is_drawn_is_in_the_small_vocabulary(tokenizer, training):
    source = pretrain_qwen.TextSource(training, random.Random(5))
    small = pretrain_qwen.SmallVocabulary(pretrain_qwen.occurring_ids(tokenizer, training), torch.device("cpu"))
    rows, labels = small.batch(tokenizer, [turns for _ in range(20) for turns in source.draw_batch()])
    assert rows.max() < small.other
    assert ((labels >= 0).sum(dim=1) >= 2).all()


def test_the_language_model_is_a_published_one(tmp_path, tokenizer):
    model = QWenLMHeadModel(pretrain_qwen.config_of(pretrain_qwen.VOCAB_SIZE)).eval()
    pretrain_qwen.save(model, tokenizer, tmp_path / "qwen")
    loaded = QWenLMHeadModel.from_pretrained(str(tmp_path / "qwen")).eval()
    again = QWenTokenizer.from_pretrained(str(tmp_path / "qwen"))
    ids = torch.tensor([again.encode("what color?")])
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    assert loaded.generation_config.chat_format == "chatml"
    assert loaded.generation_config.eos_token_id == 151643


def test_fit_lowers_the_loss():
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    inputs = torch.randn(32, 4)
    targets = inputs.sum(dim=1, keepdim=True)

    def loss() -> torch.Tensor:
        return (model(inputs).float() - targets).square().mean()

    before = loss().item()
    fit(model, loss, Schedule(steps=60, learning_rate=0.1, warmup=5), "test")
    assert loss().item() < before / 5


def test_a_folder_is_written_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "out"
    with written_whole(folder) as temporary:
        (temporary / "a").write_text("1")
    with pytest.raises(RuntimeError), written_whole(folder) as temporary:  # noqa: PT012
        (temporary / "a").write_text("2")
        raise RuntimeError
    assert (folder / "a").read_text() == "1"


def test_wrong_images_are_wrong_and_of_the_test_split():
    questions = load_questions("test")
    others = evaluate.wrong_images(questions)
    assert all(other != question.image_id for other, question in zip(others, questions, strict=True))
    assert set(others) == set(questions_by_image(questions))


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


def test_majority_answer_is_by_kind():
    training = [Question("is a circle present?", answer, 0) for answer in ("no", "no", "yes")]
    training += [Question("is no circle present?", answer, 0) for answer in ("yes", "yes", "no")]
    asked = [Question("is no triangle present?", "?", 0), Question("is a triangle present?", "?", 0)]
    assert evaluate.majority_answers(training, asked) == ["yes", "no"]


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


def test_figure_shows_nine_pictures_of_all_kinds(tmp_path):
    questions = load_questions("test")
    answers = [{"image": q.image_id, "kind": q.kind, "q": q.text, "a": q.answer, "model": q.answer} for q in questions]
    chosen = figure.choose(answers)
    assert len({record["image"] for record in chosen}) == 9
    assert {record["kind"] for record in chosen} == set(KINDS)
    chosen[0]["model"] = "wrong"
    figure.draw(chosen, tmp_path / "nine.png")
    assert load_image(tmp_path / "nine.png").width > 500


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
