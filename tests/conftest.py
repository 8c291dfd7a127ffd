"""Settings of the whole suite, its slow tier, and the fixtures that several test files share."""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Set before anything imports torch or transformers: no test may reach for a model hub, and tiny models are fastest with
# one thread. Programs that the tests start inherit these.
for _name, _value in {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}.items():
    os.environ.setdefault(_name, _value)

# A shell starts what it runs in the background with Ctrl-C ignored, and programs inherit that; the tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="run the tests marked as slow too")
    parser.addoption("--web", action="store_true", help="run the tests in a browser alone; it is an error to have none")
    parser.addoption("--release", action="store_true", help="run the slowest tests alone, which --all leaves out")
    parser.addoption("--machines", action="store_true", help="run the tests of several machines alone (as root)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave slow tests out, unless --all, a -m expression or a test's own name (file::test) asks for them."""
    if config.option.markexpr or any("::" in arg for arg in config.args):
        return
    for alone in ("machines", "release", "web"):
        if config.getoption(f"--{alone}"):
            _keep(config, items, lambda item, alone=alone: item.get_closest_marker(alone))
            return
    _keep(config, items, lambda item: not (item.get_closest_marker("machines") or item.get_closest_marker("release")))
    items.sort(key=lambda item: item.get_closest_marker("long") is None)  # or they would be what all wait for
    if not config.getoption("--all"):
        _keep(config, items, lambda item: not item.get_closest_marker("slow"))


def _keep(config: pytest.Config, items: list[pytest.Item], is_wanted: Callable[[pytest.Item], object]) -> None:
    config.hook.pytest_deselected(items=[item for item in items if not is_wanted(item)])
    items[:] = [item for item in items if is_wanted(item)]


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """Undo what an entry point called in this process sets up, in a fixture too: its log goes to a captured stream."""
    _forget_entry_points()
    yield
    _forget_entry_points()


def _forget_entry_points() -> None:
    from model.console import OUR_LOGGERS

    root = logging.getLogger()
    root.setLevel(logging.WARNING)
    root.handlers[:] = [handler for handler in root.handlers if type(handler) is not logging.StreamHandler]
    for name in OUR_LOGGERS:
        logging.getLogger(name).setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def qwen_tiktoken() -> Path:
    """The real Qwen vocabulary, inside dashscope (not to be imported: it is installed without its dependencies)."""
    spec = importlib.util.find_spec("dashscope")
    if spec is None or spec.origin is None:
        pytest.fail("dashscope is not installed, so the Qwen vocabulary is missing: run `sh tests/run.sh`")
    return Path(spec.origin).parent / "resources" / "qwen.tiktoken"


@pytest.fixture(scope="session")
def tokenizer(qwen_tiktoken):
    """A tokenizer over the real vocabulary; tests that change its settings make their own copy."""
    from qwen.tokenization_qwen import QWenTokenizer

    return QWenTokenizer(str(qwen_tiktoken))


@pytest.fixture(scope="session")
def tiny_bases(tmp_path_factory) -> tuple[str, str]:
    """Folders of a tiny QWen and a tiny CLIP, as published; not to be written to."""
    from tiny_towers import make_clip_checkpoint
    from tiny_vlm import make_language_model

    folder = tmp_path_factory.mktemp("bases")
    return make_language_model(folder / "qwen"), make_clip_checkpoint(folder / "clip")


@pytest.fixture(scope="session")
def base_flags(tmp_path_factory, qwen_tiktoken) -> list[str]:
    """The flags that name a tiny CLIP and a tiny QWen with the real vocabulary and tokenizer; not to be written to."""
    from tiny_run import make_bases

    return make_bases(tmp_path_factory.mktemp("bases"), qwen_tiktoken)


@pytest.fixture(scope="session")
def tiny_siglip(tmp_path_factory) -> str:
    """Folder of a tiny SigLIP, as published; not to be written to."""
    from tiny_towers import make_siglip_checkpoint

    return make_siglip_checkpoint(tmp_path_factory.mktemp("bases") / "siglip")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> dict[str, Path]:
    """One picture of each colour, by its name; not to be written to."""
    from tiny_run import make_pictures

    return make_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="session")
def mixed_data(tmp_path_factory, pictures) -> list[str]:
    """The flags that name twelve samples of all kinds, MIXED_CAPTIONS of tiny_run.py; not to be written to."""
    from tiny_run import MIXED_CAPTIONS, write_data

    return write_data(tmp_path_factory.mktemp("data"), MIXED_CAPTIONS, pictures["red"].parent)


@pytest.fixture(scope="session")
def trained(tmp_path_factory, base_flags) -> Path:
    """checkpoint-10, whose LoRA and projector make a difference, in a run folder with an older and a broken one."""
    import shutil

    from tiny_vlm import enliven_trained

    from model import LoraSettings, VisionLanguageModel

    model = VisionLanguageModel.from_pretrained(base_flags[1], base_flags[3], device="cpu")
    model.add_lora(LoraSettings(rank=4, alpha=8, dropout=0.0))
    run = tmp_path_factory.mktemp("run")
    for number in (9, 10):  # as text, 9 comes last
        enliven_trained(model, seed=number, std=0.4).save_checkpoint(run / f"checkpoint-{number}")
    shutil.copytree(run / "checkpoint-10", run / "checkpoint-11")
    (run / "checkpoint-11/projector.safetensors").unlink()  # as if the disk had been full
    return run / "checkpoint-10"


@pytest.fixture(scope="module")
def loaded_once() -> Iterator[None]:
    """Let test.py, called in this process, load every model and tokenizer once in a module; they must not change."""
    import functools

    from model import VisionLanguageModel
    from model.asking import assistant

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VisionLanguageModel, "from_pretrained", functools.cache(VisionLanguageModel.from_pretrained))
        patch.setattr(assistant, "load_tokenizer", functools.cache(assistant.load_tokenizer))
        yield
