"""Read `image_map.json` and `captions.json`, check them, and keep them in little memory.

    image_map.json   {key: {"image_file": str | [str, ...] | null, "ID": int, "path": str}}
    captions.json    {str(ID): {"q": str, "a": str | [str, ...]}}   or   {str(ID): {"turns": [{"q", "a"}, ...]}}

Files of the original project are read too: they call the first field `iamge_file`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import reprlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from dataprocess.image_io import check_image_name
from dataprocess.messages import format_count
from qwen.tokenization_qwen import IMAGE_TOKEN

from .prompt import SampleError

logger = logging.getLogger(__name__)

_abridged = reprlib.Repr()
_abridged.maxstring = _abridged.maxother = 100
short = _abridged.repr  # a value as messages show it: a key of a megabyte must not fill them


@dataclass(frozen=True)
class Sample:
    """One entry of the two files."""

    id: int
    image_folder: str
    """Absolute folder of its images; empty if it has none."""
    image_files: list[str]
    """File names inside that folder, in the order of the placeholders."""
    turns: list[tuple[str, list[str]]]
    """(question, alternative answers) of each turn."""


class Annotations:
    """The samples of two files, in the order of the image map.

    They are kept as one block of bytes, which data workers share: each of them would copy a million Python strings, for
    reading one changes its reference count.

    Args:
        max_samples: read only the first so many, good or bad.
        skip_bad: leave bad samples out, and keep their messages in `errors`.
        need_folders: a missing image folder makes its samples bad.

    Raises:
        ValueError: a file cannot be read or is not of the form above.
        SampleError: samples are contradictory or incomplete; the message names the first IDs. With `skip_bad`, only
            if there is no good one.
    """

    errors: list[str]
    """A message for each sample that was left out, naming it."""
    fingerprint: str
    """Hash of the samples in their order, without the folders of their images, which may be moved."""

    def __init__(
        self,
        image_map: str | Path,
        captions_file: str | Path,
        max_samples: int | None = None,
        *,
        skip_bad: bool = False,
        need_folders: bool = True,
    ) -> None:
        packed, ends, self.errors = bytearray(), [0], []
        digest = hashlib.sha256()
        entries, captions = read_object(image_map), read_object(captions_file)
        if not entries:
            raise ValueError(f"{image_map} holds no samples; prepare the data with dataprocess/process_image.py")
        folder_of = functools.cache(functools.partial(find_folder, Path(image_map), need_folders))
        encode = json.JSONEncoder(ensure_ascii=False).encode  # json.dumps would make one for each sample
        key_of_id: dict[int, str] = {}
        for key, entry in islice(entries.items(), max_samples):
            try:
                sample = parse_entry(key, entry, captions, folder_of)
                if sample.id in key_of_id:
                    keys = f"{short(key_of_id[sample.id])} and {short(key)}"
                    raise SampleError(f"sample {sample.id}: {keys} both have this ID")
            except SampleError as error:
                self.errors.append(str(error))
                continue
            key_of_id[sample.id] = key
            digest_sample(digest, sample)
            record = [sample.id, sample.image_folder, sample.image_files, sample.turns]
            packed += encode(record).encode("utf-8", "surrogatepass")
            ends.append(len(packed))
        surplus = len(captions) - len(entries) if max_samples is None else 0
        self.check_counts(image_map, captions_file, skip_bad and bool(key_of_id), surplus)
        self.fingerprint = digest.hexdigest()[:16]
        self._packed = torch.frombuffer(packed, dtype=torch.uint8)  # (bytes,)
        self._ends = torch.tensor(ends)  # (samples + 1,)

    def check_counts(self, image_map: str | Path, captions_file: str | Path, skip: bool, surplus: int) -> None:
        """Refuse bad samples, unless they are to be skipped; warn of `surplus` captions without an entry."""
        if self.errors and not skip:
            bad, first = format_count(len(self.errors), "bad sample"), "; ".join(self.errors[:3])
            more = f"; and {len(self.errors) - 3} more" if len(self.errors) > 3 else ""
            raise SampleError(f"{bad} in {image_map} and {captions_file}: {first}{more}")
        if surplus > 0:
            counted = format_count(surplus, "entry has", "entries have")
            logger.warning("%s: %s no image_map entry", captions_file, counted)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        start, end = self._ends[index : index + 2].tolist()
        text = self._packed[start:end].numpy().tobytes().decode("utf-8", "surrogatepass")
        sample_id, folder, files, turns = json.loads(text)
        return Sample(sample_id, folder, files, [(question, answers) for question, answers in turns])

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))


def digest_sample(digest: Any, sample: Sample) -> None:
    """Add a sample to a fingerprint."""
    digest.update(repr((sample.id, sample.image_files, sample.turns)).encode("utf-8", "surrogatepass"))


def find_folder(image_map: Path, must_exist: bool, written: str) -> str:
    """Return the absolute folder for a `path` of the image map.

    A relative one counts from the current folder, as in the original project, or else from the file's own.
    """
    for folder in (Path(written).absolute(), (image_map.parent / written).absolute()):
        if os.path.isdir(folder):  # noqa: PTH112 - Path.is_dir raises for a name of 5,000 characters
            return str(folder)
    if must_exist:
        raise SampleError(f"image folder {short(written)} does not exist; correct `path` in {image_map}")
    return written


def read_object(path: str | Path) -> dict[str, Any]:
    """Read a file that holds one JSON object; refuse any other."""
    try:
        with Path(path).open(encoding="utf-8-sig") as file:
            value = json.load(file, object_pairs_hook=refuse_repeated_keys)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a valid JSON file: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def refuse_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of JSON; the ValueError names a key that stands twice."""
    # JSON readers keep the last of two equal keys: a sample would be lost silently.
    result = dict(pairs)
    if len(result) != len(pairs):
        repeated, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {short(repeated)} stands twice in one object")
    return result


