"""From annotation files to the two files that training reads, through the command that people call."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from dataprocess import process_image
from dataprocess.ai_challenger import PROMPTS, choose_prompt
from dataprocess.file_lock import hold
from dataprocess.llava import place_images
from dataprocess.records import PLACEHOLDER, DataError
from dataprocess.writing import Outputs

SCRIPT = Path(process_image.__file__)
FIVE = ["一只猫在睡觉", "猫躺在沙发上", "沙发上有一只猫", "一只 正在睡觉的猫 ", "猫😀"]


def ai(image: object, captions: object = FIVE) -> dict:
    return {"url": "http://example.com/1", "image_id": image, "caption": captions}


def llava(image: object, *texts: object) -> dict:
    speakers = ["human", "gpt"] * len(texts)
    talk = [{"from": speaker, "value": text} for speaker, text in zip(speakers, texts, strict=False)]
    return {"id": "1", "image": image, "conversations": talk}


class Project:
    """A folder with a configuration; ``run`` is the command, ``samples`` what training would see."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = {"output_image_map": "out/image_map.json", "output_captions": "out/captions.json"}

    def label(self, name: str, content: object) -> str:
        text = content if isinstance(content, bytes) else json.dumps(content).encode()
        (self.folder / name).write_bytes(text)
        return name

    def images(self, name: str, *files: str) -> str:
        (self.folder / name).mkdir(exist_ok=True)
        for file in files:
            Image.new("RGB", (8, 8), (255, 0, 0)).save(self.folder / name / file)
        return name

    def ali(self, content: object) -> Project:
        self.config["ali_image_path"] = self.images("ali")
        self.config["ali_image_path_label_file"] = self.label("a.json", content)
        return self

    def coco(self, *contents: object) -> Project:
        self.config["coco_image_path"] = self.images("coco")
        for number, content in enumerate(contents, 1):
            self.config[f"coco_image_path_label_file{number}"] = self.label(f"c{number}.json", content)
        return self

    def run(self, *flags: str) -> int:
        (self.folder / "config.yaml").write_text(json.dumps(self.config))
        return process_image.main(["--config", str(self.folder / "config.yaml"), *flags])

    def read(self, key: str) -> dict:
        return json.loads((self.folder / self.config[key]).read_text(encoding="utf-8"))

    def samples(self) -> list[tuple[str, object, dict]]:
        captions = self.read("output_captions")
        entries = list(self.read("output_image_map").values())
        assert sorted(str(entry["ID"]) for entry in entries) == sorted(captions)
        assert len({entry["ID"] for entry in entries}) == len(entries)
        assert all(type(entry["ID"]) is int and Path(entry["path"]).is_absolute() for entry in entries)
        return [(Path(entry["path"]).name, entry["image_file"], captions[str(entry["ID"])]) for entry in entries]

    def rejects(self) -> list[dict]:
        path = self.folder / "out/captions_rejects.jsonl"
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    def outputs(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted((self.folder / "out").iterdir())}


@pytest.fixture
def project(tmp_path) -> Project:
    return Project(tmp_path)


@pytest.fixture
def before(project) -> dict[str, bytes]:
    """The outputs of an earlier run; `project` now has two other records, one of them bad."""
    assert project.ali([ai("old.jpg", ["old"])]).run() == 0
    project.ali([ai("new.jpg", ["new"]), ai("2.jpg", [])])
    return project.outputs()


def test_ai_challenger_keeps_all_five_captions_as_they_are(project):
    project.config["seed"] = 7
    assert project.ali([ai(f"{index}.jpg") for index in range(20)]).run() == 0
    samples = project.samples()
    assert [(folder, image) for folder, image, _ in samples] == [("ali", f"{index}.jpg") for index in range(20)]
    assert [caption for _, _, caption in samples] == [{"q": choose_prompt(7, i), "a": FIVE} for i in range(20)]
    assert PROMPTS == ("这幅图像描述了什么？<|extra_0|>", "<|extra_0|>这幅图像中有什么？")


def test_prompts_are_half_and_half_by_the_seed():
    for number in (10, 1000, 1001):
        counts = Counter(choose_prompt(42, index) for index in range(number))
        assert abs(counts[PROMPTS[0]] - counts[PROMPTS[1]]) <= 1
    # Another choice would give everybody other data for the same seed.
    assert "".join(str(PROMPTS.index(choose_prompt(42, index))) for index in range(24)) == "010101010101010110101010"
    one, two = ([choose_prompt(seed, index) for index in range(100)] for seed in (1, 2))
    assert one != two
    assert one != [PROMPTS[0], PROMPTS[1]] * 50


