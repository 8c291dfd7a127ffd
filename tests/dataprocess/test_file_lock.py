"""One output has one writer."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dataprocess import file_lock
from dataprocess.file_lock import FileLockError, hold, replace_file

ROOT = Path(__file__).parents[2]
HOLDER = r"""
import os, sys
from pathlib import Path
from dataprocess.file_lock import hold
with hold(Path(sys.argv[1])):
    if len(sys.argv) > 2 and os.fork() == 0:
        os.write(1, b"worker\n")
        sys.stdin.read()  # lives until the test ends it
    else:
        os.write(1, b"held\n")
        sys.stdin.read()
"""


def start_holder(path: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLDER, str(path), *more]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    waited = {"held", "worker"} if more else {"held"}
    while waited:
        line = process.stdout.readline()
        assert line
        waited.discard(line.strip())
    return process


@pytest.mark.parametrize(("name", "lock"), [("out.jsonl", ".out.jsonl.lock"), ("run", "run/.lock")])
def test_a_second_process_is_told_who_writes(tmp_path, name, lock):
    (tmp_path / "run").mkdir()
    holder = start_holder(tmp_path / name)
    with pytest.raises(FileLockError, match=rf"{name}.*process {holder.pid} on "), hold(tmp_path / name):
        pass
    assert (tmp_path / lock).exists()  # the refused one deletes nothing
    with hold(tmp_path / "another.jsonl"):
        pass
    holder.communicate("", timeout=120)
    with hold(tmp_path / name):
        assert (tmp_path / lock).exists()
    assert not (tmp_path / lock).exists()


def test_a_lock_ends_with_its_process_and_not_with_its_workers(tmp_path):
    holder = start_holder(tmp_path / "out", "with a worker")
    os.kill(holder.pid, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(holder.pid, 0)[1]) == -signal.SIGKILL
    assert (tmp_path / ".out.lock").exists()
    with hold(tmp_path / "out"):  # the worker is still there: its end of the pipe is open
        assert holder.stdin is not None
        holder.stdin.close()
    assert not (tmp_path / ".out.lock").exists()


def test_a_lock_that_was_deleted_before_it_was_taken_is_made_again(tmp_path, monkeypatch):
    taken = []

    def flock(descriptor, operation):
        if not taken:
            (tmp_path / ".out.lock").unlink()  # as its holder does at its end
        taken.append(descriptor)

    monkeypatch.setattr(file_lock.fcntl, "flock", flock)
    with hold(tmp_path / "out"):
        assert len(taken) == 2
        assert str(os.getpid()) in (tmp_path / ".out.lock").read_text()


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_what_is_no_lock_file_is_not_touched(tmp_path, kind):
    lock, other = tmp_path / ".out.lock", tmp_path / "other"
    other.write_text("kept")
    if kind == "link":
        lock.symlink_to(other)
    elif kind == "pipe":
        os.mkfifo(lock)
    else:
        lock.mkdir()
    with pytest.raises(FileLockError, match="out"), hold(tmp_path / "out"):
        pass
    assert other.read_text() == "kept"
    assert os.path.lexists(lock)


def test_a_missing_folder_is_named_as_the_user_named_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere/out'"), hold(tmp_path / "nowhere" / "out"):
        pass


def test_where_there_are_no_locks_a_warning_is_all(tmp_path, monkeypatch, caplog):
    def flock(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(file_lock.fcntl, "flock", flock)
    with hold(tmp_path / "out"):
        pass
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "out" in caplog.text


def test_without_room_a_file_keeps_its_content_and_is_named(tmp_path):
    """A file may not grow beyond 100 bytes: as on a full disk, the system's error names no file."""
    file = tmp_path / "results.json"
    replace_file(file, b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError, match=r"results\.json"):
            replace_file(file, bytes(101))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == [file]
    assert file.read_bytes() == b"old"
