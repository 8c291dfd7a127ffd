"""One line about the model: its name, its parts, and what it was trained on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..asking.assistant import Assistant
from ..checkpoints.checkpoint import resolve_checkpoint
from .words import say


def model_line(assistant: Assistant, model_weights: str | os.PathLike[str], language: str) -> str:
    """Return the line as Markdown; it has names of folders and files, but no path of this machine."""
    folder = resolve_checkpoint(model_weights)
    training = _read(folder / "train_config.json") or _read(folder.parent / "train_config.json")
    parts = _read(folder / "multimodal_config.json")
    name = folder.resolve().name
    if name.startswith("checkpoint-"):
        name = f"{folder.resolve().parent.name}/{name}"
    base = _last(parts.get("base_language_model") or assistant.model.base_language_model)
    made_of = [base, *filter(None, [_last(parts.get("base_value_model"))])]
    line = f"**{_plain(name)}** · {_plain(' + '.join(made_of))}"
    data = training.get("data")
    files = [data.get(key) for key in ("image_map", "captions_file")] if isinstance(data, dict) else []
    names = [Path(str(file)).name for file in files if file]
    steps = (_read(folder / "trainer_state.json") or _read(_newest_state(folder))).get("global_step")
    if names:
        line += " · " + say(language, "trained_on", data=_plain(", ".join(names)))
    if isinstance(steps, int):
        line += " · " + say(language, "steps", steps=steps)
    return line


def _newest_state(folder: Path) -> Path:
    states = sorted(folder.glob("checkpoint-*/trainer_state.json"), key=lambda path: path.stat().st_mtime)
    return states[-1] if states else folder / "trainer_state.json"


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
