"""JSON lines and Parquet: the samples, errors and fingerprints of JSON, in little memory."""

from __future__ import annotations

import json
import os
import pickle
import random
import tracemalloc
from pathlib import Path

import pytest
from tiny_run import MIXED_CAPTIONS

from dataset import SampleError
from dataset.annotations import Annotations
from dataset.image_caption_dataset import open_annotations
from dataset.large_annotations import LargeAnnotations
from dataset.rows import JsonLines, ParquetRows

ASK = {"q": "A", "a": "B"}


def entry(key: object, number: object, images: object = None, **more: object) -> dict:
    return {"key": key, "image_file": images, "ID": number, "path": "/", **more}


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_json(path: Path, rows: list[dict], key: str) -> None:
    path.write_text(
        json.dumps({str(row[key]): {n: v for n, v in row.items() if n != key or n == "ID"} for row in rows})
    )


def write_parquet(path: Path, rows: list[dict]) -> None:
    pytest.importorskip("pyarrow")
    from dataprocess.output_forms import ParquetTable

    name = "key" if "key" in rows[0] else "ID"
    with path.open("wb") as stream:
        table = ParquetTable(stream, name)
        for row in rows:
            table.add(row[name], {field: value for field, value in row.items() if field != name})
        table.finish()


def write_all(folder: Path, entries: list[dict], captions: list[dict]) -> dict[str, tuple[Path, Path]]:
    """The same samples in three forms."""
    files = {end: (folder / f"map.{end}", folder / f"captions.{end}") for end in ("json", "jsonl", "parquet")}
    for end, (image_map, texts) in files.items():
        if end == "json":
            write_json(image_map, entries, "key")
            write_json(texts, captions, "ID")
            continue
        write = write_lines if end == "jsonl" else write_parquet
        write(image_map, entries)
        write(texts, captions)
    return files


def mixed(folder: Path) -> tuple[list[dict], list[dict]]:
    entries, captions = [], []
    for number, (images, caption) in enumerate(MIXED_CAPTIONS):
        entries.append(entry(f"键 {number}", number * 7 - 20, images, path=str(folder)))
        turns = {"q": caption[0], "a": caption[1]} if isinstance(caption, tuple) else caption
        captions.append({"ID": number * 7 - 20, **turns})
    return entries, captions


ENDS = ["jsonl", "parquet"]


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("order", [1, -1])
def test_samples_and_fingerprint_are_those_of_json(tmp_path, end, order):
    entries, captions = mixed(tmp_path)
    files = write_all(tmp_path, entries, captions[::order])
    small, large = open_annotations(*files["json"]), open_annotations(*files[end])
    assert isinstance(large, LargeAnnotations)
    assert type(small) is Annotations
    assert list(large) == list(small) == [large[index] for index in range(len(large))]
    assert len(large) == len(MIXED_CAPTIONS)
    assert large.fingerprint == small.fingerprint
    few = open_annotations(*files[end], max_samples=5)
    assert list(few) == list(small)[:5]
    assert few.fingerprint == open_annotations(*files["json"], max_samples=5).fingerprint


@pytest.mark.parametrize("end", ENDS)
def test_bad_samples_are_those_of_json(tmp_path, end):
    entries, captions = mixed(tmp_path)
    entries[2]["image_file"] = ["../x.png", "y.png"]
    entries[4]["ID"] = entries[3]["ID"]
    entries[5]["ID"] = 10_000
    entries[6]["path"], entries[6]["image_file"] = "/no such folder", "a.png"
    captions[7]["a"] = " "
    captions[8]["q"] = "no picture"
    files = write_all(tmp_path, entries, captions)
    small, large = (open_annotations(*files[name], skip_bad=True) for name in ("json", end))
    assert len(small.errors) == 6
    assert [error.replace(f"map.{end}", "map.json") for error in large.errors] == small.errors
    assert list(large) == list(small)
    assert large.fingerprint == small.fingerprint
    with pytest.raises(SampleError, match="6 bad samples"):
        open_annotations(*files[end])


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("seed", range(4))
def test_any_order_with_rows_missing_on_both_sides_gives_the_samples_of_json(tmp_path, end, seed):
    drawn = random.Random(seed)
    entries = [entry(str(number), number, drawn.choice([None, None, "../x.png"])) for number in range(40)]
    captions = [{"ID": number, **ASK, "a": f"answer {number}"} for number in range(50) if drawn.random() < 0.8]
    if seed % 2:
        drawn.shuffle(captions)
    files = write_all(tmp_path, entries, captions)
    small, large = (open_annotations(*files[name], skip_bad=True) for name in ("json", end))
    assert list(large) == list(small)
    assert [error.replace(f"map.{end}", "map.json") for error in large.errors] == small.errors
    assert len(small.errors) > 5