@pytest.mark.parametrize(
    ("raw", "placed"),
    [
        ("<image>\nWhat is this?", "<|extra_0|>What is this?"),
        ("What is this?\n<image>", "What is this?<|extra_0|>"),
        ("<image>\n\nWhat?\n", "<|extra_0|>\nWhat?\n"),
        ("<image>\r\nWhat?", "<|extra_0|>What?"),
        ("<image>\n<image>\nSame?", "<|extra_0|><|extra_0|>Same?"),
    ],
)
def test_placeholder_stands_where_the_image_stood(raw, placed):
    assert place_images(raw) == (placed, raw.count("<image>"))


def test_llava_turns_no_image_and_two_images(project):
    several = llava("1.jpg", "<image>\nA?", "a\n<image> <|extra_0|> <|im_end|>", "B\nC?", "b")
    none = {"id": 1, "conversations": llava(None, "Hello", "Hi")["conversations"]}
    two = llava(["1.jpg", "sub/2.jpg"], "<image> or\n<image>", "both")
    assert project.coco([several, none, two, llava(["3.jpg"], "<image>", "one")]).run() == 0
    turns = {"turns": [{"q": "<|extra_0|>A?", "a": "a\n<image> <|extra_0|> <|im_end|>"}, {"q": "B\nC?", "a": "b"}]}
    assert project.samples() == [
        ("coco", "1.jpg", turns),
        ("coco", None, {"q": "Hello", "a": "Hi"}),
        ("coco", ["1.jpg", "sub/2.jpg"], {"q": "<|extra_0|> or<|extra_0|>", "a": "both"}),
        ("coco", "3.jpg", {"q": "<|extra_0|>", "a": "one"}),
    ]


def test_one_photo_in_many_places_keeps_every_sample(project):
    """In the original, two files about one photo overwrote each other, and a repeated name shifted all later IDs."""
    same = "000000000001.jpg"
    project.ali([ai(same, ["甲"]), ai("2.jpg", ["乙"]), ai(same, ["丙"])])
    project.coco(
        [llava(same, "<image>\nq1", "a1"), llava(same, "<image>\nq2", "a2"), llava("9.jpg", "<image>", "a3")],
        [llava(same, "<image>\nq4", "a4"), llava(same, "<image>\nq1", "a1")],
    )
    more = project.label("m.json", [llava(same, "<image>", "a6")])
    project.config["llava_sources"] = [{"image_path": project.images("more"), "label_file": more}] * 2
    assert project.run() == 0
    assert [(folder, image, caption["a"]) for folder, image, caption in project.samples()] == [
        ("ali", same, ["甲"]),
        ("ali", "2.jpg", ["乙"]),
        ("ali", same, ["丙"]),
        ("coco", same, "a1"),
        ("coco", same, "a2"),
        ("coco", "9.jpg", "a3"),
        ("coco", same, "a4"),
        ("coco", same, "a1"),
        ("more", same, "a6"),
        ("more", same, "a6"),
    ]


def test_same_input_same_bytes_from_any_folder(project, tmp_path_factory):
    project.ali([ai(f"{index}.jpg") for index in range(50)]).coco([llava(None, "q", 3), llava(None, "q", "a")])
    assert project.run() == 0
    first = project.outputs()
    command = [sys.executable, str(SCRIPT), "--config", "../" * 20 + str(project.folder / "config.yaml")]
    for seed in "12":
        environment = os.environ | {"PYTHONHASHSEED": seed}
        done = subprocess.run(command, cwd=tmp_path_factory.mktemp("elsewhere"), env=environment, check=True)
        assert done.returncode == 0
        assert project.outputs() == first


def test_default_config_is_the_one_beside_the_script(tmp_path, monkeypatch, capsys):
    """In the original, config.yaml was found only from its own folder."""
    asked = []

    def load_config(path: Path, **_: object) -> None:
        asked.append(path)
        raise DataError("stop here")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(process_image, "load_config", load_config)
    assert process_image.main([]) == 2
    assert asked == [SCRIPT.parent / "config.yaml"]
    assert asked[0].is_file()
    assert capsys.readouterr().err == "process_image: error: stop here\n"


