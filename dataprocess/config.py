"""Read `config.yaml`: what is read, what is written, and every problem with it reported at once."""

from __future__ import annotations

import difflib
import os
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .messages import format_count, shorten
from .records import DataError

DEFAULT_SEED = 42
_ALI = ("ali_image_path", "ali_image_path_label_file")
_COCO = ("coco_image_path", "coco_image_path_label_file1", "coco_image_path_label_file2")
_OUTPUTS = ("output_image_map", "output_captions")
_LLAVA = ("image_path", "label_file")
KNOWN_KEYS = (*_ALI, *_COCO, "llava_sources", "seed", *_OUTPUTS)


@dataclass(frozen=True)
class Source:
    """One annotation file and the folder of its photos."""

    name: str
    """Unique in a configuration: ai_challenger, and in LLaVA's format coco_1, coco_2, llava_1, llava_2, …"""
    image_path: str
    """Absolute folder of the photos, without a trailing slash."""
    label_file: Path
    """Absolute path of the annotation file."""


@dataclass(frozen=True)
class Config:
    """A checked configuration."""

    sources: tuple[Source, ...]
    """At least one, in the order in which they are written."""
    output_image_map: Path
    """Absolute path of the file that names each sample's images."""
    output_captions: Path
    """Absolute path of the file that holds questions and answers."""
    seed: int
    """Chooses between the two fixed prompts."""

    @property
    def output_rejects(self) -> Path:
        """The list of what was left out, next to the captions: `captions_b.json` -> `captions_b_rejects.jsonl`."""
        return self.output_captions.with_name(self.output_captions.stem + "_rejects.jsonl")


def load_config(path: Path, need_images: bool = False) -> Config:
    """Read and check a configuration file.

    Args:
        path: a YAML file; relative paths in it start from its folder.
        need_images: the image folders must exist (otherwise they are only named in the output).

    Raises:
        DataError: the file cannot be read or is not YAML, or it has problems, all of which are named.
    """
    values = _read_yaml(path)
    checker = _Checker(Path(os.path.abspath(path)).parent, need_images)  # noqa: PTH100 - keeps links
    values = checker.check_keys(values, KNOWN_KEYS)
    sources = checker.sources(values)
    if not sources and not checker.problems:
        checker.problems.append(f"no source: give {' and '.join(_ALI)}, or the coco_ keys, or llava_sources")
    image_map, captions = (checker.path(values, key) for key in _OUTPUTS)
    checker.problems += [f"{key} is missing: it names the file to write" for key in _OUTPUTS if key not in values]
    seed = values.get("seed", DEFAULT_SEED)
    if not isinstance(seed, int) or isinstance(seed, bool):
        checker.problems.append(f"seed must be a whole number, got {shorten(seed)}")
    config = Config(tuple(sources), image_map, captions, seed) if image_map and captions else None
    if config:
        checker.check_outputs(config)
    problems = list(dict.fromkeys(checker.problems))  # two label files may have the same trouble with their folder
    if problems or not config:
        lines = "".join(f"\n  - {problem}" for problem in problems)
        raise DataError(f"{path}: {format_count(len(problems), 'problem')} in the configuration:{lines}")
    return config


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a repeated key: PyYAML silently keeps the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"key {key.value!r} is repeated", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[Any, Any]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
        values = yaml.load(text, Loader=_Loader)
    except OSError as exc:
        raise DataError(f"{path}: the configuration cannot be read: {exc.strerror}") from None
    except UnicodeDecodeError as exc:
        raise DataError(f"{path}: the configuration is not UTF-8 (byte {exc.start})") from None
    except (yaml.YAMLError, ValueError, RecursionError) as exc:
        raise DataError(f"{path}: not valid YAML: {' '.join(str(exc).split())}") from None  # says the line, too
    if not isinstance(values, dict):
        raise DataError(f"{path}: the configuration must be a list of `key: value` lines, got {shorten(values)}")
    return values


