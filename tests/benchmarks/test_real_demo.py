"""The demo on real parts, without its parts: pictures that are made here, and no model or a tiny random one."""

import json
import os
import random
import re
import subprocess

import pytest
import torch
from PIL import Image
from tiny_families import make_family
from tiny_run import ROOT
from tiny_towers import make_dinov2_checkpoint
from torch import nn

from benchmarks.real_parts import evaluate, page, prepare_data, stamps, standardise
from dataprocess import llava
from dataprocess.process_image import main as process_image
from model import VisionLanguageModel
from model.lora import LoraSettings
from visual import build_vision_tower

MADE = {
    "animals/birds/lark.png": "A lark.",
    "animals/fish/shrimp.png": "A shrimp.\nde.utf8=Eine Garnele.",
    "food/fruit/apple_red.png": "A red apple. Yum!",
    "town/houses/cartoon/fort.png": "A fort.",
    "town/flags/spain.png": "The flag of Spain.",
    "symbols/alphabets/a.png": "A",
    "vehicles/ship/tugboat.png": "A colorful toy tugboat.",
    "vehicles/ship/tugboat_mirror.png": "A colorful toy tugboat.",
}


@pytest.fixture
def folder(tmp_path):
    """Tux Paint's folders with some pictures, two of them equal, one without a caption."""
    rng = random.Random(0)
    source = tmp_path / "stamps"
    for path, caption in MADE.items():
        file = source / path
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGBA", (30, 20), (rng.randrange(256), rng.randrange(256), 90, 200)).save(file)
        file.with_suffix(".txt").write_text(caption, encoding="utf-8")
    copy = source / "animals/birds/same_lark.png"
    copy.write_bytes((source / "animals/birds/lark.png").read_bytes())
    copy.with_suffix(".txt").write_text("A bird.", encoding="utf-8")
    Image.new("L", (9, 9)).save(source / "food/nothing.png")
    return source


@pytest.mark.parametrize(
    "words",
    [
        ("--wrong",),
        ("--web", "extra"),
        ("--real", "--pictures"),
        ("--real", "--pictures", ""),
        ("--real", "--pictures", "/", "extra"),
    ],
)
def test_what_the_demonstrations_do_not_take_is_one_line(words, tmp_path):
    environment = {"PATH": os.environ["PATH"], "OUTPUT": str(tmp_path / "out"), "VENV": str(tmp_path / "venv")}
    done = subprocess.run(["sh", "demo.sh", *words], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"demo\.sh: .+\n", done.stderr)
    assert list(tmp_path.iterdir()) == []


def test_kinds_come_from_folders_and_signs_are_left_out(folder):
    pictures = stamps.load_pictures(folder)
    assert [(p.path, p.kind, p.caption) for p in pictures] == [
        ("animals/birds/lark.png", "animal", "A lark."),
        ("animals/fish/shrimp.png", "animal", "A shrimp."),
        ("food/fruit/apple_red.png", "food", "A red apple."),
        ("town/houses/cartoon/fort.png", "building", "A fort."),
        ("vehicles/ship/tugboat.png", "vehicle", "A colorful toy tugboat."),
    ]
    assert pictures[2].names == {"apple"}
    with pytest.raises(FileNotFoundError, match="animals"):
        stamps.load_pictures(folder / "symbols")


