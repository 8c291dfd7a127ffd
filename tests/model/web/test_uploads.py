"""Uploads: only they are opened, and nothing of them stays."""

from __future__ import annotations

import os
import stat
import tempfile
import time
from pathlib import Path

import pytest
from PIL import Image

from model.web.uploads import PREFIX, UploadFolder, files_of, thumbnail
from model.web.words import Refusal


@pytest.fixture
def uploads():
    folder = UploadFolder()
    yield folder
    folder.close()


def upload(uploads: UploadFolder, owner: str = "me", name: str = "a.png", size=(40, 30)) -> str:
    """Store a picture as Gradio does, under its content's hash, and adopt it."""
    folder = uploads.path / "0123"
    folder.mkdir(exist_ok=True)
    Image.new("RGB", size, "red").save(folder / name)
    path = uploads.adopt(str(folder / name), owner)
    uploads.clear_shared()
    return path


def files_in(uploads: UploadFolder) -> list[Path]:
    return [path for path in uploads.path.rglob("*") if path.is_file()]


def test_only_this_user_can_read_the_folder(uploads):
    assert stat.S_IMODE(uploads.path.stat().st_mode) == 0o700


def test_the_same_picture_of_two_visitors_is_two_files(uploads):
    mine, theirs = upload(uploads, "me"), upload(uploads, "they")
    assert mine != theirs
    assert len(files_in(uploads)) == 2, "Gradio's own copy has gone"
    uploads.delete_of("me")
    assert uploads.find(mine) is None
    assert uploads.load(theirs, "a.png", 10**6).size == (40, 30)
    uploads.delete(theirs)
    assert files_in(uploads) == []


@pytest.mark.parametrize("name", ["b.png", "../../b.png", "/etc/passwd", "own", ".", "", "x\0y", "a" * 5000])
def test_no_other_file_is_opened(uploads, tmp_path, name):
    Image.new("RGB", (4, 4)).save(tmp_path / "b.png")
    mine = upload(uploads)
    candidates = [name, str(tmp_path / name) if "\0" not in name else name, f"{Path(mine).parent}/{name}"]
    candidates += [f"{Path(mine).parent}/../../../{name}", f"file://{mine}", f"http://localhost/{name}"]
    for path in candidates:
        assert uploads.find(path) is None, path
        with pytest.raises(Refusal) as refusal:
            uploads.load(path, name, 10**6)
        assert refusal.value.key == "gone_picture"
    for value in (None, 5, ["x"], {"path": mine}, mine.encode()):
        assert uploads.find(value) is None
    assert (tmp_path / "b.png").exists()


def test_a_link_out_of_the_folder_is_not_followed(uploads, tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    folder = Path(upload(uploads)).parent
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    assert uploads.find(str(folder / "link.png")) is None


@pytest.mark.parametrize(
    ("content", "most", "key"),
    [
        (b"no picture", 10**6, "bad_picture"),
        (b"", 10**6, "bad_picture"),
        (b"\xff\xd8\xff\xe0 cut short", 10**6, "bad_picture"),
        (b"P6\n20000 20000\n255\n" + bytes(100), 10**6, "large_picture"),  # 400 megapixels, as its header says
        (b"x" * 2000, 1000, "large_picture"),
    ],
)
def test_a_picture_that_cannot_be_used_is_said_and_deleted(uploads, content, most, key):
    folder = uploads.path / "abc"
    folder.mkdir()
    (folder / "x.png").write_bytes(content)
    path = uploads.adopt(str(folder / "x.png"), "me")
    uploads.clear_shared()
    with pytest.raises(Refusal) as refusal:
        uploads.load(path, "holiday.png", most)
    assert refusal.value.key == key
    assert "holiday.png" in refusal.value.say("zh")
    assert files_in(uploads) == []


def test_what_nobody_asks_about_is_deleted_after_a_while(uploads):
    old, new = upload(uploads), upload(uploads)
    os.utime(old, (0, time.time() - 1000))
    uploads.sweep(older_than=900)
    assert uploads.find(old) is None
    assert uploads.find(new) is not None
    uploads.close()
    assert not uploads.path.exists()


def test_what_a_killed_program_left_is_deleted_at_the_next_start(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left, running, recent = UploadFolder(), UploadFolder(), UploadFolder()
    somebodys = tmp_path / f"{PREFIX}notes"
    somebodys.mkdir()
    for folder in (left, recent):
        os.close(folder._held)  # as the end of a process does
    for path in (left.path, running.path, somebodys):
        os.utime(path, (0, 0))
    now = UploadFolder()
    assert {*tmp_path.iterdir()} == {running.path, recent.path, somebodys, now.path}
    for folder in (running, now):
        folder.close()


@pytest.mark.parametrize("look", [lambda uploads: uploads.sweep(older_than=0), lambda uploads: uploads.has_room(1)])
def test_an_upload_that_goes_away_while_the_folder_is_looked_through(uploads, monkeypatch, look):
    """Its visitor leaves at that moment; neither the sweep, which would end the program, nor an upload may fail."""
    file, scandir = Path(upload(uploads)), os.scandir

    def late(folder):
        if Path(folder) == file.parent:
            file.unlink()
            file.parent.rmdir()
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", late)
    look(uploads)
    assert not file.parent.exists()


def test_a_full_folder_takes_no_more(uploads, monkeypatch):
    monkeypatch.setattr("model.web.uploads.MOST_BYTES", 10_000)
    assert uploads.has_room(5000)
    (uploads.path / "big").write_bytes(bytes(6000))
    assert not uploads.has_room(5000)
    assert uploads.has_room(4000)


@pytest.mark.parametrize("size", [(1, 1), (3000, 10), (10, 30_000)])
def test_thumbnails_are_small_and_hold_no_path(size):
    uri = thumbnail(Image.new("RGB", size))
    assert uri.startswith("data:image/jpeg;base64,")
    assert len(uri) < 40_000


@pytest.mark.parametrize("packet", [None, 5, "", "[", "[]", '"x"', '{"text": 3, "files": "x"}', "{" * 100_000, ["x"]])
def test_a_packet_may_be_anything(packet):
    assert files_of(packet) == ("", [], False)
    assert files_of('{"text": "a", "files": [1, {"path": "p"}, null], "shown": 2}') == ("a", [{"path": "p"}], True)
