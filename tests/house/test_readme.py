"""Both READMEs say the same, and what they say is so: flags, defaults, keys, and files."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import re
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from dataprocess import process_image
from dataprocess.config import KNOWN_KEYS
from model import VLMTrainingArguments
from model.arguments import DataArguments, ModelArguments

ROOT = Path(__file__).parents[2]
# As a module of its own: `import test` would mean Python's.
SPEC = spec_from_file_location("test_py", ROOT / "test.py")
ask = module_from_spec(SPEC)
SPEC.loader.exec_module(ask)
CACHE_SPEC = spec_from_file_location("cache_features", ROOT / "visual" / "cache_features.py")
cache_features = module_from_spec(CACHE_SPEC)
sys.modules["cache_features"] = cache_features  # its dataclasses look there
CACHE_SPEC.loader.exec_module(cache_features)
OTHERS = {
    "test.py": ask.parse_arguments,
    "process_image.py": process_image.main,
    "cache_features.py": cache_features.parse_arguments,
}
READMES = ("README.md", "README_zh.md")
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.S | re.M)
# Made by training, by the demo or by the user, or belonging to a checkpoint.
NOT_IN_REPOSITORY = ("data/", "weights/", "./weights/", "runs/", "checkpoint-", ".venv")
HUB_OWNERS = ("Qwen/", "openai/", "google/")


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def prose(name: str) -> str:
    return FENCE.sub("", text_of(name))


def code_spans(name: str) -> list[str]:
    return [span.replace("\\|", "|") for span in re.findall(r"`([^`\n]+)`", prose(name))]


def rows(name: str) -> list[list[str]]:
    """The cells of all table rows; a bar that is escaped does not part cells."""
    lines = [line for line in prose(name).splitlines() if line.startswith("|")]
    return [[cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def parser_actions(parse) -> list[argparse.Action]:
    """The arguments that an entry point declares, caught when it parses."""
    caught: list[argparse.Action] = []

    def stop(self, *args, **kwargs):
        caught.extend(self._actions)
        raise SystemExit

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        with pytest.raises(SystemExit):
            parse([])
    return [action for action in caught if action.dest != "help"]


def train_fields() -> dict[str, dataclasses.Field]:
    own = ast.parse(text_of("model/arguments.py"))
    names = {
        node.target.id
        for class_ in ast.walk(own)
        if isinstance(class_, ast.ClassDef) and class_.name == VLMTrainingArguments.__name__
        for node in class_.body
        if isinstance(node, ast.AnnAssign)
    }
    fields = [*dataclasses.fields(ModelArguments), *dataclasses.fields(DataArguments)]
    fields += [field for field in dataclasses.fields(VLMTrainingArguments) if field.name in names]
    return {field.name: field for field in fields}


def in_table(value: object) -> str:
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def test_same_structure() -> None:
    english, chinese = (re.findall(r"^(#+) ", prose(name), re.M) for name in READMES)
    assert english == chinese
    english, chinese = ([len(row) for row in rows(name)] for name in READMES)
    assert english == chinese
    english, chinese = (re.findall(r"^<!--.*-->$", prose(name), re.M) for name in READMES)
    assert english == chinese


def test_same_commands_and_outputs() -> None:
    english, chinese = (FENCE.findall(text_of(name)) for name in READMES)
    assert len(english) > 15
    assert english == chinese


def test_same_code_in_tables() -> None:
    """Flags, defaults and keys are the same cell by cell, whatever the language around them."""
    english, chinese = ([re.findall(r"`[^`]+`", cell) for row in rows(name) for cell in row] for name in READMES)
    assert english == chinese


@pytest.mark.parametrize("readme", READMES)
def test_training_flags_and_defaults(readme: str) -> None:
    table = [row for row in rows(readme) if len(row) == 3]
    fields = train_fields()
    assert {"lora_rank", "image_map", "feature_proj_lr", "learning_rate", "remove_unused_columns"} <= fields.keys()
    for name, field in fields.items():
        cells = [row[1] for row in table if row[0] == f"`--{name}`"]
        assert cells, f"--{name} has no row"
        if field.default is not None and field.default is not dataclasses.MISSING:
            assert in_table(field.default) in cells, f"--{name}: default {field.default!r}, the table says {cells}"


@pytest.mark.parametrize("readme", READMES)
@pytest.mark.parametrize("parse", OTHERS.values(), ids=OTHERS.keys())
def test_other_flags_and_defaults(readme: str, parse) -> None:
    table = [row for row in rows(readme) if len(row) == 3]
    actions = parser_actions(parse)
    assert actions
    for action in actions:
        cells = [row[1] for row in table if row[0] == f"`{action.option_strings[0]}`"]
        assert cells, f"{action.option_strings[0]} has no row"
        is_greedy = isinstance(action, argparse._StoreFalseAction)  # argparse gives it a default that parsing ignores
        if action.default is not None and not is_greedy and not isinstance(action.default, Path | list):
            assert in_table(action.default) in cells, f"{action.dest}: {action.default!r}, the table says {cells}"


@pytest.mark.parametrize("readme", READMES)
def test_flags_exist(readme: str) -> None:
    """Every flag in tables, text and commands is one that the entry points, or the benchmarks, take."""
    known = {f"--{field.name}" for field in dataclasses.fields(VLMTrainingArguments)}
    known |= {f"--{name}" for name in train_fields()}
    for parse in OTHERS.values():
        known |= {option for action in parser_actions(parse) for option in action.option_strings}
    for script in (ROOT / "benchmarks").glob("*.py"):
        known |= set(re.findall(r"""\badd(?:_argument)?\(\s*["'](--\w+)""", script.read_text(encoding="utf-8")))
    mentioned = set(re.findall(r"(?<![\w-])--[a-z]\w+", text_of(readme)))
    assert mentioned - known == {"--help"}


