"""Reading ``config.yaml``: what is read, what is written, and every problem with it reported at once."""

from __future__ import annotations

import difflib
import os
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from dataprocess.messages import shorten
from dataprocess.records import DataError

DEFAULT_SEED = 42
_ALI = ("ali_image_path", "ali_image_path_label_file")
_COCO = ("coco_image_path", "coco_image_path_label_file1", "coco_image_path_label_file2")
_OUTPUTS = ("output_image_map", "output_captions")
_LLAVA = ("image_path", "label_file")
_Kind = Literal["ai_challenger", "llava"]
KNOWN_KEYS = (*_ALI, *_COCO, "llava_sources", "seed", *_OUTPUTS)


@dataclass(frozen=True)
class Source:
    """One annotation file and the folder of its photos."""

    name: str
    """Unique in a configuration: ai_challenger, coco_1, coco_2, llava_1, llava_2, …"""
    kind: _Kind
    """The file's format."""
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
    """Absolute path of the file that tells each sample's images."""
    output_captions: Path
    """Absolute path of the file that holds questions and answers."""
    seed: int
    """Chooses between the two fixed prompts."""

    @property
    def output_rejects(self) -> Path:
        """The list of what was left out: beside the captions, ``captions_b.json`` -> ``captions_b_rejects.jsonl``."""
        return self.output_captions.with_name(self.output_captions.stem + "_rejects.jsonl")


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a key may stand only once: PyYAML lets the last one win without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode):
                key = key_node.value
                if key in seen:
                    raise yaml.MarkedYAMLError(problem=f"key {key!r} stands twice", problem_mark=key_node.start_mark)
                seen.add(key)
        return super().construct_mapping(node, deep)


def load_config(path: Path, need_images: bool = False) -> Config:
    """Read and check a configuration file.

    Args:
        path: a YAML file; relative paths in it count from its folder.
        need_images: the image folders must exist (they are only named in the output otherwise).

    Returns:
        The configuration with absolute paths.

    Raises:
        DataError: the file cannot be read or is not YAML, or it has problems, all of which are named.
    """
    checker = _Checker(_read_yaml(path), Path(os.path.abspath(path)).parent, need_images)  # noqa: PTH100 - keeps links
    config = checker.check()
    problems = list(dict.fromkeys(checker.problems))  # two label files may have the same trouble with their folder
    if problems:
        lines = "".join(f"\n  - {problem}" for problem in problems)
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise DataError(f"{path}: {count} in the configuration:{lines}")
    return config


