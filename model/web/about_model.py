"""One line about the model: its name, its parts, and what it was trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..asking.assistant import Assistant
from .words import say


def model_line(assistant: Assistant, folder: Path, language: str) -> str:
    """Return the line for a checkpoint as Markdown; it has names of folders, but no path of this machine."""
    training = _read(folder / "train_config.json") or _read(folder.parent / "train_config.json")
    parts = _read(folder / "multimodal_config.json")
    name = folder.resolve().name
    if name.startswith("checkpoint-"):
        name = f"{folder.resolve().parent.name}/{name}"
    base = _last(parts.get("base_language_model") or assistant.model.base_language_model)
    made_of = [base, *filter(None, [_last(parts.get("base_value_model"))])]
    line = f"**{_plain(name)}** · {_plain(' + '.join(made_of))}"
    data = training.get("data")
    file = data.get("captions_file") if isinstance(data, dict) else None
    steps = _read_state(folder, "trainer_state.json").get("global_step")
    identity = _read_state(folder, "run_state.json").get("identity")
    samples = identity.get("number of samples") if isinstance(identity, dict) else None
    if file:
        path = Path(str(file))
        line += " · " + say(language, "trained_on", data=_plain(path.parent.name or path.name))
    if isinstance(samples, int):
        line += " · " + say(language, "samples", samples=samples)
    if isinstance(steps, int):
        line += " · " + say(language, "steps", steps=steps)
    return line


def _read_state(folder: Path, name: str) -> dict[str, Any]:
    """Read a file of the checkpoint, or of the newest one in a run folder."""
    newest = sorted(folder.glob(f"checkpoint-*/{name}"), key=lambda path: path.stat().st_mtime)
    return _read(folder / name) or (_read(newest[-1]) if newest else {})


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _last(path: object) -> str:
    """Return the last part of a path, or a hub name as it is."""
    text = str(path or "")
    is_hub_name = text.count("/") == 1 and not text.startswith((".", "/")) and not Path(text).exists()
    return text if is_hub_name else Path(text).name


def _plain(text: str) -> str:
    return text.replace("<", "&lt;").replace("_", "\\_").replace("*", "\\*")
