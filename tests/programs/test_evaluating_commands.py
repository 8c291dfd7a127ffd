"""Every command of docs/evaluating.md that evaluates runs as written, with made-up files in the published formats."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from tiny_run import ROOT, make_pictures

import evaluate

pytestmark = pytest.mark.release

BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.S | re.M)
COCO_NAME = "COCO_val2014_000000000009.jpg"


def commands() -> list[str]:
    """The lines of both languages, each once."""
    text = (ROOT / "docs" / "evaluating.md").read_text(encoding="utf-8")
    return list(dict.fromkeys(line for block in BLOCK.findall(text) for line in block.splitlines()))


def write(path: Path, value: object) -> None:
    """One JSON value, or for a tuple one on each line."""
    lines = value if isinstance(value, tuple) else (value,)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n", encoding="utf-8")


@pytest.fixture
def reader(tmp_path, monkeypatch, trained, mixed_data) -> Path:
    """A current folder that has every file that the document names."""
    monkeypatch.chdir(tmp_path)
    pictures = make_pictures(tmp_path / "made")
    challenger = Path("data/caption_validation_images_20170910")
    for folder, names in (
        ("data/coco/val2014", [COCO_NAME, "COCO_val2014_000000000010.jpg"]),
        ("data/gqa/images", ["2405722.jpg"]),
        (str(challenger), ["3cd3.jpg"]),
    ):
        Path(folder).mkdir(parents=True)
        for name, colour in zip(names, pictures, strict=False):
            shutil.copy(pictures[colour], Path(folder) / name)
    shutil.copytree(trained, "weights/train_V1_5/checkpoint-10000")
    for name, source in zip(("image_map.json", "captions.json"), mixed_data[1::2], strict=True):
        shutil.copy(source, name)
    asked = {"prompt": "Which?", "answers": ["red"] * 9 + ["blue"]}
    write(Path("questions.jsonl"), tuple({"id": n, "image": str(pictures["red"]), **asked} for n in range(3)))
    write(Path("answers.jsonl"), tuple({"id": n, "answer": "red"} for n in range(3)))
    questions = [{"image_id": 9, "question": "What?", "question_id": 9000}]
    write(Path("data/v2_OpenEnded_mscoco_val2014_questions.json"), {"data_subtype": "val2014", "questions": questions})
    given = {"question_id": 9000, "answer_type": "other", "answers": [{"answer": text} for text in ["a"] * 9 + ["b"]]}
    write(Path("data/v2_mscoco_val2014_annotations.json"), {"annotations": [given]})
    names = [COCO_NAME, "COCO_val2014_000000000010.jpg"]
    pope = tuple({"question_id": n, "image": name, "text": "Is it?", "label": "yes"} for n, name in enumerate(names))
    for split in ("random", "popular", "adversarial"):
        write(Path(f"data/coco_pope_{split}.json"), pope)
    write(Path("data/testdev_balanced_questions.json"), {"1": {"imageId": "2405722", "question": "?", "answer": "a"}})
    captions = [{"image_id": 9, "caption": "A red sign on a wall."}]
    write(Path("data/captions_val2014.json"), {"images": [{"id": 9, "file_name": COCO_NAME}], "annotations": captions})
    captions = [{"image_id": "3cd3.jpg", "caption": ["一块红色的牌子。"] * 5}]
    write(Path("data/caption_validation_annotations_20170910.json"), captions)
    return tmp_path


def test_every_command_runs(reader, loaded_once):
    pytest.importorskip("pycocoevalcap.bleu.bleu_scorer", reason="pip install -r evaluation-requirements.txt")
    pytest.importorskip("jieba", reason="pip install -r evaluation-requirements.txt")
    made = set()
    for command in commands():
        program, *words = shlex.split(command)
        if program == "python":
            assert words[0] == "evaluate.py"
            assert evaluate.main(words[1:]) == 0, command
            made |= {word for word in words if word.startswith("results/")}
        elif program == "torchrun":  # another test starts processes
            evaluate.parse_arguments(words[words.index("evaluate.py") + 1 :])
        elif program == "sh":  # training has tests of its own
            assert words[0] == "train.sh"
        else:
            assert command == "pip install -r evaluation-requirements.txt"
    metrics = {folder: set(json.loads(Path(folder, "results.json").read_text())["metrics"]) for folder in made}
    assert metrics["results/vqa"] == {"vqa_accuracy"}
    assert "pope_random_f1" in metrics["results/pope"]
    assert metrics["results/gqa"] == {"exact_match"}
    assert metrics["results/coco"] == {"bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider_d"}
    assert "char_cider_d" in metrics["results/ai_challenger"]
    assert len(made) == 8
