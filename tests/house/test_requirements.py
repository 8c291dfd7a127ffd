"""The lower bounds that users get are the versions that `sh tests/run.sh --lowest` tests."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_lower_bound_is_tested():
    text = "".join((ROOT / name).read_text() for name in ("requirements.txt", "parquet-requirements.txt"))
    lowest = (ROOT / "tests/requirements-lowest.txt").read_text()
    bounds = dict(re.findall(r"^([\w-]+)>=([\w.]+)", text, re.M))
    assert bounds == dict(re.findall(r"^([\w-]+)==([\w.]+)", lowest, re.M))
    assert len(bounds) >= 10