def test_command_needs_no_torch_and_keeps_stdout_for_the_table(project):
    assert project.ali([ai("1.jpg"), ai("2.jpg", None)]).run() == 0
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['x', '--config', {str(project.folder / 'config.yaml')!r}]\n"
        f"try: runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0\n"
        "ours = {'qwen', 'model', 'visual', 'torch', 'transformers'} & set(sys.modules)\n"
        "assert not ours, ours\n"
        "assert 'dataset' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["source", "records", "samples", "images", "rejects"]
    assert lines[1].split() == ["ai_challenger", "2", "1", "1", "1"]
    assert lines[2].split() == ["total", "2", "1", "1", "1"]
    assert lines[3:] == ["left out of ai_challenger: 1 record: no caption"]
    assert "100%" in done.stderr


def test_placeholder_is_the_language_models_own():
    from qwen.tokenization_qwen import IMAGE_TOKEN

    assert PLACEHOLDER == IMAGE_TOKEN


BAD_AI = [
    ({}, "no image_id and no caption"),
    (ai(7), "image name is not text"),
    (ai("../1.jpg"), "leads out"),
    (ai("1.jpg", "a single text"), "not a list"),
    (ai("1.jpg", ["", " \n", None, 3, "\udfff"]), "no usable caption"),
]


@pytest.mark.parametrize(("record", "reason"), BAD_AI)
def test_bad_record_is_listed_with_its_reason_and_costs_nobody_else(project, record, reason):
    good = ai("0.jpg", ["好"])
    assert project.ali([good, record, good]).run() == 0
    assert [caption["a"] for _, _, caption in project.samples()] == [["好"]] * 2
    assert [entry["ID"] for entry in project.read("output_image_map").values()] == [0, 2]
    whole = [line for line in project.rejects() if "caption" not in line]
    assert [line["record"] for line in whole] == [1]
    assert reason in whole[0]["reason"]
    assert set(whole[0]) == {"source", "label_file", "record", "image", "reason", "detail"}


def test_a_repeated_key_loses_no_answer_unnoticed(project):
    turns = '{"from": "human", "value": "q"}, {"from": "gpt", "value": "right", "value": "wrong"}'
    good = json.dumps(llava(None, "q", "a"))
    assert project.coco(f'[{{"conversations": [{turns}]}}, {good}]'.encode()).run() == 0
    assert [caption["a"] for _, _, caption in project.samples()] == ["a"]
    assert [(line["record"], line["reason"], line["detail"]) for line in project.rejects()] == [
        (0, "repeated key", "'value'")
    ]


def test_bad_captions_are_left_out_one_by_one_and_listed(project, capsys):
    assert project.ali([ai("1.jpg", ["一", "", None, 4, "\ud800", "二"])]).run() == 0
    assert project.samples()[0][2]["a"] == ["一", "二"]
    assert [line["caption"] for line in project.rejects()] == [1, 2, 3, 4]
    assert "2 captions: caption is not text" in capsys.readouterr().out


def test_unusable_file_is_one_error_and_leaves_earlier_outputs(project, before, capfd):
    assert project.ali(b'[{"image_id": "1.jpg"},\n {"image_id": }]').run() == 2
    error = capfd.readouterr().err
    assert "line 2 column 15 (character 38)" in error
    assert "Traceback" not in error
    assert project.outputs() == before


def test_a_photo_that_sources_share_counts_once_in_the_sum(project, capsys):
    photo = llava("1.jpg", "<image>", "a")
    assert project.coco([photo, photo], [photo, llava("2.jpg", "<image>", "b")]).run() == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[1:] == [["coco_1", "2", "2", "1", "0"], ["coco_2", "2", "2", "2", "0"], ["total", "4", "4", "2", "0"]]


