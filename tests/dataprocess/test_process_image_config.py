"""The configuration file: what is accepted, and that every mistake in it is told, all at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from dataprocess import process_image
from dataprocess.config import KNOWN_KEYS, load_config
from dataprocess.records import DataError

OUT = {"output_image_map": "out/m.json", "output_captions": "out/c.json"}
ALI = {"ali_image_path": "photos", "ali_image_path_label_file": "a.json"}
COCO = {"coco_image_path": "photos", "coco_image_path_label_file1": "c.json"}


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "photos").mkdir()
    (tmp_path / "a.json").write_text('[{"image_id": "1.jpg", "caption": ["x"]}]')
    (tmp_path / "c.json").write_text("[]")
    (tmp_path / "link.json").symlink_to("a.json")
    return tmp_path


def load(folder: Path, values: dict | str, **how):
    path = folder / "config.yaml"
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values, allow_unicode=True))
    return load_config(path, **how)


def problems(folder: Path, values: dict | str, **how) -> str:
    with pytest.raises(DataError) as caught:
        load(folder, values, **how)
    return str(caught.value)


def test_shipped_config_has_every_key_and_only_known_ones():
    path = Path(process_image.__file__).with_name("config.yaml")
    shipped = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert set(shipped) == set(KNOWN_KEYS) - {"llava_sources"}
    assert "# llava_sources:" in path.read_text(encoding="utf-8")
    assert all(value.startswith("../data/") for value in shipped.values() if isinstance(value, str))


def test_sources_come_in_order_with_absolute_paths(folder, monkeypatch):
    monkeypatch.chdir("/")
    monkeypatch.setenv("HOME", str(folder))
    values = ALI | COCO | OUT | {"coco_image_path_label_file2": "~/c.json"}
    values["llava_sources"] = [{"image_path": "photos/", "label_file": str(folder / "c.json")}]
    config = load(folder, values)
    assert [source.name for source in config.sources] == ["ai_challenger", "coco_1", "coco_2", "llava_1"]
    assert {source.image_path for source in config.sources} == {str(folder / "photos")}
    assert [source.label_file for source in config.sources] == [folder / name for name in ("a.json", *["c.json"] * 3)]
    assert config.output_captions == folder / "out/c.json"
    assert config.output_rejects == folder / "out/c_rejects.jsonl"
    assert config.seed == 42


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"coco_image_path": "photos", "coco_image_path_label_file2": "c.json"}, ["coco_2"]),
        (COCO | {"ali_image_path": None, "ali_image_path_label_file": ""}, ["coco_1"]),
    ],
)
def test_a_source_whose_keys_are_absent_is_left_out(folder, values, names):
    assert [source.name for source in load(folder, values | OUT).sources] == names


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ali_image_path_label_file": "a.json"}, "ali_image_path is missing"),
        ({"coco_image_path": "photos"}, "coco_image_path_label_file1 or coco_image_path_label_file2 is missing"),
        ({"coco_image_path_label_file2": "c.json"}, "coco_image_path is missing"),
        (ALI | {"llava_sources": [{"image_path": "photos"}]}, "llava_sources, entry 1: label_file is missing"),
        (ALI | {"llava_sources": [{"image_path": "photos", "label_fil": "c.json"}]}, "did you mean label_file?"),
        (ALI | {"llava_sources": {"image_path": "photos"}}, "llava_sources must be a list"),
        (ALI | {"llava_sources": ["c.json"]}, "llava_sources, entry 1: must hold image_path and label_file"),
        (ALI | {"output_caption": "x"}, "unknown key 'output_caption': did you mean output_captions?"),
        (ALI | {"seed": "7"}, "seed must be a whole number"),
        (ALI | {"ali_image_path": 2017}, "ali_image_path must be a path"),
        (ALI | {"ali_image_path": "a.json"}, "no such folder"),
        (ALI | {"ali_image_path_label_file": "none.json"}, "no such file"),
        (ALI | {"ali_image_path": "~nobody-at-all/x"}, "home directory"),
        ({}, "no source"),
        (ALI | {"output_captions": "a.json"}, "would overwrite a label file"),
        (ALI | {"output_captions": "out/m.json"}, "would overwrite output_image_map"),
        (ALI | {"output_captions": "."}, "output_captions is not an ordinary file"),
        (ALI | {"output_captions": "link.json"}, "output_captions would overwrite a label file"),
        (ALI | {"output_captions": "x" * 300}, "File name too long"),
    ],
)
def test_mistakes(folder, values, message):
    assert message in problems(folder, OUT | values)


def test_all_mistakes_at_once(folder):
    text = problems(folder, {"ali_image_path": "photos", "coco_image": "x", "output_captions": 3, "seed": 1.5})
    for part in ("ali_image_path_label_file is missing", "unknown key", "output_image_map is missing", "seed must be"):
        assert part in text
    assert text.count("\n  - ") == 5
    assert "output_captions is missing" not in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ali_image_path: [", "line 1, column 18"),
        ("seed: 1\nseed: 2\n", "key 'seed' is repeated"),
        ("? [a, b]\n: 1\n", "not valid YAML"),
        ("!!python/object/apply:os.system ['true']", "not valid YAML"),
        ("seed: 2024-99-99", "not valid YAML"),
        ("- a", "must be a list of"),
    ],
)
def test_what_is_no_configuration_is_one_line(folder, text, message):
    error = problems(folder, text)
    assert message in error
    assert "\n" not in error


def test_encoding(folder):
    path = folder / "config.yaml"
    path.write_bytes("seed: 中".encode("gb18030"))
    with pytest.raises(DataError, match="not UTF-8"):
        load_config(path)
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(ALI | OUT).encode())
    assert len(load_config(path).sources) == 1


def test_image_folder_is_needed_only_for_checking(folder):
    values = ALI | OUT | {"ali_image_path": "later"}
    assert load(folder, values).sources[0].image_path == str(folder / "later")
    assert "no such folder" in problems(folder, values, need_images=True)


def test_command_exits_with_2_and_no_traceback(folder, capfd):
    assert process_image.main(["--config", str(folder / "none.yaml")]) == 2
    assert process_image.main(["--config", str(folder)]) == 2
    (folder / "config.yaml").write_text("sead: 1")
    assert process_image.main(["--config", str(folder / "config.yaml")]) == 2
    error = capfd.readouterr().err
    assert "Traceback" not in error
    with pytest.raises(SystemExit) as caught:
        process_image.main(["--conf", "x"])
    assert caught.value.code == 2
