"""Where the benchmarks and the demo find Qwen's vocabulary on a machine without a model hub."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def vocabulary_file() -> Path:
    """Qwen's vocabulary inside the package dashscope, which is looked up, not imported.

    Raises:
        SystemExit: if it is not installed.
    """
    spec = importlib.util.find_spec("dashscope")
    if spec is None or spec.origin is None:
        raise SystemExit("Qwen's vocabulary is missing: pip install --no-deps dashscope==2.0.2")
    return Path(spec.origin).parent / "resources" / "qwen.tiktoken"
