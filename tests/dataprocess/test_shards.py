"""Pictures in tar shards: written by process_image.py, and read by our own readers, `tar` and WebDataset."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
from itertools import chain
from pathlib import Path

import pytest
from PIL import Image

from dataprocess import process_image, shards
from dataprocess.file_lock import hold
from dataprocess.image_bytes import content_key
from dataprocess.image_io import MAX_BYTES, ImageError, load_image, resolve_image_path

SIDES = [8, 40, 90, 60, 12, 30]


def picture(number: int, side: int) -> bytes:
    """A picture that does not compress, so that its size follows from its side."""
    image = Image.frombytes("RGB", (side, side), random.Random(number).randbytes(3 * side * side))
    file = io.BytesIO()
    image.save(file, ["PNG", "JPEG"][number % 2])
    return file.getvalue()


class Prepared:
    """Six pictures in two folders' worth of names, and samples that use some of them twice."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.photos = folder / "photos"
        self.shards = folder / "shards"
        (self.photos / "sub").mkdir(parents=True)
        self.names = ["a.png", "b.two.JPG", "sub/c.png", "d", "e.png", "f.x-y"]
        self.content = {name: picture(i, side) for i, (name, side) in enumerate(zip(self.names, SIDES, strict=True))}
        for name, content in self.content.items():
            (self.photos / name).write_bytes(content)
        self.samples = [[name] for name in self.names] + [["a.png", "sub/../a.png"], ["e.png", "d"], []]

    def run(self, *flags: object, out: str = "out") -> int:
        records = []
        for images in self.samples:
            question = "<image>" * len(images) + "?"
            talk = [{"from": "human", "value": question}, {"from": "gpt", "value": "yes"}]
            records.append({"image": images, "conversations": talk})
        (self.folder / "records.json").write_text(json.dumps(records))
        config = {"llava_sources": [{"image_path": str(self.photos), "label_file": "records.json"}]}
        config |= {"output_image_map": f"{out}/image_map.json", "output_captions": f"{out}/captions.json"}
        (self.folder / "config.yaml").write_text(json.dumps(config))
        return process_image.main(["--config", str(self.folder / "config.yaml"), *map(str, flags)])

    def places(self, out: str = "out") -> list[list[Path]]:
        """Where the pictures of each sample are, as training would ask for them."""
        entries = json.loads((self.folder / out / "image_map.json").read_text()).values()
        files = [entry["image_file"] for entry in entries]
        names = [[] if file is None else file if isinstance(file, list) else [file] for file in files]
        paths = [entry["path"] for entry in entries]
        return [[resolve_image_path(path, name) for name in row] for path, row in zip(paths, names, strict=True)]

    def written(self) -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in sorted(self.shards.iterdir())}


@pytest.fixture
def data(tmp_path) -> Prepared:
    return Prepared(tmp_path)


@pytest.fixture
def sharded(data) -> Prepared:
    assert data.run("--shards", data.shards, "--shard_bytes", 12_000) == 0
    return data


# ---- Written


def test_members_are_the_files_byte_for_byte_and_each_is_stored_once(sharded):
    found = {}
    for file in sorted(sharded.shards.glob("*.tar")):
        with tarfile.open(file) as tar:
            for member in tar:
                assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
                found[file.name, member.name, member.offset_data, member.size] = tar.extractfile(member).read()
    assert list(found.values()) == list(sharded.content.values())
    index = [json.loads(line) for line in (sharded.shards / "index.jsonl").read_text().splitlines()]
    assert [(one["shard"], one["member"], one["offset"], one["size"]) for one in index] == list(found)
    assert [one["image_file"] for one in index] == sharded.names
    names = [Path(one["member"]) for one in index]
    assert [name.suffix for name in names] == [".png", ".JPG", ".png", ".img", ".png", ".img"]
    assert len({name.stem for name in names}) == 6
    assert not any("." in name.stem for name in names), "WebDataset takes the name up to the first dot"


def test_a_shard_has_at_most_so_many_bytes_unless_one_picture_has_more(sharded):
    sizes = {}
    for file in sorted(sharded.shards.glob("*.tar")):
        with tarfile.open(file) as tar:
            sizes[file.name] = (file.stat().st_size, len(tar.getnames()))
    assert list(sizes) == [f"shard-{number:06d}.tar" for number in range(len(sizes))]
    assert len(sizes) > 2
    large = [members for size, members in sizes.values() if size > 12_000]
    assert large == [1], sizes
    assert max(members for _, members in sizes.values()) > 1


def test_tar_and_webdataset_read_them(sharded):
    files = [str(file) for file in sorted(sharded.shards.glob("*.tar"))]
    listed = [subprocess.check_output(["tar", "tf", file], text=True, stderr=subprocess.STDOUT) for file in files]
    assert len("".join(listed).split()) == 6
    webdataset = pytest.importorskip("webdataset")
    samples = list(webdataset.WebDataset(files, shardshuffle=False))
    stored = [next(value for key, value in sample.items() if not key.startswith("__")) for sample in samples]
    assert stored == list(sharded.content.values())