class _Checker:
    """Collects problems instead of stopping at the first."""

    def __init__(self, folder: Path, need_images: bool) -> None:
        self.folder = folder
        self.need_images = need_images
        self.problems: list[str] = []

    def check_keys(self, values: dict[Any, Any], known: tuple[str, ...], where: str = "") -> dict[Any, Any]:
        """Return the values without empty ones (`key:`), which are as good as absent."""
        for key in values:
            if key not in known:
                nearest = difflib.get_close_matches(str(key), known, n=1, cutoff=0)[0]
                self.problems.append(f"{where}unknown key {shorten(key)}: did you mean {nearest}?")
        return {key: value for key, value in values.items() if value is not None and value != ""}

    def path(self, values: dict[Any, Any], key: str, where: str = "") -> Path | None:
        """Return the absolute path that a key names; None if the key is absent or its value is a problem."""
        value = values.get(key)
        if value is None:
            return None
        if not isinstance(value, str) or "\0" in value:
            self.problems.append(f"{where}{key} must be a path (text; quotes help), got {shorten(value)}")
            return None
        try:
            path = Path(os.path.abspath(self.folder / Path(value).expanduser()))  # noqa: PTH100 - keeps links
            path.exists()  # raises if no file can have this name
            str(path).encode()  # it is written into the image map
        except (RuntimeError, OSError, ValueError) as exc:  # RuntimeError: an unknown home folder
            reason = getattr(exc, "strerror", None) or str(exc)
            self.problems.append(f"{where}{key}: {shorten(value)} cannot be used: {reason}")
            return None
        return path

    def sources(self, values: dict[Any, Any]) -> list[Source]:
        """Return the sources without problems."""
        found: list[Source | None] = []
        if any(key in values for key in _ALI):
            found.append(self.source("ai_challenger", values, *_ALI))
        labels = [key for key in _COCO[1:] if key in values]
        if _COCO[0] in values and not labels:
            self.problems.append(f"{_COCO[1]} or {_COCO[2]} is missing: {_COCO[0]} is given, and a source needs both")
        found += [self.source(f"coco_{key[-1]}", values, _COCO[0], key) for key in labels]
        entries = values.get("llava_sources", [])
        if not isinstance(entries, list):
            self.problems.append(f"llava_sources must be a list of {{image_path, label_file}}, got {shorten(entries)}")
            entries = []
        for number, entry in enumerate(entries, 1):
            where = f"llava_sources, entry {number}: "
            if isinstance(entry, dict) and entry:
                values = self.check_keys(entry, _LLAVA, where)
                found.append(self.source(f"llava_{number}", values, *_LLAVA, where))
            else:
                self.problems.append(f"{where}must hold image_path and label_file, got {shorten(entry)}")
        return [source for source in found if source]

    def source(
        self, name: str, values: dict[Any, Any], image_key: str, label_key: str, where: str = ""
    ) -> Source | None:
        for key, other in ((image_key, label_key), (label_key, image_key)):
            if key not in values:
                self.problems.append(f"{where}{key} is missing: {other} is given, and a source needs both")
        images, labels = self.path(values, image_key, where), self.path(values, label_key, where)
        if images and (images.exists() or self.need_images) and not images.is_dir():
            self.problems.append(f"{where}{image_key}: no such folder: {images}")
        if labels and not labels.is_file():
            self.problems.append(f"{where}{label_key}: no such file: {labels}")
        return Source(name, str(images), labels) if images and labels else None

    def check_outputs(self, config: Config) -> None:
        taken = {os.path.realpath(source.label_file): "a label file" for source in config.sources}
        for what, path in (
            ("output_image_map", config.output_image_map),
            ("output_captions", config.output_captions),
            ("the list of rejects", config.output_rejects),
        ):
            real = os.path.realpath(path)
            if real in taken:
                self.problems.append(f"{what} would overwrite {taken[real]}: {path}")
            if path.exists() and not path.is_file():
                self.problems.append(f"{what} is not an ordinary file: {path}")
            taken[real] = what
