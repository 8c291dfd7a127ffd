"""Published files of questions as they are, ours, and answers in all their forms."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from model.evaluation.answers import read_answers
from model.evaluation.items import gather
from model.evaluation.published import Reading, read_file
from model.evaluation.samples import read_samples


def write(path: Path, value: object) -> Path:
    """One JSON value, or for a tuple one on each line."""
    lines = value if isinstance(value, tuple) else (value,)
    path.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n", encoding="utf-8")
    return path


POPE = (
    {"question_id": 1, "image": "COCO_val2014_000000310196.jpg", "text": "Is there a snowboard?", "label": "yes"},
    {"question_id": 2, "image": "COCO_val2014_000000310196.jpg", "text": "Is there a dining table?", "label": "no"},
)
VQA_QUESTIONS = {
    "data_type": "mscoco",
    "data_subtype": "val2014",
    "questions": [{"image_id": 262148, "question": "Where is he looking?", "question_id": 262148000}],
}
VQA_ANSWERS = {
    "annotations": [
        {
            "question_type": "where is the",
            "multiple_choice_answer": "down",
            "answers": [{"answer": "down", "answer_confidence": "yes", "answer_id": n} for n in range(1, 11)],
            "image_id": 262148,
            "answer_type": "other",
            "question_id": 262148000,
        }
    ]
}
GQA = {
    "05515938": {
        "question": "What is this bird called?",
        "imageId": "2405722",
        "answer": "parrot",
        "fullAnswer": "This is a parrot.",
        "types": {"detailed": "categoryThis", "semantic": "cat", "structural": "query"},
    }
}
COCO = {
    "info": {},
    "images": [{"id": 9, "file_name": "COCO_val2014_000000000009.jpg"}, {"id": 10, "file_name": "10.jpg"}],
    "annotations": [{"id": n, "image_id": 9, "caption": f"Caption {n}"} for n in range(5)],
}
AI_CHALLENGER = [
    {"url": "http://x/1.jpg", "image_id": "3cd3.jpg", "caption": ["一个人", "一个男人", "人", "男人", "他"]}
]


def test_pope(tmp_path):
    one = read_file(write(tmp_path / "coco_pope_popular.json", POPE), Reading(image_folder=tmp_path / "val2014"))
    assert one.source == "pope"
    assert [(item.question.id, item.references, item.split) for item in one.items] == [
        (1, ("yes",), "popular"),
        (2, ("no",), "popular"),
    ]
    assert one.items[0].question.images == (tmp_path / "val2014" / "COCO_val2014_000000310196.jpg",)
    assert one.items[1].question.prompt == "Is there a dining table?"


def test_vqav2(tmp_path):
    reading = Reading(write(tmp_path / "annotations.json", VQA_ANSWERS), Path("val2014"), suffix="One word.")
    (item,) = read_file(write(tmp_path / "questions.json", VQA_QUESTIONS), reading).items
    assert item.question.id == 262148000
    assert item.question.images == (Path("val2014/COCO_val2014_000000262148.jpg"),)
    assert item.question.prompt == "Where is he looking?\nOne word."
    assert (item.references, item.kind) == (("down",) * 10, "other")
    with pytest.raises(ValueError, match="--annotations"):
        read_file(tmp_path / "questions.json", Reading())
    write(tmp_path / "annotations.json", {"annotations": VQA_ANSWERS["annotations"] * 2})
    with pytest.raises(ValueError, match="record 2: the id 262148000 occurs twice"):
        read_file(tmp_path / "questions.json", reading)
    write(tmp_path / "annotations.json", {"annotations": []})
    with pytest.raises(ValueError, match="262148000"):
        read_file(tmp_path / "questions.json", reading)
    with pytest.raises(ValueError, match="--annotations"):
        read_file(write(tmp_path / "other.json", VQA_ANSWERS), Reading())


def test_gqa(tmp_path):
    one = read_file(write(tmp_path / "gqa.json", GQA), Reading())
    (item,) = one.items
    assert (one.source, item.question.id, item.references, item.kind) == ("gqa", "05515938", ("parrot",), "query")
    assert item.question.images == (Path("2405722.jpg"),)


def test_coco_captions(tmp_path, caplog):
    (item,) = read_file(write(tmp_path / "captions.json", COCO), Reading(prompt="Describe it.")).items
    assert item.question.id == 9
    assert item.question.prompt == "Describe it."
    assert item.references == tuple(f"Caption {n}" for n in range(5))
    assert "1 picture has no caption" in caplog.text


def test_ai_challenger_captions(tmp_path):
    (item,) = read_file(write(tmp_path / "captions.json", AI_CHALLENGER), Reading()).items
    assert (item.question.id, len(item.references)) == ("3cd3.jpg", 5)
    assert "<|extra_0|>" in item.question.prompt


def test_our_own_keep_further_keys(tmp_path):
    line = {"id": "a", "image": None, "prompt": "1 + 1?", "answers": ["2", "two"], "kind": "sum", "note": {"x": [1]}}
    (item,) = read_file(write(tmp_path / "q.jsonl", (line,)), Reading()).items
    assert (item.references, item.kind, item.question.further["note"]) == (("2", "two"), "sum", {"x": [1]})
    split = {"id": "b", "prompt": "?", "answers": "no", "category": "adversarial"}
    (item,) = read_file(write(tmp_path / "q.jsonl", (split,)), Reading()).items
    assert (item.references, item.kind, item.split) == (("no",), "adversarial", "adversarial")
    zero = {"id": "c", "prompt": "?", "answers": "no", "kind": 0, "split": "random"}
    (item,) = read_file(write(tmp_path / "q.jsonl", (zero,)), Reading()).items
    assert (item.kind, item.split) == ("0", "random")


def test_our_own_may_be_in_an_array(tmp_path):
    lines = [{"id": n, "prompt": "1 + 1?", "answers": ["2"]} for n in range(3)]
    path = tmp_path / "q.json"
    for text in (json.dumps(lines), "\n " + json.dumps(lines, indent=1)):
        path.write_text(text, encoding="utf-8-sig")
        assert [item.question.id for item in read_file(path, Reading()).items] == [0, 1, 2]
    path.write_text(json.dumps(lines[0], indent=1))
    assert [item.references for item in read_file(path, Reading()).items] == [("2",)]
    lines[2]["id"] = 0
    with pytest.raises(ValueError, match=r"record 3: the id 0 is that of record 1"):
        read_file(write(path, lines), Reading())


def test_pictures_of_our_own_questions_are_in_the_folder_that_is_given(tmp_path):
    for folder in (tmp_path, tmp_path / "pics"):
        folder.mkdir(exist_ok=True)
        (folder / "a.png").touch()
    whole = tmp_path / "whole.png"
    line = {"id": 1, "image": ["a.png", str(whole)], "prompt": "?", "answers": ["2"]}
    path = write(tmp_path / "q.jsonl", (line,))
    for given, expected in ((None, tmp_path), (tmp_path / "pics", tmp_path / "pics")):
        (item,) = read_file(path, Reading(image_folder=given)).items
        assert item.question.images == (expected / "a.png", whole)
    with pytest.raises(ValueError, match="--annotations"):
        read_file(path, Reading(annotations=tmp_path / "answers.json"))


def test_the_suffix_is_added_to_the_questions_of_training(tmp_path, mixed_data):
    image_map, captions = Path(mixed_data[1]), Path(mixed_data[3])
    plain, longer = read_samples(image_map, captions), read_samples(image_map, captions, "One word.")
    prompts = [[item.question.prompt for item in one.items] for one in (plain, longer)]
    assert prompts[1] == [f"{prompt}\nOne word." for prompt in prompts[0]]


def test_the_two_files_of_training(tmp_path, mixed_data):
    one = read_samples(Path(mixed_data[1]), Path(mixed_data[3]))
    assert len(one.items) == 12
    assert one.items[0].references == ("It is red.", "Red, I think.", "A red one.")
    assert one.items[0].question.images[0].name == "red.png"
    assert one.items[2].question.prompt == "First <|extra_0|>, then <|extra_0|>?"
    assert one.items[4].references == ("你好！",)  # the first of two turns


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "empty"),
        ("{", "not JSON"),
        ('{"id": 1, "prompt": "?", "answers": ["a"]}\n{"id": 2,', "line 2"),
        ("[1, 2]", "not a known form"),
        ("[]", r"begins with \[\]"),
        ("[" * 100_000, "nested"),
        ('{"id": 1, "id": 1, "prompt": "?", "answers": ["a"]}', "'id' is there twice"),
        ('{"1": {"imageId": "1", "question": "?", "answer": "a"}, "1": {}}', "'1' is there twice"),
        ('[{"image_id": "1.jpg", "caption": "one text"}]', "list of captions"),
        ('[{"image_id": ["1.jpg"], "caption": ["one text"]}]', "record 1"),
        ('{"question_id": 1.5, "image": "1.jpg", "text": "?", "label": "yes"}', "expected an id, got 1.5"),
        ('{"id": 1, "prompt": "?"}', "missing"),
        ('{"id": 1, "prompt": "?", "answers": []}', "the answers are"),
        ('{"id": 1, "prompt": "?", "answers": [2]}', "the answers are"),
        ('{"question_id": 1, "text": "?", "label": "yes"}', "record 1"),
        ('{"question_id": 1, "image": null, "text": "?", "label": "yes"}', "expected text, got None"),
        ('{"images": [{"id": 1}], "annotations": []}', "record 1"),
        ('{"images": [], "annotations": []}', "no question"),
    ],
)
def test_other_files_are_refused_in_a_line(tmp_path, content, words):
    path = tmp_path / "file.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=words) as error:
        read_file(path, Reading())
    assert "\n" not in str(error.value)
    assert "--questions" in str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"question": None}, "expected text"),
        ({"answers": []}, "no answer"),
        ({"answers": [{"answer": 2}]}, "expected text"),
        ({"answers": None}, "record 1"),
    ],
)
def test_damaged_records_of_vqav2_are_refused(tmp_path, change, words):
    question, answers = {**VQA_QUESTIONS["questions"][0]}, {**VQA_ANSWERS["annotations"][0]}
    (question if "question" in change else answers).update(change)
    reading = Reading(write(tmp_path / "a.json", {"annotations": [answers]}))
    with pytest.raises(ValueError, match=words):
        read_file(write(tmp_path / "q.json", {"data_subtype": "val2014", "questions": [question]}), reading)


@pytest.mark.parametrize(
    ("content", "words"), [(b"\x1f\x8b\x08", "unpack"), (b"PK\x03\x04", "unpack"), (b"\xff", "UTF-8")]
)
def test_files_that_are_no_text_are_refused(tmp_path, content, words):
    path = tmp_path / "q.json"
    path.write_bytes(content)
    for flag, read in (
        ("--questions", lambda: read_file(path, Reading())),
        ("--answers", lambda: read_answers([path], [], [])),
    ):
        with pytest.raises(ValueError, match=f"{flag}.*{words}"):
            read()
    with pytest.raises(ValueError, match="regular file"):
        read_file(tmp_path, Reading())


def test_ids_of_several_files_get_the_split_in_front(tmp_path):
    names = ("random", "popular")
    sets = [read_file(write(tmp_path / f"coco_pope_{name}.json", POPE), Reading()) for name in names]
    items = gather(sets)
    assert [item.question.id for item in items] == ["random/1", "random/2", "popular/1", "popular/2"]
    files = [
        write(tmp_path / f"{name}.jsonl", tuple({"id": n, "answer": f"{name} {n}"} for n in (2, 1))) for name in names
    ]
    assert read_answers(files, sets, items) == ["random 1", "random 2", "popular 1", "popular 2"]
    together = write(tmp_path / "all.jsonl", tuple({"id": item.question.id, "answer": "x"} for item in items))
    assert read_answers([together], sets, items) == ["x"] * 4
    with pytest.raises(ValueError, match="3 files"):
        read_answers([*files, together], sets, items)
    with pytest.raises(ValueError, match="different forms"):
        gather([*sets, read_file(write(tmp_path / "gqa.json", GQA), Reading())])
    with pytest.raises(ValueError, match="same name"):
        gather([sets[0], sets[0]])


@pytest.mark.parametrize(
    "records",
    [
        ({"id": 1, "answer": "a"}, {"id": "2", "answer": "b"}),
        [{"question_id": 1, "answer": "a"}, {"question_id": 2, "answer": "b"}],
        [{"image_id": 1, "caption": "a"}, {"image_id": 2, "caption": "b"}],
        [{"questionId": "1", "prediction": "a"}, {"questionId": "2", "prediction": "b"}],
        ({"question_id": 2, "prompt": "?", "text": "b"}, {"question_id": 1, "prompt": "?", "text": "a"}),
    ],
)
def test_answers_in_published_forms(tmp_path, records):
    one = read_file(write(tmp_path / "coco_pope_random.json", POPE), Reading())
    assert read_answers([write(tmp_path / "a.json", records)], [one], one.items) == ["a", "b"]


@pytest.mark.parametrize(
    ("records", "words"),
    [
        (({"id": 1, "answer": "a"},), "the id 2"),
        (({"id": 1, "answer": "a"}, {"id": 1, "answer": "a"}), "twice"),
        (({"id": 1, "answer": 5}, {"id": 2, "answer": "a"}), "record 1"),
        (({"answer": "a"}, {"id": 2, "answer": "a"}), "record 1"),
        ((5, 6), "record 1"),
        ([], "the id 1"),
    ],
)
def test_answers_that_do_not_fit_are_refused(tmp_path, records, words):
    one = read_file(write(tmp_path / "coco_pope_random.json", POPE), Reading())
    with pytest.raises(ValueError, match=words):
        read_answers([write(tmp_path / "a.json", records)], [one], one.items)


def test_answers_to_ai_challenger_need_no_extension(tmp_path):
    one = read_file(write(tmp_path / "captions.json", AI_CHALLENGER), Reading())
    for index in ("3cd3", "3cd3.jpg"):
        answers = write(tmp_path / "a.json", [{"image_id": index, "caption": "一个人"}])
        assert read_answers([answers], [one], one.items) == ["一个人"]


def test_answers_in_popes_form_are_in_the_order_of_the_questions(tmp_path):
    one = read_file(write(tmp_path / "coco_pope_random.json", POPE), Reading(suffix="One word."))
    records = (
        {"question": "is there a snowboard?", "answer": "yes"},
        {"question": "Is there a dining table?", "answer": "No"},
    )
    assert read_answers([write(tmp_path / "a.json", records)], [one], one.items) == ["yes", "No"]
    with pytest.raises(ValueError, match=r"record 1.*order"):
        read_answers([write(tmp_path / "a.json", records[::-1])], [one], one.items)
    with pytest.raises(ValueError, match="1 answers without ids, for 2"):
        read_answers([write(tmp_path / "a.json", records[:1])], [one], one.items)


def test_a_question_that_could_not_be_answered_has_no_answer(tmp_path, caplog):
    one = read_file(write(tmp_path / "coco_pope_random.json", POPE), Reading())
    lines = ({"id": 1, "error": "no picture"}, {"id": 2, "answer": "no"}, {"id": 3, "answer": "x"})
    assert read_answers([write(tmp_path / "a.json", lines)], [one], one.items) == [None, "no"]
    assert "1 answer belongs to no question" in caplog.text