def made(number):
    kinds = ("animals/a", "food/f", "plants/p")
    return [
        stamps.Picture(f"{kinds[n * 3 // number]}{n:03}.png", kinds[n * 3 // number][:-2], "A.") for n in range(number)
    ]


def test_a_tenth_of_the_pictures_is_held_out():
    pictures = made(95)
    for offset in (0, 9):
        training, held_out = stamps.split(pictures, offset)
        assert len(held_out) in (9, 10)
        assert set(training) | set(held_out) == set(pictures)
        assert not set(training) & set(held_out)
        assert {p.kind for p in held_out} == {p.kind for p in training}


def test_no_copy_of_a_held_out_picture_is_trained_on(folder, tmp_path):
    """The altered copies go where their picture goes, and only the plain picture is asked about."""
    target = tmp_path / "annotations"
    prepare_data.write_annotations(folder, target, number=4)
    shown = json.loads((target / "pictures.json").read_text())
    held_out, training = ({p["path"] for p in shown[side]} for side in ("held_out", "training"))
    assert held_out == {"animals/birds/lark.png"}
    assert len(training) == 4
    records = json.loads((target / "llava.json").read_text())
    samples = [llava.parse(record) for record in records]
    files = {path.name for path in (target / "pictures").iterdir()}
    assert {sample.images[0] for sample in samples} == files
    assert len(files) == 4 * 4
    assert not any("lark" in name for name in files)
    assert len(samples) == 4 * (4 + prepare_data.NAMED_COPIES)
    asked = [(sample.turns[0][0].removeprefix("<|extra_0|>"), sample.turns[0][1]) for sample in samples]
    assert asked.count((prepare_data.KIND_QUESTION, "animal")) == 4
    assert asked.count((prepare_data.NAME_QUESTION, "A red apple.")) == prepare_data.NAMED_COPIES
    assert [path.name for path in (target / "held_out").iterdir()] == ["animals-birds-lark.0.png"]

    assert process_image(["--config", str(target / "config.yaml"), "--check_images"]) == 0
    image_map = json.loads((tmp_path / "image_map.json").read_text())
    assert len(image_map) == len(records)


def test_copies_are_squares_and_differ():
    image = Image.new("RGB", (60, 60), "white")
    image.paste("red", (5, 20, 25, 50))
    made = prepare_data.copies(image, 5, random.Random(0))
    assert made[0] is image
    assert {copy.size for copy in made} == {(60, 60)}
    assert len({copy.tobytes() for copy in made}) == 5
    assert made[1].getpixel((54, 30)) == (255, 0, 0)
    assert len(prepare_data.copies(image, 1, random.Random(0))) == 1


def test_standardised_features_are_those_of_a_layer_norm():
    torch.manual_seed(0)
    norm = nn.LayerNorm(6)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    hidden = torch.randn(40, 5, 6) * torch.tensor([1.0, 50, 1, 1, 0.1, 1])
    features = norm(hidden).detach()
    weight, bias = standardise.folded(norm.weight.detach(), norm.bias.detach(), features)
    folded = nn.functional.layer_norm(hidden, (6,), weight, bias).flatten(0, 1)
    torch.testing.assert_close(folded.mean(0), torch.zeros(6), rtol=0, atol=1e-5)
    torch.testing.assert_close(folded.std(0), torch.ones(6))
    flat = features.flatten(0, 1)
    torch.testing.assert_close(folded, (flat - flat.mean(0)) / flat.std(0), rtol=1e-4, atol=1e-5)


PICTURES = [
    {"file": "a.png", "path": "animals/a.png", "kind": "animal", "caption": "A red-nosed reindeer."},
    {"file": "b.png", "path": "food/b.png", "kind": "food", "caption": "A red apple."},
]


def test_answers_are_scored():
    reindeer, apple = PICTURES
    assert evaluate.is_right("kind", "Animal.", reindeer)
    assert not evaluate.is_right("kind", "animal food", reindeer)
    assert evaluate.is_right("name", "The reindeer!", reindeer)
    assert not evaluate.is_right("name", "A red bird.", apple)
    assert not evaluate.is_right("name", "", apple)
    assert evaluate.commonest([apple, apple, reindeer]) == {"kind": "food", "name": "apple"}


def test_nearest_training_pictures_vote():
    training = torch.tensor([[1.0, 0], [0.9, 0.1], [0.8, 0.3], [0, 5.0], [0.1, 1]])
    kinds = ["a", "b", "b", "c", "c"]
    held_out = torch.tensor([[3.0, 0], [0, 0.1]])
    assert evaluate.nearest_kinds(held_out, training, kinds, number=3) == ["b", "c"]
    assert evaluate.nearest_kinds(held_out, training, kinds, number=2) == ["a", "c"]


def test_the_blind_model_gets_another_picture_each_time():
    others = evaluate.other_pictures(torch.arange(44))
    assert sorted(others.tolist()) == list(range(44))
    assert not (others == torch.arange(44)).any()
    assert (others.diff() != 1).sum() > 20  # not its neighbours in order


def test_table_and_page_show_every_way_of_answering(tmp_path):
    asked = []

    def answer(question, pixels, max_new_tokens):
        asked.append((question, pixels[:, 0].tolist()))
        return ["animal" if value == 0 else "food" for value in pixels[:, 0].tolist()]

    shown = {"training": PICTURES[:1], "held_out": PICTURES}
    pixels = torch.tensor([[0.0], [1.0]])
    answers = evaluate.answer_all(answer, pixels, shown, ["animal", "animal"])
    assert [seen for _, seen in asked] == [[0, 1], [0, 1], [1, 0], [1, 0]]
    speech = [{"question": "Why?", "before": "<b>", "after": "So."}]
    shown_table = evaluate.write_results(tmp_path / "results", shown, answers, speech)
    results = json.loads((tmp_path / "results" / "results.json").read_text())
    assert results["model"] == {"kind": 1.0, "name": 0.0}
    assert results["blind"] == {"kind": 0.0, "name": 0.0}
    assert results["commonest"]["kind"] == 0.5
    assert results["neighbours"] == {"kind": 0.5}
    assert shown_table.splitlines()[1].split() == ["kind", "100.0%", "0.0%", "50.0%", "50.0%"]

    for picture in PICTURES:
        Image.new("RGB", (4, 4), "red").save(tmp_path / picture["file"])
    html = page.page(tmp_path / "results", tmp_path)
    assert html.count("data:image/png;base64,") == 2
    assert not re.search(r"(src|href)=\"(?!data:)", html)
    assert "&lt;b&gt;" in html
    assert 'class="right">animal' in html


def test_a_checkpoint_is_measured_and_shown(folder, tmp_path, monkeypatch):
    """Both programs, with tiny random models, from annotations to the page."""
    annotations, results = tmp_path / "annotations", tmp_path / "results"
    prepare_data.write_annotations(folder, annotations, number=2)
    language_model = make_family(tmp_path / "llama", "llama")
    published = make_dinov2_checkpoint(tmp_path / "dinov2")
    files = [annotations / "pictures" / path.name for path in sorted((annotations / "pictures").iterdir())]
    standardise.standardise(tmp_path / "dinov2", files, tmp_path / "tower")
    model = VisionLanguageModel.from_pretrained(
        language_model, str(tmp_path / "tower"), device="cpu", trainable=True, pixel_shuffle=2
    )
    model.add_lora(LoraSettings(rank=2, target_modules=None))
    model.save_checkpoint(tmp_path / "vlm")
    features = standardise.features_of(build_vision_tower(str(tmp_path / "tower")), files).flatten(0, 1)
    torch.testing.assert_close(features.mean(0), torch.zeros(features.shape[1]), rtol=0, atol=1e-4)

    flags = ["--model_weights", tmp_path / "vlm", "--annotations", annotations, "--tower", published]
    monkeypatch.setattr("sys.argv", ["evaluate", *map(str, flags), "--output", str(results)])
    evaluate.main()
    (record,) = json.loads((results / "answers.json").read_text())
    assert record["commonest kind"] in stamps.KINDS
    assert record["neighbours kind"] in stamps.KINDS
    speech = json.loads((results / "speech.json").read_text())
    assert len(speech) == 3
    assert all(said["before"] == said["after"] for said in speech)  # fresh LoRA changes nothing

    flags = ["--results", results, "--annotations", annotations, "--output", tmp_path / "answers.html"]
    monkeypatch.setattr("sys.argv", ["page", *map(str, flags)])
    page.main()
    assert (tmp_path / "answers.html").read_text(encoding="utf-8").count("<figure>") == 1
