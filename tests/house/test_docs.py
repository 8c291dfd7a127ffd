"""The documents say the same in both languages, and what they say is so: flags, defaults, keys, files and sizes."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
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
PAIRS = [
    ("README.md", "README_zh.md"),
    ("docs/flags.md", "docs/flags_zh.md"),
    ("docs/data-formats.md", "docs/data-formats_zh.md"),
]
READMES = PAIRS[0]
FLAGS = PAIRS[1]
FORMATS = PAIRS[2]
DOCUMENTS = sorted([*READMES, *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.S | re.M)
# Made by training, by the demo or by the user, or belonging to a checkpoint.
NOT_IN_REPOSITORY = ("data/", "exports/", "results/", "weights/", "./weights/", "runs/", "checkpoint-", ".venv", "tmp-")
HUB_OWNERS = ("Qwen/", "openai/", "google/")


def load(path: str):
    """A program as a module of its own: `import test` would mean Python's."""
    spec = spec_from_file_location(path.replace("/", "_"), ROOT / path)
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


PROGRAMS = {
    "test.py": load("test.py").parse_arguments,
    "process_image.py": process_image.main,
    "cache_features.py": load("visual/cache_features.py").parse_arguments,
    "export.py": load("export.py").parse_arguments,
    "evaluate.py": load("evaluate.py").parse_arguments,
    "web_demo.py": load("web_demo.py").parse_arguments,
}


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def prose(name: str) -> str:
    return FENCE.sub("", text_of(name))


def code_spans(name: str) -> list[str]:
    return [span.replace("\\|", "|") for span in re.findall(r"`([^`\n]+)`", prose(name))]


