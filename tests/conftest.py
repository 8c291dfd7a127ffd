"""Fixtures that several test files share."""

from __future__ import annotations

import importlib.util
import logging
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from model.console import OUR_LOGGERS

# A shell starts what it runs in the background with Ctrl-C ignored, and programs inherit that; the tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """Undo what an entry point called in this process sets up, in a fixture too: its log goes to a captured stream."""
    _forget_entry_points()
    yield
    _forget_entry_points()


def _forget_entry_points() -> None:
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
def tiny_siglip(tmp_path_factory) -> str:
    """Folder of a tiny SigLIP, as published; not to be written to."""
    from tiny_towers import make_siglip_checkpoint

    return make_siglip_checkpoint(tmp_path_factory.mktemp("bases") / "siglip")
