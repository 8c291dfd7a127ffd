"""What the benchmarks share: processes measured in turn, their medians, tables and pictures.

A benchmark is a module that starts itself again, once for each measurement:

    runs = run_in_turn({"ours": [*itself(__file__), "--one", "ours"], "peer": [...]}, rounds=5)
    figures = {name: medians(measured) for name, measured in runs.items()}
    publish(folder, "name", {"figures": figures}, "Title of the picture", {"seconds": {...}})

The process that is measured prints its own figures as one JSON object, on the last line of its stdout. This file, and a
benchmark while it only starts others, must stay small (no torch): Linux counts a starter's memory for what it starts.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Run:
    """One process, from its start to its end."""

    seconds: float
    """Wall clock."""
    cpu_seconds: float
    """Processor time of all its threads, which other programs on the machine change little."""
    peak_bytes: int
    """The most memory it had resident at any time."""
    values: dict[str, Any]
    """The JSON object that it printed last; empty if it printed none."""


class RunFailedError(RuntimeError):
    """A measured process that did not end with status 0."""


# ---- Running


def parser(doc: str | None, rounds: int | None = None, *, can_be_tiny: bool = False) -> argparse.ArgumentParser:
    """Return a parser with the flags that benchmarks share; `rounds` is the default where runs are repeated."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if rounds is not None:
        made.add_argument("--rounds", type=int, default=rounds, help="runs of each; the median counts (%(default)s)")
        made.add_argument("--threads", type=int, default=os.cpu_count(), help="of each process (%(default)s)")
    results = ROOT / "benchmarks" / "results"
    made.add_argument("--output", type=Path, default=results, help="folder for JSON and PNG (%(default)s)")
    if can_be_tiny:
        made.add_argument("--tiny", action="store_true", help="a model of no size, to try the benchmark")
    return made


def itself(file: str) -> list[str]:
    """Return the command that runs a benchmark's file again."""
    return [sys.executable, "-m", ".".join(Path(file).resolve().relative_to(ROOT).with_suffix("").parts)]


def run_once(command: Sequence[str], threads: int | None = None) -> Run:
    """Run a command from the repository's root to its end; what it writes to stderr is shown only if it fails.

    Args:
        command: program and arguments.
        threads: of PyTorch, in the process; as many as it likes by default.

    Raises:
        RunFailedError: if it fails; the message ends with the last lines of its stderr.
    """
    env = {**os.environ, "HF_HUB_OFFLINE": "1"} | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        start = time.perf_counter()
        process = subprocess.Popen(list(command), stdout=out, stderr=err, cwd=ROOT, env=env)
        try:
            _, status, usage = os.wait4(process.pid, 0)  # `Popen.wait` does not tell what the process used
        except BaseException:
            process.kill()
            raise
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        if process.returncode:
            tail = "\n".join(err.read().strip().splitlines()[-8:])
            raise RunFailedError(f"{' '.join(command)}: exit status {process.returncode}\n{tail}")
        unit = 1 if sys.platform == "darwin" else 1024
        return Run(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit, _last_object(out.read()))


def _last_object(text: str) -> dict[str, Any]:
    try:
        values = json.loads(text.strip().rpartition("\n")[2])
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}


def run_in_turn(commands: Mapping[str, Sequence[str]], rounds: int, threads: int | None = None) -> dict[str, list[Run]]:
    """Run every command once a round, one after the other; every other round in the opposite order.

    What else the machine does, and how warm it is, so falls on all of them alike.

    Args:
        commands: by name.
        rounds: how often each is run.
        threads: see `run_once`.

    Returns:
        For each name, its runs in the order of the rounds.

    Raises:
        RunFailedError: as soon as one fails.
    """
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    with tqdm(total=rounds * len(commands), file=sys.stderr, leave=False) as bar:
        for number in range(rounds):
            for name in list(commands)[:: -1 if number % 2 else 1]:
                bar.set_description(name)
                runs[name].append(run_once(commands[name], threads))
                bar.update()
    return runs


def medians(runs: Sequence[Run]) -> dict[str, float]:
    """Return medians of `seconds`, `cpu_seconds`, `peak_bytes`, and of every number that the processes printed."""
    rows = [
        {"seconds": run.seconds, "cpu_seconds": run.cpu_seconds, "peak_bytes": run.peak_bytes, **run.values}
        for run in runs
    ]
    numbers = [
        name for name, value in rows[0].items() if isinstance(value, int | float) and not isinstance(value, bool)
    ]
    return {name: statistics.median(row[name] for row in rows) for name in numbers}


def resident(name: str) -> int:
    """Return `VmRSS` (now), `VmHWM` (at most) or `RssAnon` (now, without mapped files) of this process, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


# ---- Showing


def text_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out a table: the first column to the left, the others to the right."""
    lines = [list(heads), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    laid = []
    for first, *others in lines:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        laid.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(laid)


def publish(
    folder: Path,
    name: str,
    results: Mapping[str, Any],
    title: str,
    panels: Mapping[str, Mapping[str, Mapping[str, float]]],
) -> None:
    """Write results as `NAME.json`, with the machine they are from, and as a picture, `NAME.png`.

    Args:
        folder: where both go; made if it is missing.
        name: of both files.
        results: what is written.
        title: above the picture.
        panels: what each panel measures, with its unit → group → name of a peer → value.
    """
    text = json.dumps({"machine": machine(), **results}, indent=2, ensure_ascii=False) + "\n"
    _replace(folder / f"{name}.json", lambda part: part.write_text(text, "utf-8"))
    draw_bars(folder / f"{name}.png", title, panels)


def machine() -> dict[str, str]:
    """Return what the figures are measured on."""
    model = platform.processor() or platform.machine()
    described = Path("/proc/cpuinfo")
    if described.is_file():
        lines = described.read_text(encoding="utf-8", errors="replace").splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    versions = " ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "accelerate"))
    return {"cpu": model, "cores": str(os.cpu_count()), "python": platform.python_version(), "packages": versions}


def draw_bars(path: Path, title: str, panels: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    """Write a PNG of grouped bars; see `publish`."""
    import matplotlib  # not before: see above

    matplotlib.use("Agg")
    from matplotlib import pyplot

    wide = max(4.5, 0.9 * max(map(len, panels.values())))  # inches of a panel
    figure, axes = pyplot.subplots(1, len(panels), figsize=(1 + wide * len(panels), 4), squeeze=False)
    explained: list[str] = []
    for axis, (unit, groups) in zip(axes.flat, panels.items(), strict=True):
        names = list(dict.fromkeys(name for values in groups.values() for name in values))
        width = 0.8 / len(names)
        for place, name in enumerate(names):
            at = [number + (place - (len(names) - 1) / 2) * width for number in range(len(groups))]
            bars = axis.bar(at, [values.get(name, 0.0) for values in groups.values()], width * 0.92, label=name)
            axis.bar_label(bars, fmt=lambda value: f"{value:,.0f}" if value >= 100 else f"{value:.3g}", fontsize=8)
        axis.set_xticks(range(len(groups)), list(groups), fontsize=8)
        axis.set_ylabel(unit)
        axis.spines[["top", "right"]].set_visible(False)
        if names != explained:  # one legend for panels of the same peers
            axis.legend(frameon=False)
            explained = names
    figure.suptitle(title)
    figure.tight_layout()
    _replace(path, lambda part: figure.savefig(part, format="png", dpi=110))
    pyplot.close(figure)


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    write(part)
    part.replace(path)
