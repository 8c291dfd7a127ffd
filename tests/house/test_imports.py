"""Imports go one way: each package knows only those that it is built on, and no two files need each other."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAY_IMPORT = {
    "dataprocess": set(),
    "visual": set(),
    "qwen": set(),
    "dataset": {
        "dataprocess.image_bytes",
        "dataprocess.image_io",
        "dataprocess.messages",
        "qwen.tokenization_qwen",
        "qwen.chatml",
        "qwen.conversation",
        "qwen.configuration_qwen.IGNORE_INDEX",
    },
    "model": {"dataprocess", "dataset", "visual", "qwen"},
}
# Programs may import everything, and nobody imports them.
PROGRAMS_IN_FOLDERS = {"dataprocess.process_image", "visual.cache_features"}
PROGRAMS = {file.stem for file in ROOT.glob("*.py")} | PROGRAMS_IN_FOLDERS
# Names that a package hands on, and the module that they come from.
QWEN_NAMES = {
    "IGNORE_INDEX": "qwen.configuration_qwen.IGNORE_INDEX",
    "IMAGE_TOKEN": "qwen.tokenization_qwen",
    "IMAGE_TOKEN_ID": "qwen.tokenization_qwen",
    "QWenTokenizer": "qwen.tokenization_qwen",
    "make_context": "qwen.conversation",
}


def module_files() -> dict[str, Path]:
    """Every file of the product by its dotted name; a package's `__init__.py` has the package's."""
    files = [*ROOT.glob("*.py"), *(file for package in MAY_IMPORT for file in (ROOT / package).rglob("*.py"))]
    return {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


def imported(source: str, package: str) -> set[str]:
    """Everything that a module of a package imports, wherever it stands, as full dotted names."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def within(name: str, allowed: set[str]) -> bool:
    name = QWEN_NAMES.get(name.removeprefix("qwen."), name)
    return any(name == prefix or name.startswith(prefix + ".") for prefix in allowed)


def offences(source: str, package: str) -> set[str]:
    """What a module of a package imports of ours and may not."""
    top = package.split(".")[0]
    ours = {name for name in imported(source, package) if within(name, {*MAY_IMPORT, *PROGRAMS})}
    return {name for name in ours if not within(name, {top, *MAY_IMPORT[top]}) or within(name, PROGRAMS)}


def package_of(module: str, file: Path) -> str:
    return module if file.name == "__init__.py" else module.rpartition(".")[0]


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_a_package_imports_only_what_it_is_built_on(package):
    files = {name: file for name, file in module_files().items() if within(name, {package})}
    assert len(files) > 1
    found = {
        name: offences(file.read_text(encoding="utf-8"), package_of(name, file))
        for name, file in files.items()
        if name not in PROGRAMS_IN_FOLDERS
    }
    assert not {name: names for name, names in found.items() if names}


@pytest.mark.parametrize(
    ("source", "package", "found"),
    [
        ("from dataprocess.records import Sample", "dataset", {"dataprocess.records.Sample"}),
        ("from dataset import load_image", "dataprocess", {"dataset.load_image"}),
        ("def f():\n    from qwen import QWenModel", "visual", {"qwen.QWenModel"}),
        ("from qwen import IGNORE_INDEX, QWenTokenizer", "dataset", set()),
        ("from qwen.configuration_qwen import QWenConfig", "dataset", {"qwen.configuration_qwen.QWenConfig"}),
        ("from ..lora import add_lora", "model.runs", set()),
        ("import train", "model", {"train"}),
        ("from visual.cache_features import fill", "model", {"visual.cache_features.fill"}),
    ],
)
def test_the_test_above_sees_what_it_should(source, package, found):
    assert offences(source, package) == found


def test_no_two_files_need_each_other():
    """Neither directly nor through others, imports for type checkers and inside functions included."""
    files = module_files()
    needs = {}
    for module, file in files.items():
        needs[module] = set()
        for name in imported(file.read_text(encoding="utf-8"), package_of(module, file)):
            while name and name not in files:  # a function or class: the file it is in
                name = name.rpartition(".")[0]
            needs[module] |= {name} - {"", module}
    try:
        TopologicalSorter(needs).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_training_does_not_import_the_export_room():
    """Of `model/export`, starting from a LLaVA is in train.py; what writes an export is not."""
    files = module_files()
    seen, todo = set(), ["train"]
    while todo:
        module = todo.pop()
        seen.add(module)
        for name in imported(files[module].read_text(encoding="utf-8"), package_of(module, files[module])):
            while name and name not in files:
                name = name.rpartition(".")[0]
            todo += [name] if name and name not in seen else []
    assert "model.export.from_llava" in seen
    assert {name for name in seen if within(name, {"model.export"})} <= {
        "model.export",
        "model.export.from_llava",
        "model.export.norm_block",
    }


def test_evaluation_is_imported_where_it_is_asked_for():
    """At the head of evaluate.py and of the room's own files alone: a plain training run loads none of it."""
    for module, file in module_files().items():
        head = [node for node in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(node, ast.ImportFrom)]
        names = imported("\n".join(map(ast.unparse, head)), package_of(module, file))
        if module != "evaluate" and not within(module, {"model.evaluation"}):
            assert not {name for name in names if within(name, {"model.evaluation"})}, module
