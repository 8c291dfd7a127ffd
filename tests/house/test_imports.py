"""Imports go one way: each package knows only those that it is built on."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("dataprocess", "dataset", "visual", "qwen", "model")
ENTRY_POINTS = ("train", "test")
ENTRY_POINTS_IN_FOLDERS = {"visual/cache_features.py"}  # they see everything; nobody imports them
MAY_IMPORT = {
    "dataprocess": set(),
    "visual": set(),
    "qwen": set(),
    "dataset": {
        "dataprocess.image_io",
        "dataprocess.messages",
        "qwen.tokenization_qwen",
        "qwen.chatml",
        "qwen.configuration_qwen.IGNORE_INDEX",
    },
    "model": {"dataprocess", "dataset", "visual", "qwen"},
}
# Names that a package hands on, and the module that they come from.
QWEN_NAMES = {
    "IGNORE_INDEX": "qwen.configuration_qwen.IGNORE_INDEX",
    "IMAGE_TOKEN": "qwen.tokenization_qwen",
    "IMAGE_TOKEN_ID": "qwen.tokenization_qwen",
    "QWenTokenizer": "qwen.tokenization_qwen",
    "make_context": "qwen.chatml",
}


def imported(source: str, package: str) -> set[str]:
    """Everything that a module's source imports, wherever it stands, as full dotted names."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, (package if node.level else "", node.module)))
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def within(name: str, allowed: set[str]) -> bool:
    name = QWEN_NAMES.get(name.removeprefix("qwen."), name)
    return any(name == prefix or name.startswith(prefix + ".") for prefix in allowed)


def offences(source: str, package: str) -> set[str]:
    """What a module of `package` imports of ours and may not."""
    ours = {name for name in imported(source, package) if name.split(".")[0] in (*PACKAGES, *ENTRY_POINTS)}
    return {name for name in ours if not within(name, {package, *MAY_IMPORT[package]})}


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_what_it_is_built_on(package):
    files = sorted(
        file for file in (ROOT / package).rglob("*.py") if str(file.relative_to(ROOT)) not in ENTRY_POINTS_IN_FOLDERS
    )
    assert files
    found = {str(file.relative_to(ROOT)): offences(file.read_text(encoding="utf-8"), package) for file in files}
    assert not {name: names for name, names in found.items() if names}


@pytest.mark.parametrize(
    ("source", "package", "found"),
    [
        ("from dataprocess.image_io import load_image", "dataset", set()),
        ("from dataprocess.records import Sample", "dataset", {"dataprocess.records.Sample"}),
        ("from dataset import load_image", "dataprocess", {"dataset.load_image"}),
        ("from dataset.prompt import encode_prompt", "dataprocess", {"dataset.prompt.encode_prompt"}),
        ("def f():\n    from qwen import QWenModel", "visual", {"qwen.QWenModel"}),
        ("import visual.base", "qwen", {"visual.base"}),
        ("from qwen import IGNORE_INDEX, QWenTokenizer", "dataset", set()),
        ("from qwen import QWenConfig", "dataset", {"qwen.QWenConfig"}),
        ("from qwen.configuration_qwen import QWenConfig", "dataset", {"qwen.configuration_qwen.QWenConfig"}),
        ("from . import prompt\nimport torch", "dataset", set()),
        ("import dataset", "visual", {"dataset"}),
        ("import train", "model", {"train"}),
    ],
)
def test_the_test_above_sees_what_it_should(source, package, found):
    assert offences(source, package) == found


def test_preparing_data_loads_no_torch():
    code = (
        "import sys, runpy, dataprocess.image_io\n"
        "runpy.run_path('dataprocess/process_image.py', run_name='imported')\n"
        "heavy = {'torch', 'transformers', 'peft', 'qwen', 'visual', 'model'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for file in (ROOT / "dataprocess").rglob("*.py"):
        assert not {n for n in imported(file.read_text(encoding="utf-8"), "dataprocess") if n.startswith("torch")}
