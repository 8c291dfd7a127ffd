"""The output of a batch: one line an answer, in the questions' order, gone on with after a stop at any point.

Beside `answers.jsonl` lies `answers.jsonl.made_with.json`: what the answers depend on. Answers of other questions,
weights or settings are never mixed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..checkpoints.checkpoint import (
    ADAPTER_WEIGHTS,
    ORIGINAL_ADAPTER_WEIGHTS,
    ORIGINAL_PROJECTOR_WEIGHTS,
    PROJECTOR_WEIGHTS,
    resolve_checkpoint,
)
from ..checkpoints.configs import ADAPTER_CONFIG
from .batch_answers import Outcome

try:
    import fcntl
except ImportError:  # not on Windows; two runs into one file then are the user's to avoid
    fcntl = None  # type: ignore[assignment]


logger = logging.getLogger(__name__)

_ADVICE = "give another --output, or delete it to answer anew"
_COMMAND = "command"
"""Name in the note of what is not compared: two commands can ask for the same."""
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


def digest(value: Any) -> str:
    """A short hash of what JSON can write."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _as_read(value: Any) -> Any:
    """As it will be when it is read from JSON."""
    return json.loads(json.dumps(value))


def trained_digest(folder: str | os.PathLike[str]) -> str:
    """A short hash of a checkpoint's weights and of LoRA's configuration, wherever it lies.

    Raises:
        CheckpointError: if there is no complete checkpoint.
    """
    path = resolve_checkpoint(folder)
    found = hashlib.sha256()
    for name in (
        ADAPTER_CONFIG,
        ADAPTER_WEIGHTS,
        ORIGINAL_ADAPTER_WEIGHTS,
        PROJECTOR_WEIGHTS,
        ORIGINAL_PROJECTOR_WEIGHTS,
    ):
        if (path / name).is_file():
            found.update(name.encode())
            with (path / name).open("rb") as file:
                while block := file.read(1 << 20):
                    found.update(block)
    return found.hexdigest()[:16]


def picture_stamp(path: Path) -> tuple[int, int] | None:
    """Size and time of change of a picture, behind links; None if there is none. To hash them all would take long."""
    try:
        status = path.stat()
    except (OSError, ValueError):  # ValueError: characters that no file name can hold
        return None
    return status.st_size, status.st_mtime_ns


class AnswerFile:
    """Appends to an output; a context manager. Opened and looked at before there is a model; see `go_on`.

    Args:
        path: the output.
        ids: the questions' ids, in order.
        known: what is known without a model of what the answers depend on, by name; `digest` what is long. Of a
            dictionary in it, the values that are known.
        command: what else was asked for, by which a finished output is known again.

    Raises:
        ValueError: if the output is something else than the beginning of these answers.
        OSError: if it can't be read or written.
    """

    def __init__(self, path: Path, ids: Sequence[str | int], known: dict[str, Any], command: Any = None) -> None:
        self.path, self.ids, self.command = path, ids, command
        self.num_done = 0
        """Questions that have their line."""
        self.failed: list[str] = []
        """`id: reason` of those without an answer."""
        self._note = path.with_name(f"{path.name}.made_with.json")
        self._before: dict[str, Any] = {}
        self._size = 0
        self._file = path.open("ab+")
        try:
            self._lock()
            self._look(known)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, outcome: Outcome) -> None:
        """Write the next question's line."""
        line: dict[str, Any] = {"id": self.ids[self.num_done]}
        if outcome.error is None:
            line["answer"] = outcome.answer
        else:
            line["error"] = outcome.error
        try:
            raw = json.dumps(line, ensure_ascii=False).encode()
        except UnicodeEncodeError:  # half a surrogate pair, which JSON can hold and UTF-8 can't
            raw = json.dumps(line).encode()
        self._file.write(raw + b"\n")
        self._file.flush()
        self._count(line)

    def _count(self, line: dict[str, Any]) -> None:
        self.num_done += 1
        if "error" in line:
            self.failed.append(f"{line['id']}: {line['error']}")

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"--output {self.path}: another run is writing it; wait for it, or stop it") from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            logger.warning(
                "--output %s: its file system has no locks (%s); see to it that no other run writes it",
                *(self.path, error.strerror),
            )

    @property
    def is_finished(self) -> bool:
        """Whether this very command has answered every question: no model is needed to see that."""
        return self.num_done == len(self.ids) and self._before.get(_COMMAND) == _as_read(self.command)

    def go_on(self, made_with: dict[str, Any]) -> None:
        """Get ready for `add`, now that all is known.

        Args:
            made_with: all that the answers depend on, by name.

        Raises:
            ValueError: if what is there was made with something else; nothing is changed then.
            OSError: if it can't be written.
        """
        if self._before:
            self._compare(made_with, whole=True)
            self._file.truncate(self._size)  # a line that was cut by a kill is written again
            return
        text = json.dumps({**made_with, _COMMAND: self.command}, indent=2, ensure_ascii=False)
        part = self._note.with_name(f"{self._note.name}.part")
        part.write_text(f"{text}\n", encoding="utf-8")
        part.replace(self._note)

    def _look(self, known: dict[str, Any]) -> None:
        self._file.seek(0)
        content = self._file.read()
        if not content:
            return
        with contextlib.suppress(OSError, ValueError):
            self._before = json.loads(self._note.read_text(encoding="utf-8"))
        if not isinstance(self._before, dict) or not self._before:
            raise ValueError(f"--output {self.path}: holds something, and no {self._note.name} says what; {_ADVICE}")
        self._compare(known, whole=False)
        self._size = content.rfind(b"\n") + 1
        for line in content[: self._size].splitlines():
            self._check_line(line)

    def _compare(self, values: dict[str, Any], *, whole: bool) -> None:
        """Hold values against those noted; of a dictionary that is not whole, what it has."""

        def agree(now: Any, before: Any) -> bool:
            if whole or not isinstance(now, dict) or not isinstance(before, dict):
                return bool(now == before)
            return all(before.get(name) == value for name, value in now.items())

        differ = [name for name, value in _as_read(values).items() if not agree(value, self._before.get(name))]
        if differ:
            raise ValueError(f"--output {self.path}: was made with other {', '.join(differ)}; {_ADVICE}")

    def _check_line(self, raw: bytes) -> None:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            line = json.loads(raw)
            if (
                self.num_done < len(self.ids)
                and line["id"] == self.ids[self.num_done]
                and line.keys() & {"answer", "error"}
            ):
                self._count(line)
                return
        raise ValueError(
            f"--output {self.path}, line {self.num_done + 1}: is not the answer to that question; {_ADVICE}"
        )
