"""Reading `image_map.json` and `captions.json`, checking them, and keeping them in little memory.

    image_map.json   {key: {"image_file": str | [str, ...] | null, "ID": int, "path": str}}
    captions.json    {str(ID): {"q": str, "a": str | [str, ...]}}   or   {str(ID): {"turns": [{"q", "a"}, ...]}}

Files of the original project are read too: they call the first key `iamge_file`.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dataprocess.image_io import check_image_name
from dataprocess.messages import format_count

from .prompt import SampleError, count_placeholders

logger = logging.getLogger(__name__)

_MAX_ERRORS_SHOWN = 3


@dataclass(frozen=True)
class Sample:
    """One entry of the two files."""

    id: int
    """Its ID."""
    image_folder: str
    """Absolute folder of its images; empty where it has none."""
    image_files: list[str]
    """Names inside that folder, in the order of the placeholders."""
    turns: list[tuple[str, list[str]]]
    """Question and alternative answers of every turn."""


class Annotations:
    """The samples of two files, in the order of the image map.

    They are kept as one block of bytes, which data workers share instead of each holding a copy of a million strings.

    Args:
        image_map: path of `image_map.json`.
        captions_file: path of `captions.json`.
        max_samples: read only the first so many.
        skip_bad: leave bad samples out, and keep what is wrong with them in `errors`.
        need_folders: an image folder that does not exist makes its samples bad.

    Raises:
        ValueError: a file cannot be read or has not the expected form.
        SampleError: samples are contradictory or incomplete; the message names the first IDs. With `skip_bad`, only
            if there is no good one.
    """

    errors: list[str]
    """What is wrong with the samples that were left out, each named."""
    fingerprint: str
    """Hash of the samples, in their order; the folders of their images do not count."""

    def __init__(
        self,
        image_map: str | Path,
        captions_file: str | Path,
        max_samples: int | None = None,
        *,
        skip_bad: bool = False,
        need_folders: bool = True,
    ) -> None:
        if max_samples is not None and max_samples < 1:
            raise ValueError(f"max_samples must be at least 1, got {max_samples}")
        with _without_collecting_garbage():
            self._read(image_map, captions_file, max_samples, skip_bad, need_folders)

    def _read(
        self,
        image_map: str | Path,
        captions_file: str | Path,
        max_samples: int | None,
        skip_bad: bool,
        need_folders: bool,
    ) -> None:
        entries = _read_object(image_map)
        captions = _read_object(captions_file)
        if not entries:
            raise ValueError(f"{image_map} holds no samples; prepare the data with dataprocess/process_image.py")
        encode = json.JSONEncoder(ensure_ascii=False).encode  # json.dumps would make one for each sample
        folders = _Folders(Path(image_map), need_folders)
        packed = bytearray()
        digest = hashlib.sha256()
        ends: list[int] = []
        seen: dict[int, str] = {}
        errors: list[str] = []
        for key, entry in entries.items():
            if len(ends) + len(errors) == max_samples:
                break
            try:
                sample = _parse_entry(key, entry, captions, folders)
                if sample.id in seen:
                    raise SampleError(f"sample {sample.id}: {seen[sample.id]!r} and {key!r} both have this ID")
            except SampleError as error:
                errors.append(str(error))
                continue
            seen[sample.id] = key
            record = [sample.id, sample.image_folder, sample.image_files, sample.turns]
            digest.update(repr((sample.id, sample.image_files, sample.turns)).encode("utf-8", "surrogatepass"))
            packed += encode(record).encode("utf-8", "surrogatepass")
            ends.append(len(packed))
        if not (skip_bad and ends):
            _raise_errors(errors, image_map, captions_file)
        self.errors = errors
        self.fingerprint = digest.hexdigest()[:16]
        if max_samples is None and len(captions) > len(seen):
            surplus = format_count(len(captions) - len(seen), "entry has", "entries have")
            logger.warning("%s: %s no image_map entry", captions_file, surplus)
        self._packed = torch.frombuffer(packed, dtype=torch.uint8)
        self._ends = torch.tensor([0, *ends], dtype=torch.long)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        start, end = self._ends[index : index + 2].tolist()
        text = self._packed[start:end].numpy().tobytes().decode("utf-8", "surrogatepass")
        sample_id, folder, files, turns = json.loads(text)
        return Sample(sample_id, folder, files, [(question, answers) for question, answers in turns])


@contextmanager
def _without_collecting_garbage() -> Iterator[None]:
    """Let Python look for no cycles: among millions of objects without any, looking again and again takes seconds."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class _Folders:
    """Image folders as written in the file -> absolute ones, each looked up once."""

    def __init__(self, file: Path, must_exist: bool) -> None:
        self._file = file
        self._must_exist = must_exist
        self._known: dict[str, str | None] = {}

    def resolve(self, written: str) -> str:
        if written not in self._known:
            # A relative path counts from the current folder, as in the original, and else from the file's own.
            candidates = [Path(written).absolute(), (self._file.parent / written).absolute()]
            default = None if self._must_exist else written
            self._known[written] = next((str(folder) for folder in candidates if folder.is_dir()), default)
        folder = self._known[written]
        if folder is None:
            raise SampleError(f"image folder {written!r} does not exist; correct `path` in {self._file}")
        return folder


