"""Write the output files, all of them whole or none touched, and lay out the table of what became of the records."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from .config import Config, Source
from .file_lock import FileLockError, hold
from .messages import format_count, shorten
from .output_forms import Form, form_of
from .records import DataError, Record, RecordError, Sample


@dataclass
class Counts:
    """Numbers of one source's records, and of the samples made of them."""

    source: Source
    records: int = 0
    """Elements in its file."""
    samples: int = 0
    """Records that were written."""
    images: set[str] = field(default_factory=set)
    """Distinct names of images in those samples."""
    rejects: Counter[str] = field(default_factory=Counter)
    """Records left out, by reason."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Captions left out of records that were kept, by reason."""


@contextlib.contextmanager
def open_outputs(config: Config) -> Iterator[Outputs]:
    """Open the image map, the captions, and the list of rejects for writing.

    The files grow under temporary names in their own folders, locked against other processes. Leaving the block
    normally puts all of them in place; leaving it by an exception, or failing to put one in place, changes nothing.

    Raises:
        DataError: a file can't be written, or another process is writing it.
    """
    with contextlib.ExitStack() as stack:
        outputs = Outputs(stack)
        for target in (config.output_captions, config.output_image_map, config.output_rejects):
            outputs.lock(target)
            outputs.new_file(target)
        captions, image_map, _ = outputs.files
        outputs.captions = outputs.form(captions, config.output_captions.suffix, "ID")
        outputs.image_map = outputs.form(image_map, config.output_image_map.suffix, "key")
        yield outputs
        for file, form in ((captions, outputs.captions), (image_map, outputs.image_map)):
            with naming(file.target):
                form.finish()
        for file in outputs.files:
            file.close()
        _put_in_place(outputs.files)
        for path in outputs.surplus:
            with contextlib.suppress(OSError):
                path.unlink()


