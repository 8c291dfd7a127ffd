"""The demo's own parts: its questions, drawings, texts, label files, losses and measures."""

import json
import random
import re
import shutil
import subprocess

import pytest
import torch
from tiny_run import ROOT

import evaluate
from benchmarks.easy_vqa import figure, measure, prepare_data, pretrain_clip, pretrain_qwen
from benchmarks.easy_vqa.questions import KINDS, load_questions, scenes_told
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


def test_evaluate_py_measures_the_official_test_split(tmp_path):
    """The majority's answers, and those of somebody who knows all, through the questions that the demo writes."""
    measure.write_questions(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text().splitlines()]
    right = "".join(json.dumps({"id": line["id"], "answer": line["answers"][0]}) + "\n" for line in lines)
    (tmp_path / "right.jsonl").write_text(right)
    found = {}
    for name in ("right", "majority"):
        flags = ["--questions", "questions.jsonl", "--answers", f"{name}.jsonl", "--output", name]
        placed = [flag if flag.startswith("--") else str(tmp_path / flag) for flag in flags]
        assert evaluate.main([*placed, "--metrics", "exact_match"]) == 0
        found[name] = json.loads((tmp_path / name / "results.json").read_text())
    assert found["right"]["metrics"] == {"exact_match": 1.0}
    assert found["right"]["counts"]["questions"] == 9673
    assert set(found["right"]["by_kind"]) == set(KINDS)
    assert found["majority"]["metrics"]["exact_match"] == pytest.approx(0.671, abs=0.001)
    shown = measure.table({**found["right"], "blind": found["majority"]}, found["majority"]).splitlines()
    assert len(shown) == 9
    assert shown[1].split() == ["what", "color", "1,280", "100.0%", "11.6%", "11.6%"]
    assert shown[7].split() == ["all", "9,673", "100.0%", "67.1%", "67.1%"]


def test_the_figure_is_drawn_from_the_answers(tmp_path):
    measure.write_questions(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text().splitlines()[:600]]
    chosen = figure.choose([{**line, "answer": "red"} for line in lines])
    assert len({line["image"] for line in chosen}) == 9
    figure.draw(chosen, tmp_path / "answers.png")
    assert (tmp_path / "answers.png").stat().st_size > 10_000


@pytest.mark.parametrize("words", [(), ("--web",)])
def test_the_page_is_started_after_a_finished_demo(tmp_path, words):
    """A copy of the scripts, a demo whose stages are done, and a Python that only notes what it is called with."""
    sources = ("demo.sh", "tests/setup.sh", "benchmarks/stages.sh", "requirements.txt", "web-requirements.txt")
    for name in (*sources, "benchmarks/easy_vqa/requirements.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/called\n')
    python.chmod(0o755)
    (tmp_path / "demo_output").mkdir()
    for stage in re.findall(r"^stage (\w+)", (ROOT / "demo.sh").read_text(), re.M):
        (tmp_path / f"demo_output/.done-{stage}").write_text("1\n")
    done = subprocess.run(["sh", "demo.sh", *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *installed, last = (tmp_path / "called").read_text().splitlines()
    page = "web_demo.py --model_weights demo_output/vlm"
    assert (last == page) is ("-m pip install -q -r web-requirements.txt" in installed) is bool(words)
    assert not any("benchmarks" in line and "pip" not in line for line in installed)