def test_opening_decodes_each_line_once(tmp_path, monkeypatch):
    """Twice as much would take ten million samples minutes longer; a bad entry in between changes nothing."""
    entries = [entry(str(number), number) for number in range(50)]
    entries[20]["image_file"] = "../x.png"
    files = write_all(tmp_path, entries, [{"ID": number, **ASK} for number in range(55)])["jsonl"]
    decode, lines = JsonLines._decode, []
    monkeypatch.setattr(JsonLines, "_decode", lambda self, line, where: lines.append(1) or decode(self, line, where))
    assert len(open_annotations(*files, skip_bad=True)) == 49
    assert len(lines) == 50 + 55
    lines.clear()
    assert len(open_annotations(*files, max_samples=10)) == 10
    assert len(lines) < 25  # of the rest, nothing


@pytest.mark.parametrize("end", ENDS)
def test_they_can_be_read_by_workers_of_any_kind(tmp_path, end):
    files = write_all(tmp_path, *mixed(tmp_path))
    large = open_annotations(*files[end])
    expected = list(large)
    assert list(pickle.loads(pickle.dumps(large))) == expected
    child = os.fork()
    if child == 0:
        same = False
        try:
            same = [large[index] for index in (11, 0, 5)] == [expected[index] for index in (11, 0, 5)]
        finally:
            os._exit(not same)
    assert list(large) == expected
    assert os.waitpid(child, 0)[1] == 0


