"""The vocabulary file `qwen.tiktoken`: one line per token, with the token's bytes in base64, a space, and its rank.

The ranks are the ids 0 … 151642; special tokens are not in the file.
"""

from __future__ import annotations

import base64
import binascii
import shutil
from pathlib import Path

NUM_RANKS = 151643


def load_vocabulary(path: str | Path) -> dict[bytes, int]:
    """Read a `qwen.tiktoken` file.

    Args:
        path: the file.

    Returns:
        Token bytes -> id, 151,643 of them, with the ids 0 … 151642.

    Raises:
        ValueError: the file is missing, unreadable, damaged or has another number of tokens.
    """
    again = "copy or download qwen.tiktoken again"
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read the vocabulary {path}: {error.strerror or error}; {again}") from error
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), start=1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise ValueError(
                f"{path}, line {number}: expected a base64 token, a space and its rank, got {line[:60]!r}; {again}"
            ) from None
    if len(ranks) != NUM_RANKS or set(ranks.values()) != set(range(NUM_RANKS)):
        raise ValueError(f"{path} holds {len(ranks):,} different tokens, expected {NUM_RANKS:,} ranked from 0; {again}")
    return ranks


def write_vocabulary(ranks: dict[bytes, int], path: Path) -> None:
    """Write a `qwen.tiktoken` file; what stood there before stays until the new one is whole.

    Args:
        ranks: token bytes -> id.
        path: the file, in an existing folder.
    """
    temporary = path.with_name(path.name + ".part")
    with temporary.open("wb") as file:
        for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
            file.write(base64.b64encode(token) + b" %d\n" % rank)
    shutil.move(temporary, path)