def rows(name: str) -> list[list[str]]:
    """The cells of all table rows; an escaped bar does not split cells."""
    lines = [line for line in prose(name).splitlines() if line.startswith("|")]
    return [[cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def parser_actions(parse) -> list[argparse.Action]:
    """The arguments that a program declares, caught when it parses."""
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
    """Our own flags of train.py."""
    own = inspect.get_annotations(VLMTrainingArguments)
    fields = [*dataclasses.fields(ModelArguments), *dataclasses.fields(DataArguments)]
    fields += [field for field in dataclasses.fields(VLMTrainingArguments) if field.name in own]
    return {field.name: field for field in fields}


def in_table(value: object) -> str:
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def test_no_document_holds_the_marks_of_a_merge():
    marked = re.compile(r"^(<{7}|={7}|>{7})( |$)", re.M)
    assert [name for name in DOCUMENTS if marked.search((ROOT / name).read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize(("english", "chinese"), PAIRS)
def test_both_languages_have_the_same_structure_commands_and_code(english: str, chinese: str) -> None:
    assert re.findall(r"^(#+) ", prose(english), re.M) == re.findall(r"^(#+) ", prose(chinese), re.M)
    assert FENCE.findall(text_of(english)) == FENCE.findall(text_of(chinese))
    # Flags, defaults and keys are the same cell by cell, whatever the language around them.
    cells = [[re.findall(r"`[^`]+`", cell) for row in rows(name) for cell in row] for name in (english, chinese)]
    assert cells[0] == cells[1]


@pytest.mark.parametrize("name", FLAGS)
def test_training_flags_and_defaults(name: str) -> None:
    table = [row for row in rows(name) if len(row) == 3]
    fields = train_fields()
    assert {"lora_rank", "image_map", "feature_proj_lr", "learning_rate", "remove_unused_columns"} <= fields.keys()
    for flag, field in fields.items():
        cells = [row[1] for row in table if row[0] == f"`--{flag}`"]
        assert cells, f"--{flag} has no row"
        if field.default is not None and field.default is not dataclasses.MISSING:
            assert in_table(field.default) in cells, f"--{flag}: default {field.default!r}, the table says {cells}"


@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.parametrize("parse", PROGRAMS.values(), ids=PROGRAMS.keys())
def test_other_flags_and_defaults(name: str, parse) -> None:
    table = [row for row in rows(name) if len(row) == 3]
    actions = parser_actions(parse)
    assert actions
    for action in actions:
        cells = [row[1] for row in table if row[0] == f"`{action.option_strings[0]}`"]
        assert cells, f"{action.option_strings[0]} has no row"
        is_greedy = isinstance(action, argparse._StoreFalseAction)  # argparse gives it a default that parsing ignores
        if action.default is not None and not is_greedy and not isinstance(action.default, Path | list):
            assert in_table(action.default) in cells, f"{action.dest}: {action.default!r}, the table says {cells}"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_flags_exist(name: str) -> None:
    """Every flag in tables, text and commands is one that the programs, the tests or the benchmarks take."""
    known = {f"--{field.name}" for field in dataclasses.fields(VLMTrainingArguments)}
    known |= {f"--{flag}" for flag in train_fields()} | {
        "--help",
        "--help_all",
        "--all",
        "--web",
        "--lowest",
        "--real",
        "--machines",
        "--release",
    }
    known |= {"--model", "--image", "--model_args", "--tasks"}  # of other projects, in docs/serving.md
    known |= {"--mmproj", "--jinja", "--host", "--port", "--nproc_per_node"}  # of llama.cpp, and of torchrun
    for parse in PROGRAMS.values():
        known |= {option for action in parser_actions(parse) for option in action.option_strings}
    for script in (ROOT / "benchmarks").rglob("*.py"):
        known |= set(re.findall(r"""\badd(?:_argument)?\(\s*["'](--\w+)""", script.read_text(encoding="utf-8")))
    mentioned = set(re.findall(r"(?<![\w-])--[a-z]\w+", text_of(name)))
    assert mentioned - known == set()


@pytest.mark.parametrize("name", [*READMES, *FLAGS])
def test_training_command_of_the_table(name: str) -> None:
    """What the tables say `train.sh` gives is what it gives."""
    given = dict(re.findall(r"--(\w+) (\S+)", text_of("train.sh").split("exec torchrun", 1)[1]))
    for row in (row for row in rows(name) if len(row) == 4 and row[0].startswith("`--") and row[2]):
        flag = row[0].strip("`-")
        assert given[flag].lower() == row[2].strip("`").lower()


@pytest.mark.parametrize("name", FORMATS)
def test_configuration_keys(name: str) -> None:
    first_cells = {row[0] for row in rows(name)}
    assert {f"`{key}`" for key in KNOWN_KEYS} <= first_cells
    in_yaml = set(re.findall(r"^(?:# )?(\w+):", text_of("dataprocess/config.yaml"), re.M))
    assert {f"`{key}`" for key in in_yaml} <= first_cells


@pytest.mark.parametrize("name", DOCUMENTS)
def test_files_and_links_exist(name: str) -> None:
    """Every path in backticks that belongs to the repository is there, and so is every file that is linked."""
    paths = {
        span
        for span in code_spans(name)
        if re.fullmatch(r"[\w.-]+(?:/[\w.-]*)+|[\w-]+\.(?:py|sh|yaml|toml|svg)", span)
        and not span.startswith((*NOT_IN_REPOSITORY, *HUB_OWNERS))
    }
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []
    links = [link for link in re.findall(r"\]\(([^)]+)\)", prose(name)) if not link.startswith("http")]
    folder = (ROOT / name).parent
    assert [link for link in links if not (folder / link.split("#")[0]).exists()] == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_scripts_of_commands_exist(name: str) -> None:
    commands = "\n".join(code for kind, code in FENCE.findall(text_of(name)) if kind == "sh")
    scripts = set(re.findall(r"\b(?:sh|python) ((?:[\w.]+/)*[\w]+\.(?:sh|py))", commands))
    scripts |= {module.replace(".", "/") + ".py" for module in re.findall(r"-m (benchmarks[\w.]+)", text_of(name))}
    assert [script for script in sorted(scripts) if not (ROOT / script).is_file()] == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_tests_that_are_named_exist(name: str) -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text_of(name))
    assert [test for file, test in named if f"\ndef {test}(" not in text_of(file)] == []


@pytest.mark.parametrize("name", READMES)
def test_the_students_path_has_true_line_counts(name: str) -> None:
    path = [row for row in rows(name) if len(row) == 4 and row[0].isdigit()]
    assert len(path) == 10
    for row in path:
        files = re.findall(r"`([^`]+)`", row[1])
        lines = sum(len(text_of(file).splitlines()) for file in files)
        assert abs(int(row[2]) - lines) <= 0.1 * lines, f"{files} have {lines} lines, the table says {row[2]}"


def test_the_house_keeps_its_budgets() -> None:
    """What a reader has to read stays small: see the README's tree."""
    programs = dict.fromkeys(("train.py", "test.py", "evaluate.py", "web_demo.py"), 170)
    longest = {"README.md": 260, "README_zh.md": 260, **programs}
    assert [name for name, most in longest.items() if len(text_of(name).splitlines()) > most] == []
    assert len(list((ROOT / "model").glob("*.py"))) <= 12


@pytest.mark.parametrize("name", DOCUMENTS)
def test_commands_for_other_language_models_name_other_layers(name: str) -> None:
    """`train.sh` names the layers of Qwen for LoRA, which no other language model has."""
    commands = [line for _, code in FENCE.findall(text_of(name)) for line in code.replace("\\\n", " ").splitlines()]
    for command in commands:
        base = re.search(r"sh train\.sh.* --base_language_model (\S+)", command)
        if base and not re.fullmatch(r"Qwen/Qwen-\d+B-Chat", base[1]) and "--train_only" not in command:
            assert " --target_modules " in command, command