def _read_object(path: str | Path) -> dict[str, Any]:
    try:
        with Path(path).open(encoding="utf-8-sig") as file:
            value = json.load(file, object_pairs_hook=_no_repeated_keys)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a valid JSON file: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def _no_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # JSON readers keep the last of two equal keys: a sample would be lost without a word.
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in result if keys.count(key) > 1)
        raise ValueError(f"the key {repeated!r} stands twice in one object")
    return result


def _raise_errors(errors: list[str], image_map: str | Path, captions_file: str | Path) -> None:
    if errors:
        shown = "; ".join(errors[:_MAX_ERRORS_SHOWN])
        more = f"; and {len(errors) - _MAX_ERRORS_SHOWN} more" if len(errors) > _MAX_ERRORS_SHOWN else ""
        raise SampleError(
            f"{format_count(len(errors), 'bad sample')} in {image_map} and {captions_file}: {shown}{more}"
        )


def _parse_entry(key: str, entry: Any, captions: dict[str, Any], folders: _Folders) -> Sample:
    if not isinstance(entry, dict):
        raise SampleError(f"entry {key!r} must be an object, got {type(entry).__name__}")
    sample_id = entry.get("ID")
    if not isinstance(sample_id, int) or isinstance(sample_id, bool):
        raise SampleError(f"entry {key!r}: ID must be an integer, got {sample_id!r}")
    if not -(2**63) <= sample_id < 2**63:
        raise SampleError(f"entry {key!r}: ID must be an integer of at most 64 bits")
    try:
        files = _image_files(entry)
        folder = ""
        if files:
            if not isinstance(entry.get("path"), str):
                raise SampleError(f"`path` must be the image folder, got {entry.get('path')!r}")
            folder = folders.resolve(entry["path"])
        turns = _turns(captions.get(str(sample_id)))
        placeholders = sum(count_placeholders(question) for question, _ in turns)
        if placeholders != len(files):
            raise SampleError(
                f"its questions have {format_count(placeholders, 'image placeholder')} <|extra_0|> but it has "
                f"{format_count(len(files), 'image')}; "
                "write one for each image"
            )
    except SampleError as error:
        raise SampleError(f"sample {sample_id}: {error}") from None
    return Sample(sample_id, folder, files, turns)


def _image_files(entry: dict[str, Any]) -> list[str]:
    name = next((name for name in ("image_file", "iamge_file") if name in entry), None)
    if name is None:
        raise SampleError("has no `image_file`; write null for a sample without images")
    value = entry[name]
    files = [] if value is None else value if isinstance(value, list) else [value]
    for file in files:
        if not isinstance(file, str):
            raise SampleError(f"`{name}` must be a file name, a list of them or null, got {value!r}")
        if reason := check_image_name(file):
            raise SampleError(f"{reason}: {file!r}")
    return files


def _turns(caption: Any) -> list[tuple[str, list[str]]]:
    if caption is None:
        raise SampleError("has no entry in the captions file")
    if not isinstance(caption, dict):
        raise SampleError(f'its caption must be {{"q", "a"}} or {{"turns"}}, got {type(caption).__name__}')
    if "turns" in caption and ("q" in caption or "a" in caption):
        raise SampleError('its caption has both "turns" and "q" or "a"; keep one form')
    turns = caption.get("turns", [caption])
    if not isinstance(turns, list) or not turns:
        raise SampleError(f'"turns" must be a list of {{"q", "a"}} objects, got {turns!r}')
    return [_turn(turn, f"turn {number}: " if "turns" in caption else "") for number, turn in enumerate(turns, start=1)]


def _turn(turn: Any, where: str) -> tuple[str, list[str]]:
    if not isinstance(turn, dict):
        raise SampleError(f'{where}expected {{"q", "a"}}, got {turn!r}')
    if not isinstance(turn.get("q"), str):
        raise SampleError(f'{where}"q" must be a string, got {turn.get("q")!r}')
    answers: Iterable[Any] = turn["a"] if isinstance(turn.get("a"), list) else [turn.get("a")]
    answers = list(answers)
    if not answers or not all(isinstance(answer, str) for answer in answers):
        raise SampleError(f'{where}"a" must be a string or a list of them, got {turn.get("a")!r}')
    if not all(answer.strip() for answer in answers):
        raise SampleError(f"{where}an answer is empty")
    return turn["q"], answers


def images_of(image_map: str | Path) -> tuple[list[tuple[str, str]], list[str]]:
    """Every image that an image map names, once.

    Args:
        image_map: path of `image_map.json`.

    Returns:
        (absolute folder, name inside it) in the order of the file, and what is wrong with entries that can't be used.

    Raises:
        ValueError: the file can't be read or has not the expected form.
    """
    folders = _Folders(Path(image_map), must_exist=True)
    images: dict[tuple[str, str], None] = {}
    errors = []
    for key, entry in _read_object(image_map).items():
        try:
            if not isinstance(entry, dict):
                raise SampleError(f"must be an object, got {type(entry).__name__}")
            files = _image_files(entry)
            if files and not isinstance(entry.get("path"), str):
                raise SampleError(f"`path` must be the image folder, got {entry.get('path')!r}")
            images.update(((folders.resolve(entry["path"]), name), None) for name in files)
        except SampleError as error:
            errors.append(f"{image_map}: entry {key!r}: {error}")
    return list(images), errors
