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

from .adapter_config import ADAPTER_CONFIG
from .batch_answers import Outcome
from .checkpoint import (
    ADAPTER_WEIGHTS,
    ORIGINAL_ADAPTER_WEIGHTS,
    ORIGINAL_PROJECTOR_WEIGHTS,
    PROJECTOR_WEIGHTS,
    resolve_checkpoint,
)

try:
    import fcntl
except ImportError:  # not on Windows; two runs into one file then are the user's to avoid
    fcntl = None  # type: ignore[assignment]


logger = logging.getLogger(__name__)

_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


def digest(value: Any) -> str:
    """A short hash of what JSON can write."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


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


class AnswerFile:
    """Appends to an output; a context manager.

    Args:
        path: the output.
        ids: the questions' ids, in order.
        made_with: what the answers depend on, by name; `digest` what is long.

    Raises:
        ValueError: if the output is something else than the beginning of these answers.
        OSError: if it can't be read or written.
    """

    def __init__(self, path: Path, ids: Sequence[str | int], made_with: dict[str, Any]) -> None:
        self.path, self.ids = path, ids
        self.num_done = 0
        """Questions that have their line."""
        self.failed: list[str] = []
        """`id: reason` of those without an answer."""
        self._file = path.open("ab+")
        try:
            self._lock()
            self._go_on(made_with)
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

    def _go_on(self, made_with: dict[str, Any]) -> None:
        note = self.path.with_name(f"{self.path.name}.made_with.json")
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        if content:
            self._check_note(note, made_with)
            for line in whole.splitlines():
                self._check_line(line)
            self._file.truncate(len(whole))  # a line that was cut by a kill is written again
            return
        part = note.with_name(f"{note.name}.part")
        part.write_text(json.dumps(made_with, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        part.replace(note)

    def _check_note(self, note: Path, made_with: dict[str, Any]) -> None:
        advice = "give another --output, or delete it to answer anew"
        before: Any = None
        with contextlib.suppress(OSError, ValueError):
            before = json.loads(note.read_text(encoding="utf-8"))
        if not isinstance(before, dict):
            raise ValueError(f"--output {self.path}: holds something, and no {note.name} says what; {advice}")
        wanted = json.loads(json.dumps(made_with))
        differ = [name for name in wanted if before.get(name) != wanted[name]]
        if differ:
            raise ValueError(f"--output {self.path}: was made with other {', '.join(differ)}; {advice}")

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
            f"--output {self.path}, line {self.num_done + 1}: is not the answer to that question; give another "
            "--output, or delete it to answer anew"
        )