def test_check_images_leaves_out_and_lists_what_training_could_not_open(project, capsys):
    names = ["good.jpg", "missing.jpg", "cut.jpg", "text.jpg", "link.jpg"]
    project.ali([ai(name) for name in names])
    project.coco(
        [llava(["a.jpg", "b.jpg"], "<image><image>", "x"), llava(None, "q", "a"), llava("a.jpg", "<image>", "y")]
    )
    project.images("ali", "good.jpg", "cut.jpg")
    project.images("coco", "a.jpg")
    cut = project.folder / "ali/cut.jpg"
    cut.write_bytes(cut.read_bytes()[:-200])
    (project.folder / "ali/text.jpg").write_text("hello")
    (project.folder / "ali/link.jpg").symlink_to(project.folder / "coco/a.jpg")
    assert project.run() == 0
    assert len(project.samples()) == 8
    assert project.run("--check_images") == 0
    assert [image for _, image, _ in project.samples()] == ["good.jpg", None, "a.jpg"]
    assert [entry["ID"] for entry in project.read("output_image_map").values()] == [0, 6, 7]
    assert [(line["source"], line["record"], line["reason"]) for line in project.rejects()] == [
        ("ai_challenger", 1, "missing"),
        ("ai_challenger", 2, "image cut short or damaged"),
        ("ai_challenger", 3, "not an image"),
        ("ai_challenger", 4, "link leads out of its folder"),
        ("coco_1", 0, "missing"),
    ]
    assert "left out of ai_challenger: 1 record: missing" in capsys.readouterr().out
    assert project.run("--check_images", "--allow_links") == 0
    assert [image for _, image, _ in project.samples()] == ["good.jpg", "link.jpg", None, "a.jpg"]


@pytest.mark.parametrize("step", range(1, 7))
def test_failing_while_files_are_put_in_place_restores_the_earlier_ones(project, before, monkeypatch, step, capfd):
    real, calls = os.replace, []

    def fails_once(source, target):
        calls.append(target)
        if len(calls) == step:
            raise OSError(28, "No space left on device", str(target))
        real(source, target)

    monkeypatch.setattr(os, "replace", fails_once)
    assert project.run() == 2
    assert "No space left" in capfd.readouterr().err
    assert project.outputs() == before


def test_full_disk_leaves_earlier_outputs(project, before):
    project.ali([ai(f"{index}.jpg") for index in range(9000)])
    (project.folder / "config.yaml").write_text(json.dumps(project.config))
    limited = f'ulimit -f 200; exec "{sys.executable}" "{SCRIPT}" --config "{project.folder}/config.yaml"'
    done = subprocess.run(["bash", "-c", limited], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "cannot be written: File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert project.outputs() == before


def test_interrupt_leaves_earlier_outputs(project, before, monkeypatch, capfd):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Outputs, "write", interrupted)
    assert project.run() == 130
    assert "Traceback" not in capfd.readouterr().err
    assert project.outputs() == before


def test_output_may_be_a_link(project):
    project.ali([ai("1.jpg")])
    (project.folder / "out").mkdir()
    (project.folder / "out/captions.json").symlink_to("../elsewhere.json")
    assert project.run() == 0
    assert (project.folder / "out/captions.json").is_symlink()
    assert len(json.loads((project.folder / "elsewhere.json").read_text())) == 1


def test_a_second_process_is_refused_and_told_who_writes(project, before, capfd):
    with hold(project.folder / "out/image_map.json"):
        assert project.run() == 2
        error = capfd.readouterr().err
        assert {name: content for name, content in project.outputs().items() if name[0] != "."} == before
    assert re.search(rf"image_map.json: process {os.getpid()} on ", error)
    assert "Traceback" not in error
    assert project.run() == 0


@pytest.mark.parametrize("step", range(7))
def test_a_kill_never_leaves_captions_next_to_another_image_map(project, before, step):
    """Killed before the given rename, the last of which makes the new captions visible."""
    if (child := os.fork()) == 0:
        real, calls = os.replace, iter(range(100))
        os.replace = lambda *paths: os._exit(9) if next(calls) == step else real(*paths)
        os._exit(project.run())
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == (9 if step < 6 else 0)
    if (project.folder / "out/captions.json").exists():
        ((_, image, caption),) = project.samples()
        assert [image.removesuffix(".jpg")] == caption["a"] == ["old" if step == 0 else "new"]
    else:
        assert 0 < step < 6


