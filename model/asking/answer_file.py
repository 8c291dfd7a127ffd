"""The output of a batch: one line an answer. A run that was stopped at any point resumes after its last whole line.

Next to `answers.jsonl`, `answers.jsonl.made_with.json` notes what the answers depend on, so that answers of other
questions, pictures, weights or settings are never mixed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dataprocess.file_lock import replace_file

_ADVICE = "give another --output, or delete it to start from scratch"


def digest(value: Any) -> str:
    """Return a short hash of what JSON can write."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def trained_digest(folder: Path) -> str:
    """Return a short hash of a checkpoint's weights and of LoRA's configuration, wherever the checkpoint is."""
    found = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.name.startswith(("adapter_", "projector.", "other_params.")) and file.is_file():
            found.update(file.name.encode())
            found.update(file.read_bytes())
    return found.hexdigest()[:16]


def picture_stamp(path: Path) -> tuple[str, int, int] | str:
    """Return a picture's path, size and time of change; its name if it is missing. To hash pictures would take long."""
    try:
        status = path.stat()
    except (OSError, ValueError):  # ValueError: characters that no file name can hold
        return path.name
    return str(path), status.st_size, status.st_mtime_ns


def to_line(value: dict[str, Any]) -> bytes:
    """Write a line; half a surrogate pair, which JSON can hold and UTF-8 can't, becomes JSON's escape for it."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", errors="backslashreplace") + b"\n"


class AnswerFile:
    """The lines that an output has, and the end to which more are added. Whoever uses one holds the output's lock.

    What is something else than answers to these questions, one to each and made with the same, is refused. A line with
    `error` whose pictures have changed since is dropped: its question can be asked again.

    Args:
        path: the output.
        pictures: a digest of its pictures for each question, by its id.
        made_with: what the answers depend on, by name, as far as it is known before the model is loaded.
    """

    def __init__(self, path: Path, pictures: Mapping[str | int, str], made_with: dict[str, Any]) -> None:
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise ValueError(f"--output {path}: not a regular file; {_ADVICE}")
        self.path = path
        self.lines: dict[str | int, dict[str, Any]] = {}
        """`{"id": …, "answer": …}` or `{"id": …, "error": …}`, by id."""
        self._note = path.with_name(f"{path.name}.made_with.json")
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]  # after it: a line that was cut by a kill, which is written again
        self._before = self._read_note() if content else None
        self._now: dict[str, Any] = {}
        self._compare(made_with)
        for number, raw in enumerate(whole.splitlines(), start=1):
            with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):  # whatever the line is instead
                line = json.loads(raw)
                if line["id"] in pictures and line["id"] not in self.lines and line.keys() & {"answer", "error"}:
                    self.lines[line["id"]] = line
                    continue
            raise ValueError(f"--output {path}, line {number}: not the first answer to one of the questions; {_ADVICE}")
        self._now["pictures"] = " ".join(pictures.values())
        before = dict(zip(pictures, str((self._before or {}).get("pictures")).split(), strict=False))
        changed = [index for index in self.lines if pictures[index] != before.get(index)]
        if any("error" not in self.lines[index] for index in changed):
            raise ValueError(f"--output {path}: made with other pictures; {_ADVICE}")
        for index in changed:
            del self.lines[index]
        self._rest = None if changed else len(whole)

    def begin(self, made_with: dict[str, Any]) -> None:
        """Get ready for `add`, now that the rest of what the answers depend on is known; refuse another."""
        self._compare(made_with)
        if self._rest is None:
            replace_file(self.path, b"".join(map(to_line, self.lines.values())))
        elif self._before is not None:
            os.truncate(self.path, self._rest)
        if self._before != self._now:
            replace_file(self._note, (json.dumps(self._now, indent=2, ensure_ascii=False) + "\n").encode())

    def add(self, line: dict[str, Any]) -> None:
        """Write a line; once this returns, a kill does not take it back."""
        self.lines[line["id"]] = line
        try:
            with self.path.open("ab") as file:
                file.write(to_line(line))
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def _read_note(self) -> dict[str, Any]:
        with contextlib.suppress(OSError, ValueError, RecursionError):
            note = json.loads(self._note.read_text(encoding="utf-8")) if self._note.is_file() else None
            if isinstance(note, dict):
                return note
        raise ValueError(f"--output {self.path}: not empty, and no {self._note.name} says what made it; {_ADVICE}")

    def _compare(self, made_with: dict[str, Any]) -> None:
        self._now |= json.loads(json.dumps(made_with))  # as it will be read
        differ = [name for name in made_with if self._before is not None and self._before.get(name) != self._now[name]]
        if differ:
            raise ValueError(f"--output {self.path}: made with other {', '.join(differ)}; {_ADVICE}")