def parse_entry(key: str, entry: Any, captions: Any, folder_of: Callable[[str], str]) -> Sample:
    """Check one entry, and join it with its caption; `captions.get` finds that by ID, as text.

    Raises:
        SampleError: the sample cannot be used; the message names it.
    """
    if not isinstance(entry, dict):
        raise SampleError(f"entry {short(key)} must be an object, got {type(entry).__name__}")
    sample_id = entry.get("ID")
    if type(sample_id) is not int or not -(2**63) <= sample_id < 2**63:  # True is an int, too
        raise SampleError(f"entry {short(key)}: ID must be an integer of at most 64 bits, got {short(sample_id)}")
    try:
        folder, files = folder_and_files(entry, folder_of)
        turns = _turns(captions.get(str(sample_id)))
        placeholders = sum(question.count(IMAGE_TOKEN) for question, _ in turns)
        if placeholders != len(files):
            raise SampleError(
                f"its questions have {format_count(placeholders, 'image placeholder')} {IMAGE_TOKEN} but it has "
                f"{format_count(len(files), 'image')}; write one for each image"
            )
    except SampleError as error:
        raise SampleError(f"sample {sample_id}: {error}") from None
    return Sample(sample_id, folder, files, turns)


def folder_and_files(entry: Any, folder_of: Callable[[str], str]) -> tuple[str, list[str]]:
    """Return the folder of an entry's images, empty if it has none, and their names."""
    if not isinstance(entry, dict):
        raise SampleError(f"must be an object, got {type(entry).__name__}")
    field = "image_file" if "image_file" in entry else "iamge_file"
    if field not in entry:
        raise SampleError("has no `image_file`; write null for a sample without images")
    value = entry[field]
    files = [] if value is None else value if isinstance(value, list) else [value]
    for file in files:
        if not isinstance(file, str):
            raise SampleError(f"`{field}` must be a file name, a list of them or null, got {short(value)}")
        if reason := check_image_name(file):
            raise SampleError(f"{reason}: {short(file)}")
    if not files:
        return "", []
    path = entry.get("path")
    if not isinstance(path, str) or not path:  # an empty one would be the current folder
        raise SampleError(f"`path` must be the image folder, got {short(path)}")
    return folder_of(path), files


def _turns(caption: Any) -> list[tuple[str, list[str]]]:
    """Return the (question, alternative answers) of each turn."""
    if caption is None:
        raise SampleError("has no entry in the captions file")
    if not isinstance(caption, dict) or ("turns" in caption) == ("q" in caption or "a" in caption):
        raise SampleError(f'its caption must be either {{"q", "a"}} or {{"turns"}}, got {short(caption)}')
    turns = caption.get("turns", [caption])
    if not isinstance(turns, list) or not turns:
        raise SampleError(f'"turns" must be a list of {{"q", "a"}} objects, got {short(turns)}')
    checked = []
    for number, turn in enumerate(turns, start=1):
        question, answer = (turn.get("q"), turn.get("a")) if isinstance(turn, dict) else (None, None)
        answers: list[Any] = answer if isinstance(answer, list) else [answer]
        if not isinstance(question, str) or not answers or not all(isinstance(text, str) for text in answers):
            raise SampleError(f'turn {number} must be {{"q": text, "a": text or list of texts}}, got {short(turn)}')
        if not all(text.strip() for text in answers):
            raise SampleError(f"turn {number}: an answer is empty")
        checked.append((question, answers))
    return checked