def test_written_bytes_are_stable(project):
    """Other people's scripts read these files: a change of their form must be meant."""
    project.coco([llava("1.jpg", "<image>\n问", "答"), llava(None, "q", "a", "q", "b")])
    assert project.run() == 0
    folder = json.dumps(str(project.folder / "coco"), ensure_ascii=False)
    outputs = project.outputs()
    assert outputs["image_map.json"].decode() == (
        f'{{\n"coco_1/000000/1.jpg": {{"image_file": "1.jpg", "ID": 0, "path": {folder}}},\n'
        f'"coco_1/000001": {{"image_file": null, "ID": 1, "path": {folder}}}\n}}\n'
    )
    assert outputs["captions.json"].decode() == (
        '{\n"0": {"q": "<|extra_0|>问", "a": "答"},\n"1": {"turns": [{"q": "q", "a": "a"}, {"q": "q", "a": "b"}]}\n}\n'
    )


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_other_forms_hold_the_same(project, ending):
    project.ali([ai(f"{index}.jpg") for index in range(1001)])  # more than a row group of Parquet
    project.coco([llava(["a.jpg", "b.jpg"], "<image><image>", "x", "C", "c"), llava(None, "q", "a")])
    assert project.run() == 0
    expected = project.read("output_image_map"), project.read("output_captions")
    project.config |= {"output_image_map": f"out/map.{ending}", "output_captions": f"out/texts.{ending}"}
    assert project.run() == 0
    first = project.outputs()
    assert project.run() == 0
    assert project.outputs() == first
    files = [project.folder / "out" / f"{name}.{ending}" for name in ("map", "texts")]
    if ending == "jsonl":
        entries, captions = ([json.loads(line) for line in file.read_text().splitlines()] for file in files)
    else:
        parquet = pytest.importorskip("pyarrow.parquet")
        assert [parquet.ParquetFile(file).metadata.row_group(0).num_rows for file in files] == [1000, 1000]
        entries, captions = (parquet.read_table(file).to_pylist() for file in files)
        for entry in entries:
            names = entry["image_file"] or [None]
            entry["image_file"] = names if len(names) > 1 else names[0]
        for caption in captions:
            turns = caption.pop("turns")
            turns = [{"q": turn["q"], "a": turn["a"] if len(turn["a"]) > 1 else turn["a"][0]} for turn in turns]
            caption |= turns[0] if len(turns) == 1 else {"turns": turns}
    assert {entry.pop("key"): entry for entry in entries} == expected[0]
    assert {str(caption.pop("ID")): caption for caption in captions} == expected[1]


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_a_failure_leaves_earlier_outputs_of_other_forms(project, ending, capfd):
    if ending == "parquet":
        pytest.importorskip("pyarrow")
    project.config |= {"output_image_map": f"out/map.{ending}", "output_captions": f"out/texts.{ending}"}
    assert project.ali([ai("old.jpg", ["old"])]).run() == 0
    before = project.outputs()
    assert project.ali([ai("1.jpg", [])]).run() == 2
    assert project.ali(b"[" + json.dumps(ai("1.jpg")).encode()).run() == 2
    drawn = random.Random(0)  # does not compress
    project.ali([ai(f"{index}.jpg", [drawn.randbytes(100).hex()]) for index in range(9000)])
    assert "Exception ignored" not in capfd.readouterr().err
    (project.folder / "config.yaml").write_text(json.dumps(project.config))
    limited = f'ulimit -f 200; exec "{sys.executable}" "{SCRIPT}" --config "{project.folder}/config.yaml"'
    done = subprocess.run(["bash", "-c", limited], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "cannot be written: File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert project.outputs() == before


def test_a_missing_pyarrow_is_one_line(project, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    project.config["output_image_map"] = "out/map.parquet"
    assert project.ali([ai("1.jpg")]).run() == 2
    assert "pip install -r parquet-requirements.txt" in capsys.readouterr().err


def test_records_in_json_lines_are_those_of_an_array(project, capsys):
    records = [ai("1.jpg"), ai("2.jpg", []), 7, ai("3.jpg", ["三"])]
    assert project.ali(records).run() == 0
    expected = [project.read(key) for key in ("output_image_map", "output_captions")]
    reasons = [line["reason"] for line in project.rejects()]
    lines = "\ufeff" + "\n\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    (project.folder / "a.jsonl").write_text(lines, encoding="utf-8")
    project.config["ali_image_path_label_file"] = "a.jsonl"
    assert project.run() == 0
    assert [project.read(key) for key in ("output_image_map", "output_captions")] == expected
    assert [line["reason"] for line in project.rejects()] == reasons
    (project.folder / "a.jsonl").write_text(lines + '\n{"image_id": "4.jpg", "caption": ["x"], "caption": ["y"]}')
    assert project.run() == 0
    assert project.rejects()[-1]["reason"] == "repeated key"
    for broken in (b'{"image_id":\n', b'"\xff"\n'):
        (project.folder / "a.jsonl").write_bytes(b"{}\n\n" + broken)
        assert project.run() == 2
        assert "line 3" in capsys.readouterr().err
