"""One writer for an output: a lock that ends with its process, however that ends; and files that are replaced whole."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger(__name__)

_held: set[int] = set()
"""Descriptors of the locks of this process."""


class FileLockError(ValueError):
    """The output belongs to another process."""


@contextlib.contextmanager
def hold(path: Path) -> Iterator[None]:
    """Hold the lock of an output file, or of an output folder, which must exist, for as long as the block runs.

    The lock of a folder is the file `.lock` in it, that of a file NAME is `.NAME.lock` next to it. It is deleted at the
    end; one that a killed process has left is free.

    Raises:
        FileLockError: if another process holds it, or something that is no lock file has its name.
        OSError: if the lock can't be created.
    """
    lock = path / ".lock" if path.is_dir() else path.with_name(f".{path.name}.lock")
    while (descriptor := _take(path, lock)) is None:
        pass  # its holder has deleted it between the opening and the locking
    _held.add(descriptor)
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        if descriptor in _held:  # not so in a forked process that leaves the block
            _held.remove(descriptor)
            with contextlib.suppress(OSError):
                lock.unlink()  # while it is held, so that a process that waits for it notices
            os.close(descriptor)


def _take(path: Path, lock: Path) -> int | None:
    """Create the lock file and lock it; return its descriptor, or None if the file was deleted meanwhile."""
    try:
        if lock.is_symlink() or (lock.exists() and not lock.is_file()):
            raise FileLockError(f"{lock}: no regular file, but the lock of {path} belongs there; delete it")
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error  # as the user named it
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(descriptor, 200).decode(errors="replace").strip() or "another process"
            raise FileLockError(f"{path}: {holder} is writing to it; wait until it has ended, or stop it") from error
        except OSError as error:  # some network file systems
            logger.warning("%s: no locks here (%s); make sure that no other process writes to it", path, error.strerror)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), lock.stat()):
                stack.pop_all()
                return descriptor
    return None


def _forget_locks() -> None:
    """Close the locks in a forked process: data workers that outlive a killed run would hold them on."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget_locks)


def replace_file(path: Path, content: bytes) -> None:
    """Write a file, which may be a link, under another name and rename it; an error names it, and leaves no part."""
    whole = path.with_name(f"tmp-{path.name}-{secrets.token_hex(4)}")
    try:
        with whole.open("xb") as file:
            file.write(content)
        whole.replace(path)
    except OSError as error:
        whole.unlink(missing_ok=True)  # on a full disk, a part would be left each time
        raise OSError(error.errno, error.strerror, str(path)) from error