def _read_yaml(path: Path) -> dict[Any, Any]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
        values = yaml.load(text, Loader=_Loader)
    except OSError as exc:
        raise DataError(f"{path}: the configuration cannot be read: {exc.strerror}") from None
    except UnicodeDecodeError as exc:
        raise DataError(f"{path}: the configuration is not UTF-8 (byte {exc.start})") from None
    except yaml.MarkedYAMLError as exc:
        mark = exc.problem_mark
        where = f" at line {mark.line + 1} column {mark.column + 1}" if mark else ""
        raise DataError(f"{path}: not valid YAML{where}: {exc.problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as exc:
        raise DataError(f"{path}: not valid YAML: {' '.join(str(exc).split())}") from None
    if not isinstance(values, dict):
        raise DataError(f"{path}: the configuration must be a list of `key: value` lines, got {shorten(values)}")
    return values


class _Checker:
    """Collects problems instead of stopping at the first."""

    def __init__(self, values: dict[Any, Any], folder: Path, need_images: bool) -> None:
        # `key:` with nothing behind it is as good as absent.
        self.values = {key: value for key, value in values.items() if value is not None and value != ""}
        self.all_keys = list(values)
        self.folder = folder
        self.need_images = need_images
        self.problems: list[str] = []

    def check(self) -> Config:
        self._unknown(self.all_keys, KNOWN_KEYS, "")
        sources = [*self._ali(), *self._coco(), *self._llava()]
        if not sources and not self.problems:
            self.problems.append(f"no source: give {' and '.join(_ALI)}, or the coco_ keys, or llava_sources")
        outputs = [self._path(self.values, key) or self._missing(key) for key in _OUTPUTS]
        seed = self.values.get("seed", DEFAULT_SEED)
        if not isinstance(seed, int) or isinstance(seed, bool):
            self.problems.append(f"seed must be a whole number, got {shorten(seed)}")
        config = Config(tuple(sources), outputs[0], outputs[1], seed)
        if self.folder not in outputs:
            self._outputs(config)
        return config

    def _missing(self, key: str) -> Path:
        if key not in self.values:
            self.problems.append(f"{key} is missing: it names the file to write")
        return self.folder

    def _unknown(self, keys: list[Any], known: tuple[str, ...], where: str) -> None:
        for key in keys:
            if key not in known:
                nearest = difflib.get_close_matches(str(key), known, n=1, cutoff=0)[0]
                self.problems.append(f"{where}unknown key {shorten(key)}: did you mean {nearest}?")

    def _path(self, values: dict[Any, Any], key: str, where: str = "") -> Path | None:
        value = values.get(key)
        if value is None:
            return None
        if not isinstance(value, str) or "\0" in value:
            self.problems.append(f"{where}{key} must be a path (text; quotes help), got {shorten(value)}")
            return None
        try:
            expanded = Path(value).expanduser()
        except RuntimeError:
            self.problems.append(f"{where}{key}: {value}: whose home folder that is cannot be found out")
            return None
        path = Path(os.path.abspath(self.folder / expanded))  # noqa: PTH100 - keeps links, which resolve() would not
        try:
            str(path).encode()
        except UnicodeEncodeError:
            self.problems.append(f"{where}{key}: {str(path)!a} is not UTF-8, so it could not be written down")
            return None
        return path

    def _source(
        self, name: str, kind: _Kind, values: dict[Any, Any], keys: tuple[str, str], where: str = ""
    ) -> list[Source]:
        before = len(self.problems)
        images, labels = (self._path(values, key, where) for key in keys)
        for key, other in (keys, keys[::-1]):
            if key not in values:
                self.problems.append(f"{where}{key} is missing: {other} is given, and a source needs both")
        if images and images.exists() and not images.is_dir():
            self.problems.append(f"{where}{keys[0]}: {images} is not a folder")
        elif images and self.need_images and not images.exists():
            self.problems.append(f"{where}{keys[0]}: no such folder: {images}")
        if labels and not labels.is_file():
            kind_of = "a folder, not a file" if labels.is_dir() else "no such file"
            self.problems.append(f"{where}{keys[1]}: {kind_of}: {labels}")
        if len(self.problems) > before or images is None or labels is None:
            return []
        return [Source(name, kind, str(images), labels)]

    def _ali(self) -> list[Source]:
        if not any(key in self.values for key in _ALI):
            return []
        return self._source("ai_challenger", "ai_challenger", self.values, _ALI)

    def _coco(self) -> list[Source]:
        if not any(key in self.values for key in _COCO):
            return []
        labels = [key for key in _COCO[1:] if key in self.values]
        if not labels:
            self.problems.append(f"{_COCO[1]} or {_COCO[2]} is missing: {_COCO[0]} is given, and a source needs both")
        if _COCO[0] not in self.values:
            self.problems.append(f"{_COCO[0]} is missing: {' and '.join(labels)} need it")
            return []
        return [
            source
            for label in labels
            for source in self._source(f"coco_{label[-1]}", "llava", self.values, (_COCO[0], label))
        ]

    def _llava(self) -> list[Source]:
        entries = self.values.get("llava_sources", [])
        if not isinstance(entries, list):
            self.problems.append(f"llava_sources must be a list of {{image_path, label_file}}, got {shorten(entries)}")
            return []
        sources = []
        for number, entry in enumerate(entries, 1):
            where = f"llava_sources, entry {number}: "
            if not isinstance(entry, dict) or not entry:
                self.problems.append(f"{where}must hold image_path and label_file, got {shorten(entry)}")
                continue
            self._unknown(list(entry), _LLAVA, where)
            given = {key: value for key, value in entry.items() if value is not None and value != ""}
            sources += self._source(f"llava_{number}", "llava", given, _LLAVA, where)
        return sources

    def _outputs(self, config: Config) -> None:
        inputs = {os.path.realpath(source.label_file) for source in config.sources}
        seen: set[str] = set()
        for what, path in (
            ("output_image_map", config.output_image_map),
            ("output_captions", config.output_captions),
            ("the list of rejects", config.output_rejects),
        ):
            real = os.path.realpath(path)
            if real in inputs:
                self.problems.append(f"{what} would overwrite a label file: {path}")
            if real in seen:
                self.problems.append(f"{what} would be the same file as another output: {path}")
            if path.exists() and not path.is_file():
                self.problems.append(f"{what} is not an ordinary file: {path}")
            seen.add(real)