@pytest.mark.parametrize("readme", READMES)
def test_training_command_of_the_table(readme: str) -> None:
    """What the table says `train.sh` gives is what it gives."""
    given = dict(re.findall(r"--(\w+) (\S+)", text_of("train.sh").split("exec torchrun", 1)[1]))
    for row in (row for row in rows(readme) if len(row) == 4 and row[0].startswith("`--") and row[2]):
        flag = row[0].strip("`-")
        assert given[flag].lower() == row[2].strip("`").lower()


@pytest.mark.parametrize("readme", READMES)
def test_configuration_keys(readme: str) -> None:
    first_cells = {row[0] for row in rows(readme)}
    assert {f"`{key}`" for key in KNOWN_KEYS} <= first_cells
    in_yaml = set(re.findall(r"^(?:# )?(\w+):", text_of("dataprocess/config.yaml"), re.M))
    assert {f"`{key}`" for key in in_yaml} <= first_cells


@pytest.mark.parametrize("readme", READMES)
def test_files_exist(readme: str) -> None:
    """Every path in backticks that belongs to the repository is there."""
    paths = {
        span
        for span in code_spans(readme)
        if re.fullmatch(r"[\w.-]+(?:/[\w.-]*)*", span)
        and not span.startswith((*NOT_IN_REPOSITORY, *HUB_OWNERS))
        and ("/" in span or re.search(r"\.(?:py|sh|yaml|toml|txt|md|svg)$", span))
    }
    assert len(paths) > 20
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("readme", READMES)
def test_links_resolve(readme: str) -> None:
    links = re.findall(r"\]\(([^)]+)\)", prose(readme))
    files = [link for link in links if not link.startswith("http")]
    assert ".github/architecture.svg" in files
    assert [link for link in files if not (ROOT / link.split("#")[0]).exists()] == []


@pytest.mark.parametrize("readme", READMES)
def test_scripts_of_commands_exist(readme: str) -> None:
    commands = "\n".join(code for kind, code in FENCE.findall(text_of(readme)) if kind == "sh")
    scripts = set(re.findall(r"\b(?:sh|python) ((?:[\w.]+/)*[\w]+\.(?:sh|py))", commands))
    assert {"demo.sh", "train.sh", "test.py", "tests/run.sh"} <= scripts
    assert [script for script in sorted(scripts) if not (ROOT / script).is_file()] == []