@dataclass
class Outputs:
    """The three files, written one entry a line while the records come in, and further ones that appear with them.

    image map: `{key: {"image_file": name | [names] | null, "ID": int, "path": folder}}`
    captions: `{ID: {"q": …, "a": text | [texts]}}`, of several turns `{ID: {"turns": [{"q", "a"}, …]}}`
    both also as JSON lines or Parquet, see `output_forms.py`
    rejects (JSON lines): `{"source", "label_file", "record": index from 0, "image", "reason", "detail"}`, with
    `"caption"` (index from 0) where only one of a record's captions was left out
    """

    stack: contextlib.ExitStack
    """Ends with the writing."""
    files: list[NewFile] = field(default_factory=list)
    """All files: captions, image map, rejects, then others."""
    surplus: list[Path] = field(default_factory=list)
    """Files of an earlier run, to be deleted once those of this one are in place."""
    num_samples: int = 0
    captions: Form = field(init=False)
    """Questions and answers, by ID; the first file."""
    image_map: Form = field(init=False)
    """Each sample's images, by key; the second."""

    @property
    def rejects(self) -> NewFile:
        """The list of what was left out."""
        return self.files[2]

    def lock(self, path: Path) -> None:
        """Keep other processes out of an output file, or of a folder, as long as this one is writing; make its folder.

        Raises:
            DataError: another process holds it, or it cannot be made.
        """
        target = Path(os.path.realpath(path))
        with naming(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            self.stack.enter_context(hold(target))

    def take_folder(self, folder: Path) -> None:
        """Make a folder of outputs, and keep other processes out of it."""
        with naming(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self.lock(folder)

    def new_file(self, path: Path) -> NewFile:
        """Open one more output, in a folder that exists and from which other processes are kept out."""
        self.files.append(self.stack.enter_context(_new_file(path)))
        return self.files[-1]

    def form(self, file: NewFile, suffix: str, key: str) -> Form:
        """Return what writes entries into a file in the form that an ending stands for."""
        form = form_of(suffix)(file.stream, key)
        self.stack.callback(form.close)
        return form

    def write(self, record: Record, sample_id: int, outcome: Sample | RecordError, counts: Counts) -> None:
        """Write the sample made of a record under an ID unique over all sources, or why there is none, and count it."""
        source = counts.source
        counts.records += 1
        if isinstance(outcome, RecordError):
            counts.rejects[outcome.reason] += 1
            self._reject(source, record, outcome)
            return
        counts.samples += 1
        counts.images.update(outcome.images)
        for position, error in outcome.left_out:
            counts.left_out[error.reason] += 1
            self._reject(source, record, error, position)
        folder, names = outcome.copies or (source.image_path, outcome.images)
        image_file: Any = None if not names else names[0] if len(names) == 1 else names
        # Source and record make the key unique; the file's name is there for people who search.
        key = f"{source.name}/{record.index:06d}" + (f"/{outcome.images[0][-100:]}" if names else "")
        entry = {"image_file": image_file, "ID": sample_id, "path": folder}
        turns: list[dict[str, Any]] = [{"q": question, "a": answer} for question, answer in outcome.turns]
        caption = turns[0] if len(turns) == 1 else {"turns": turns}
        with naming(self.files[1].target):
            self.image_map.add(key, entry)
        with naming(self.files[0].target):
            self.captions.add(sample_id, caption)
        self.num_samples += 1

    def _reject(self, source: Source, record: Record, error: RecordError, caption: int | None = None) -> None:
        image = record.value.get("image_id", record.value.get("image")) if isinstance(record.value, dict) else None
        if image is not None and not (isinstance(image, str) and len(image) < 200):
            image = shorten(image, 200)
        line: dict[str, Any] = {"source": source.name, "label_file": str(source.label_file), "record": record.index}
        if caption is not None:
            line["caption"] = caption
        line |= {"image": image, "reason": error.reason, "detail": error.detail}
        # A lone surrogate becomes \udXXX, which is how JSON writes it.
        self.rejects.write((_encode(line) + "\n").encode(errors="backslashreplace"))


_encode = json.JSONEncoder(ensure_ascii=False).encode


@dataclass(frozen=True)
class NewFile:
    """An output that is being written; the earlier one has the name `earlier` while the new ones are put in place."""

    target: Path
    temporary: Path
    earlier: Path
    stream: BinaryIO

    def write(self, data: bytes) -> None:
        """Add bytes at the end."""
        with naming(self.target):
            self.stream.write(data)

    def close(self) -> None:
        """See to it that everything is on the disk; once is enough."""
        with naming(self.target):
            if not self.stream.closed:
                self.stream.flush()
                os.fsync(self.stream.fileno())
                self.stream.close()


@contextlib.contextmanager
def _new_file(path: Path) -> Iterator[NewFile]:
    """Open the temporary file of an output; it is deleted at the end if it was not put in place."""
    target = Path(os.path.realpath(path))  # a link stays a link, and the file that it points to is replaced
    stem = f".{target.name[:100]}.{secrets.token_hex(4)}"
    temporary = target.with_name(stem + ".new")
    with contextlib.ExitStack() as stack:
        with naming(target):
            stream = temporary.open("xb", buffering=1 << 20)
        stack.callback(temporary.unlink, missing_ok=True)
        try:
            yield NewFile(target, temporary, target.with_name(stem + ".old"), stream)
        finally:
            with contextlib.suppress(OSError):  # on a full disk, what is still buffered does not fit either
                stream.close()


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name the output in an error while it is written."""
    try:
        yield
    except FileLockError as exc:
        raise DataError(str(exc)) from None
    except OSError as exc:
        raise DataError(f"{path}: cannot be written: {exc.strerror}; earlier output files are unchanged") from None


def _put_in_place(files: Sequence[NewFile]) -> None:
    """Replace all files or none.

    The captions (the first file) are moved away before, and put in place after, everything else: new captions next to
    an old image map would give photos the answers of others. A kill in between leaves no captions, which is noticed.
    """
    with contextlib.ExitStack() as undo:
        for file in files:
            if file.target.is_file():
                with naming(file.target):
                    os.replace(file.target, file.earlier)  # noqa: PTH105
                undo.callback(os.replace, file.earlier, file.target)
        for file in reversed(files):
            with naming(file.target):
                os.replace(file.temporary, file.target)  # noqa: PTH105
            undo.callback(file.target.unlink)
        undo.pop_all()  # the commit point: from here on the new files are the outputs
    for file in files:
        with contextlib.suppress(OSError):
            file.earlier.unlink(missing_ok=True)


def table(counts: Sequence[Counts]) -> str:
    """Lay out the counts per source, their sum, and the reasons for what was left out.

    An image that several sources share counts once in the sum.
    """
    numbers = [(one.records, one.samples, len(one.images), one.rejects.total()) for one in counts]
    records, samples, _, rejects = (sum(column) for column in zip(*numbers, strict=True))
    images = len({(one.source.image_path, name) for one in counts for name in one.images})
    rows = [["source", "records", "samples", "images", "rejects"]]
    names = [*(one.source.name for one in counts), "total"]
    for name, row in zip(names, [*numbers, (records, samples, images, rejects)], strict=True):
        rows.append([name, *(f"{number:,}" for number in row)])
    first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    lines = []
    for name, *cells in rows:
        padded = [cell.rjust(width) for cell, width in zip(cells, others, strict=True)]
        lines.append("  ".join([name.ljust(first), *padded]))
    for one in counts:
        for noun, reasons in (("record", one.rejects), ("caption", one.left_out)):
            for reason, number in sorted(reasons.items(), key=lambda item: (-item[1], item[0])):
                lines.append(f"left out of {one.source.name}: {format_count(number, noun)}: {reason}")
    return "\n".join(lines) + "\n"
