"""A visitor's way to a tiny model, without a browser."""

from __future__ import annotations

import argparse
import asyncio
import json

import pytest
import torch
from PIL import Image


@pytest.fixture(scope="session")
def assistant(trained):
    """Load the tiny trained model; answers are greedy and short."""
    from model.asking.assistant import load_assistant

    options = {"do_sample": False, "max_new_tokens": 6}
    where = {"base_language_model": None, "base_value_model": None, "model_weights": trained}
    whole = {"quantisation": None, "device_map": None, "dtype": torch.float32, "device": torch.device("cpu")}
    return load_assistant(argparse.Namespace(**where, **whole, system=None, options=options))


class Page:
    """One visitor's open page."""

    def __init__(self, talk, key: str = "page", language: str = "en") -> None:
        from model.web.questions import page_settings
        from model.web.talk import Who

        self.talk, self.who = talk, Who(key, "10.0.0.1", language)
        self.settings = page_settings(talk.assistant, talk.limits)

    def upload(self, image: Image.Image | bytes, name: str = "a.png") -> dict[str, str]:
        """Store a file as Gradio does; return what the question box then holds."""
        folder = self.talk.uploads.path / name
        folder.mkdir(exist_ok=True)
        if isinstance(image, bytes):
            (folder / name).write_bytes(image)
        else:
            image.save(folder / name)
        path = self.talk.uploads.adopt(str(folder / name), "browser")
        self.talk.uploads.clear_shared()
        return {"path": path, "orig_name": name}

    def see(self, views) -> list:
        """Return everything that a round shows."""

        async def collect():
            return [view async for view in views]

        return asyncio.run(collect())

    def ask(self, text: str, *files: dict, shown: int = 0, **changes) -> list:
        """Ask on a page that shows so many messages; return everything that it shows then."""
        packet = json.dumps({"text": text, "files": list(files), "shown": shown})
        return self.see(self.talk.ask(self.who, packet, {**self.settings, **changes}))

    @property
    def conversation(self):
        """Return what the server remembers."""
        return self.talk.visitors.find(self.who.key).conversation


@pytest.fixture
def open_page(assistant):
    """Return what opens pages of one server with these limits."""
    from model.web.examples import make_examples
    from model.web.limits import Limits
    from model.web.talk import Talk
    from model.web.uploads import UploadFolder

    talks = []

    def open_page(key: str = "page", language: str = "en", **limits) -> Page:
        if not talks:
            limits = Limits(**{"questions_per_minute": 100, "max_new_tokens": 6, **limits})
            talks.append(Talk(assistant, limits, UploadFolder(), make_examples()))
        return Page(talks[0], key, language)

    yield open_page
    for talk in talks:
        talk.engine.close()
        talk.uploads.close()


@pytest.fixture
def red() -> Image.Image:
    return Image.new("RGB", (40, 30), "red")
