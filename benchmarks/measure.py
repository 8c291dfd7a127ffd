"""What the benchmarks share: peers measured in turn, each in a process of its own, medians, tables and pictures.

A benchmark is a script that starts itself again, once for each measurement:

    runs = run_in_turn({"ours": [*itself(__file__), "--one", "ours"], "peer": [...]}, rounds=5)
    figures = {name: medians(measured) for name, measured in runs.items()}
    write_results(RESULTS / "name.json", {"machine": machine(), "figures": figures})

The process that is measured prints its own figures as one JSON object, on the last line of its stdout. This module, and
a script while it only starts others, must stay small (no torch): Linux counts a starter's memory for what it starts.
"""

from __future__ import annotations

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

PACKAGES = ("torch", "transformers", "peft", "accelerate")
ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
"""Where tables and pictures go, from whatever folder a benchmark is started."""


@dataclass(frozen=True)
class Run:
    """One process, from its start to its end."""

    seconds: float
    """Wall clock."""
    cpu_seconds: float
    """Of the processor, in all its threads: what other processes do counts for little here."""
    peak_bytes: int
    """The most memory it had resident at any time."""
    values: dict[str, Any]
    """The JSON object that it printed last; empty if it printed none."""

    def less(self, part: Run) -> Run:
        """What this process took more than another; nothing of what they printed is kept."""
        seconds, cpu_seconds = self.seconds - part.seconds, self.cpu_seconds - part.cpu_seconds
        return Run(seconds, cpu_seconds, self.peak_bytes - part.peak_bytes, {})


class RunFailedError(RuntimeError):
    """A measured process that did not end with status 0."""


def itself(file: str) -> list[str]:
    """Return the command that runs a benchmark's file again."""
    return [sys.executable, "-m", ".".join(Path(file).resolve().relative_to(ROOT).with_suffix("").parts)]


def run_once(command: Sequence[str], env: Mapping[str, str] | None = None) -> Run:
    """Run a command to its end, from the repository's root; what it writes to stderr is shown only if it fails.

    Args:
        command: program and arguments.
        env: variables to set beside the present ones.

    Raises:
        RunFailedError: if it fails; the message ends with the last lines of its stderr.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        start = time.perf_counter()
        environment = {**os.environ, **(env or {})}
        process = subprocess.Popen(list(command), stdout=out, stderr=err, cwd=ROOT, env=environment)
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
    for line in reversed(text.strip().splitlines()):
        try:
            values = json.loads(line)
        except ValueError:
            return {}
        return values if isinstance(values, dict) else {}
    return {}


def run_in_turn(
    commands: Mapping[str, Sequence[str]], rounds: int, env: Mapping[str, str] | None = None
) -> dict[str, list[Run]]:
    """Run every command once a round, one after the other; every other round the other way about.

    What else the machine does, and how warm it is, so falls on all of them alike.

    Args:
        commands: by name.
        rounds: how often each is run.
        env: variables to set beside the present ones.

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
                runs[name].append(run_once(commands[name], env))
                bar.update()
    return runs


def medians(runs: Sequence[Run]) -> dict[str, float]:
    """Medians of `seconds`, `cpu_seconds`, `peak_bytes`, and of every number that the processes printed."""
    rows = [
        {"seconds": run.seconds, "cpu_seconds": run.cpu_seconds, "peak_bytes": run.peak_bytes, **run.values}
        for run in runs
    ]
    numbers = [
        name for name, value in rows[0].items() if isinstance(value, int | float) and not isinstance(value, bool)
    ]
    return {name: statistics.median(row[name] for row in rows) for name in numbers}


def machine() -> dict[str, str]:
    """What the figures were measured on."""
    model = platform.processor() or platform.machine()
    described = Path("/proc/cpuinfo")
    if described.is_file():
        lines = described.read_text(encoding="utf-8", errors="replace").splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    versions = " ".join(f"{name} {version(name)}" for name in PACKAGES)
    return {"cpu": model, "cores": str(os.cpu_count()), "python": platform.python_version(), "packages": versions}


def text_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out a table: the first column to the left, the others to the right."""
    lines = [list(heads), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    laid = (
        "  ".join(
            f"{cell:<{w}}" if i == 0 else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
    return "\n".join(line.rstrip() for line in laid)


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    """Write figures as JSON, whole or not at all; folders are made."""
    _replace(path, lambda part: part.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", "utf-8"))


def draw_bars(path: Path, title: str, panels: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    """Write a PNG of grouped bars.

    Args:
        path: of the picture.
        title: above it.
        panels: what each panel measures, with its unit → group → name of a peer → value. Peers have one colour in all;
            a panel of other peers than the one before has a legend of its own.
    """
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
            axis.bar_label(bars, fmt="%.3g", fontsize=8)
        axis.set_xticks(range(len(groups)), list(groups), fontsize=8)
        axis.set_ylabel(unit)
        axis.spines[["top", "right"]].set_visible(False)
        if names != explained:
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