BAD_FILES = {
    "no JSON": (['{"key": "a"', ""], "line 1"),
    "no object": (["[1]"], "object"),
    "two in a line": (['{"key": "a"} {"key": "b"}'], "line 1.*Extra data"),
    "a key twice in one object": (['{"key": "a", "ID": 1, "ID": 2, "image_file": null}'], "'ID' stands twice"),
    "no UTF-8": ([b'{"key": "\xff"}'], "line 1"),
    "no key": (['{"image_file": null, "ID": 0}'], "row 1.*`key`"),
    "the same key": (
        [json.dumps(entry("a", 0)), "", json.dumps(entry("b", 1)), json.dumps(entry("a", 1))],
        "rows 1 and 3",
    ),
    "nothing": ([""], "no samples"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_file_that_is_damaged_is_refused(tmp_path, case):
    lines, message = BAD_FILES[case]
    (tmp_path / "map.jsonl").write_bytes(b"".join((x if isinstance(x, bytes) else x.encode()) + b"\n" for x in lines))
    write_lines(tmp_path / "captions.jsonl", [{"ID": 0, **ASK}, {"ID": 1, **ASK}])
    with pytest.raises(ValueError, match=message):
        open_annotations(tmp_path / "map.jsonl", tmp_path / "captions.jsonl", skip_bad=True)


def test_captions_that_are_damaged_are_refused(tmp_path):
    write_lines(tmp_path / "map.jsonl", [entry("a", 0)])
    for rows, message in (([{"ID": 5, **ASK}] * 2, "ID 5 stands in rows 1 and 2"), ([{"ID": "0", **ASK}], "row 1: ID")):
        write_lines(tmp_path / "captions.jsonl", rows)
        with pytest.raises(ValueError, match=message):
            open_annotations(tmp_path / "map.jsonl", tmp_path / "captions.jsonl")


def test_other_files_are_refused(tmp_path):
    write_lines(tmp_path / "map.jsonl", [entry("a", 0)])
    write_json(tmp_path / "captions.json", [{"ID": 0, **ASK}], "ID")
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 or not")
    for name, message in {
        "captions.json": "both",
        "missing.jsonl": "cannot read",
        "pipe.jsonl": "regular file",
        "missing.parquet": "cannot read",
        "broken.parquet": "Parquet",
    }.items():
        if name.endswith("parquet"):
            pytest.importorskip("pyarrow")
        with pytest.raises(ValueError, match=message):
            open_annotations(tmp_path / "map.jsonl", tmp_path / name)


def test_a_byte_order_mark_and_empty_lines_cost_nothing(tmp_path):
    write_lines(tmp_path / "captions.jsonl", [{"ID": number, **ASK} for number in range(3)])
    lines = [json.dumps(entry(str(number), number)) for number in range(3)]
    (tmp_path / "map.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n\n  \n".join(["", *lines]).lstrip().encode())
    large = open_annotations(tmp_path / "map.jsonl", tmp_path / "captions.jsonl")
    assert [sample.id for sample in large] == [0, 1, 2]


def test_a_file_that_changes_while_it_is_used_is_noticed(tmp_path):
    files = write_all(tmp_path, *mixed(tmp_path))["jsonl"]
    large = open_annotations(*files)
    with files[1].open("a") as file:
        file.write("\n")
    with pytest.raises(ValueError, match="changed"):
        large[0]
    with pytest.raises(ValueError, match="changed"):
        list(large)


def test_a_parquet_file_in_large_pieces_is_refused(tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    files = write_all(tmp_path, *mixed(tmp_path))["parquet"]
    monkeypatch.setattr("dataset.rows.MOST_GROUP_BYTES", 100)
    with pytest.raises(ValueError, match=r"row groups of .*row_group_size"):
        open_annotations(*files)


def test_a_table_of_other_programs_is_read(tmp_path):
    """One image as text, question and answer as columns, some rows with turns, and columns that are not ours."""
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    entries = [{"key": "a", "image_file": "x.png", "ID": 1, "path": "/", "url": "?"}, entry("b", 2)]
    captions = [
        {"ID": 1, "q": "<|extra_0|>", "a": "one", "turns": None},
        {"ID": 2, "q": None, "a": None, "turns": [{"q": "c", "a": "d"}]},
    ]
    parquet.write_table(pa.Table.from_pylist(entries), tmp_path / "map.parquet", row_group_size=1)
    parquet.write_table(pa.Table.from_pylist(captions), tmp_path / "captions.parquet")
    one, two = open_annotations(tmp_path / "map.parquet", tmp_path / "captions.parquet")
    assert (one.image_files, one.turns) == (["x.png"], [("<|extra_0|>", ["one"])])
    assert (two.image_files, two.turns) == ([], [("c", ["d"])])


def test_a_missing_pyarrow_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "map.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match=r"pip install -r parquet-requirements\.txt"):
        ParquetRows(tmp_path / "map.parquet")


@pytest.mark.parametrize("end", ENDS)
def test_memory_grows_by_a_few_bytes_a_sample(tmp_path, end):
    """Texts stay on the disk: what is kept is where the rows are, whatever their length."""
    kept = []
    for number in (1_000, 5_000):
        entries = [entry(f"key {i}", i, f"{i:020d}.jpg", path=str(tmp_path)) for i in range(number)]
        captions = [{"ID": i, "q": "<|extra_0|>" * 1 + "Q" * 200, "a": "A" * 300} for i in range(number)]
        files = write_all(tmp_path, entries, captions)[end]
        open_annotations(*files, max_samples=1)  # what is imported on use does not count
        tracemalloc.start()
        large = open_annotations(*files)
        large[number // 2]
        kept.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
        assert len(large) == number
    assert (kept[1] - kept[0]) / 4_000 < 32