def test_the_other_outputs_differ_in_the_names_of_pictures_only(sharded):
    assert sharded.run(out="plain") == 0
    plain, packed = (json.loads((sharded.folder / out / "image_map.json").read_text()) for out in ("plain", "out"))
    assert list(plain) == list(packed)
    assert [entry["ID"] for entry in plain.values()] == [entry["ID"] for entry in packed.values()]
    for name in ("captions.json", "captions_rejects.jsonl"):
        assert (sharded.folder / "out" / name).read_bytes() == (sharded.folder / "plain" / name).read_bytes()


def test_the_same_input_gives_the_same_bytes_and_an_earlier_larger_run_leaves_nothing(sharded):
    first = sharded.written()
    assert sharded.run("--shards", sharded.shards, "--shard_bytes", 12_000) == 0
    assert sharded.written() == first
    assert sharded.run("--shards", sharded.shards) == 0
    assert sorted(sharded.written()) == ["index.jsonl", "shard-000000.tar"]


def test_pictures_that_cannot_be_read_cost_their_samples(data, monkeypatch):
    monkeypatch.setattr("dataprocess.image_io.MAX_BYTES", len(data.content["d"]) - 1)
    (data.photos / "a.png").unlink()
    (data.photos / "e.png").write_bytes(b"")
    (data.photos / "link.png").symlink_to("/etc/passwd")
    os.mkfifo(data.photos / "pipe.png")
    data.samples += [["link.png"], ["pipe.png"]]
    assert data.run("--shards", data.shards) == 0
    rejects = [json.loads(line) for line in (data.folder / "out/captions_rejects.jsonl").read_text().splitlines()]
    reasons = {0: "missing", 2: "image too large", 3: "image too large", 4: "empty file", 6: "missing", 7: "empty file"}
    reasons |= {9: "link leads out of its folder", 10: "not a regular file"}
    assert {one["record"]: one["reason"] for one in rejects} == reasons
    assert len((data.shards / "index.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("flags", [("--shard_bytes", "5"), ("--shards", "s", "--shard_bytes", "0")])
def test_flags_that_cannot_work(data, flags, capsys, monkeypatch):
    monkeypatch.chdir(data.folder)
    assert data.run(*flags) == 2
    assert "--shard_bytes" in capsys.readouterr().err
    assert not (data.folder / "s").exists()


def test_a_folder_of_something_else_and_one_that_is_taken_are_refused(data, capsys):
    data.shards.mkdir()
    foreign = data.shards / "shard-000000.tar"
    foreign.write_bytes(b"mine")
    assert data.run("--shards", data.shards) == 2
    assert "shard-000000.tar" in capsys.readouterr().err
    assert foreign.read_bytes() == b"mine"
    foreign.unlink()
    with hold(data.shards):
        assert data.run("--shards", data.shards) == 2
    assert "is writing to it" in capsys.readouterr().err
    assert list(data.shards.iterdir()) == []


@pytest.mark.parametrize("step", range(1, 14, 3))
def test_failing_while_shards_are_put_in_place_restores_the_earlier_ones(sharded, monkeypatch, step):
    before, real, calls = sharded.written(), os.replace, []
    (sharded.photos / "a.png").write_bytes(picture(3, 20))

    def fails_once(source, target):
        calls.append(target)
        if len(calls) == step:
            raise OSError(28, "No space left on device", str(target))
        real(source, target)

    monkeypatch.setattr(os, "replace", fails_once)
    assert sharded.run("--shards", sharded.shards, "--shard_bytes", 12_000) == 2
    assert sharded.written() == before
    assert load_image(sharded.places()[0][0]).size == (8, 8)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_kill_leaves_no_shard_and_the_next_run_starts_over(data, number):
    code = (
        "import signal, sys, time\n"
        "from dataprocess import process_image, shard_writing as shards\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        "finish = shards.ShardWriter.finish\n"
        "def slow(self): print('written', flush=True); time.sleep(60)\n"
        "shards.ShardWriter.finish = slow\n"
        "sys.exit(process_image.main(sys.argv[1:]))\n"
    )
    assert data.run(out="plain") == 0  # writes the configuration, too
    command = [sys.executable, "-c", code, "--config", data.folder / "config.yaml", "--shards", data.shards]
    process = subprocess.Popen([*command, "--shard_bytes", "12000"], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "written\n"
    process.send_signal(number)
    process.communicate()
    assert [name for name in data.written() if not name.startswith(".")] == []
    assert data.run("--shards", data.shards, "--shard_bytes", 12_000) == 0
    assert [name for name in data.written() if name.startswith(".")] == []
    assert len([load_image(path) for row in data.places() for path in row if "d" not in path.name]) > 5


# ---- Read


def test_pictures_are_those_of_the_files_and_so_are_their_keys(sharded):
    assert sharded.run(out="plain") == 0
    pairs = zip(chain(*sharded.places("plain")), chain(*sharded.places()), strict=True)
    for plain, packed in pairs:
        assert load_image(packed).tobytes() == load_image(plain).tobytes()
        assert content_key(packed) == content_key(plain) is not None


def damage(shard: Path, how: str, offset: int) -> None:
    content = bytearray(shard.read_bytes())
    if how == "cut":
        shard.write_bytes(content[: offset + 100])
    elif how == "cut before":
        shard.write_bytes(content[:100])
    elif how == "a bit":
        content[offset + 50] ^= 1
        shard.write_bytes(content)
    elif how == "another shard":
        shard.unlink()
        shard.write_bytes(bytes(512) + bytes(content))
    elif how == "empty":
        shard.write_bytes(b"")
    else:
        shard.unlink()
        {"missing": lambda: None, "folder": shard.mkdir, "pipe": lambda: os.mkfifo(shard)}[how]()


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("cut", "cut short or damaged.*shard ends"),
        ("cut before", "cut short or damaged.*shard ends"),
        ("a bit", "cut short or damaged.*checksum"),
        ("another shard", "cut short or damaged.*checksum"),
        ("empty", "cut short or damaged"),
        ("missing", "missing"),
        ("folder", "not a regular file"),
        ("pipe", "not a regular file"),
    ],
)
def test_damage_is_an_error_with_its_place(sharded, how, reason):
    path = sharded.places()[4][0]
    shard, place = path.parent, path.name.split(":")
    assert load_image(path).size == (12, 12)  # so that the shard is open already
    damage(shard, how, int(place[1]))
    with pytest.raises(ImageError, match=rf"{shard.name}/{place[0]}:{place[1]}:{place[2]}.*{reason}"):
        load_image(path)
    assert content_key(path) is None


def test_limits_hold_in_shards_too(sharded, monkeypatch):
    path = sharded.places()[1][0]  # a JPEG
    with pytest.raises(ImageError, match="image too large"):
        load_image(str(path).replace(path.name.split(":")[2], str(MAX_BYTES + 1)))
    monkeypatch.setattr("dataprocess.image_io.MAX_PIXELS", 40 * 40 - 1)
    with pytest.raises(ImageError, match=r"image too large.*1600|image too large.*40 × 40"):
        load_image(path)
    monkeypatch.setattr("dataprocess.image_io.MAX_PIXELS", 40 * 40)
    monkeypatch.setattr("dataprocess.image_io.MAX_SEGMENTS", 2)
    with pytest.raises(ImageError, match="segments"):
        load_image(path)


def test_a_shard_that_is_a_link_out_of_its_folder_is_refused(sharded, tmp_path):
    path = sharded.places()[0][0]
    shutil.move(path.parent, tmp_path / "elsewhere.tar")
    path.parent.symlink_to(tmp_path / "elsewhere.tar")
    name = f"{path.parent.name}/{path.name}"
    with pytest.raises(ImageError, match="link leads out"):
        resolve_image_path(sharded.shards, name)
    assert load_image(resolve_image_path(sharded.shards, name, allow_links=True)).size == (8, 8)


def test_a_jpeg_cut_short_before_it_was_stored_is_found(data):
    data.content["b.two.JPG"] = data.content["b.two.JPG"][:-300] + b"\xff\xd9"
    (data.photos / "b.two.JPG").write_bytes(data.content["b.two.JPG"])
    assert data.run("--shards", data.shards) == 0
    with pytest.raises(ImageError, match="cut short or damaged"):
        load_image(data.places()[1][0])
    assert data.run("--shards", data.shards, "--check_images") == 0
    assert len((data.shards / "index.jsonl").read_text().splitlines()) == 5


@pytest.mark.parametrize(
    "name", ["x.tar/a.png", "x.tar/a.png:0:5", "x.tar/a.png:0:5:1234567G", "x.tar/a.png:-1:5:00000000"]
)
def test_other_names_are_those_of_files(tmp_path, name):
    (tmp_path / "x.tar").mkdir()
    (tmp_path / name).write_bytes(picture(0, 8))
    assert load_image(tmp_path / name).size == (8, 8)


def test_few_shards_stay_open_whatever_reads_them(data, monkeypatch):
    assert data.run("--shards", data.shards, "--shard_bytes", 1) == 0
    assert len(list(data.shards.glob("*.tar"))) == 6
    monkeypatch.setattr(shards, "_open_shard", shards.functools.lru_cache(2)(shards._open_shard.__wrapped__))
    paths = list(chain(*data.places()))
    expected = [load_image(path).tobytes() for path in paths]
    wrong = []

    def read() -> None:
        for _ in range(20):
            wrong.extend(
                path for path, pixels in zip(paths, expected, strict=True) if load_image(path).tobytes() != pixels
            )

    child = os.fork()  # before there are threads; it reads through the same descriptors as they do
    if child == 0:
        try:
            read()
        finally:
            os._exit(bool(wrong))
    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert os.waitpid(child, 0)[1] == 0
    if Path("/proc/self/fd").exists():
        held = [os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()]
        assert len([name for name in held if str(data.shards) in name]) <= 2
