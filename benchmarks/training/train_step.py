"""A whole training step, beside the same model built and trained with transformers, PEFT and the stock Trainer.

    python -m benchmarks.training.train_step                                     # both sizes, fp32 and bf16
    python -m benchmarks.training.train_step --sizes proportional --dtypes float32

Loading, tower, model, loss, backward pass and optimizer, in batches of 4; the first steps are left out.
`step_inputs.py` says what is trained, `step_runs.py` who the peers are; `grouped.py` has batches of similar length.
Prints a table, writes `results/train_step.json` and `.png`; what was measured before and is not now stays in them.

Besides the wall clock, the processor time of all threads is shown: on a machine that others use too it is what the step
takes. The share of bare products is the time of the step's matrix products alone over that of the step, both by it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from ..measure import RESULTS, draw_bars, machine, medians, run_in_turn, text_table, write_results

ROOT = Path(__file__).resolve().parents[2]
SIZES = ("vocabulary-true", "proportional")
DTYPES = ("float32", "bfloat16")
LOSSES_AGREE = {"float32": 1e-5, "bfloat16": 2e-3}
"""By how much the first losses may differ, relatively: by the order of additions."""
HEADS = (
    *("size, dtype", "who", "samples/s", "per cpu s", "peak MB", "less start", "padding", "of GEMM"),
    *("speed", "by cpu", "memory", "less start"),
)


def measure(size: str, dtypes: list[str], given: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Run the peers of one size in turn; returns the medians by dtype and peer.

    Raises:
        SystemExit: if the peers do not start from the same loss.
    """
    figures: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        module = [sys.executable, "-m"]
        words = ["benchmarks.training.step_inputs", "--folder", str(folder), "--size", size]
        subprocess.run([*module, *words], check=True, cwd=ROOT, stderr=subprocess.DEVNULL, env=environment(given))
        for dtype in dtypes:
            common = ["--folder", str(folder), "--dtype", dtype, "--steps", str(given.steps)]
            common += ["--skipped", str(given.skipped), "--threads", str(given.threads)]
            commands = {
                "peer": [*module, "benchmarks.training.step_runs", "peer", *common],
                "ours": [*module, "benchmarks.training.step_runs", "ours", *common],
            }
            runs = run_in_turn(commands, given.rounds, environment(given))
            figures[dtype] = {name: medians(measured) for name, measured in runs.items()}
            for name, measured in runs.items():
                figures[dtype][name]["runs"] = [run.values for run in measured]
            first, other = (figures[dtype][name]["first_loss"] for name in ("ours", "peer"))
            if abs(first - other) > LOSSES_AGREE[dtype] * other:
                raise SystemExit(f"{size}, {dtype}: the first losses are {first} (ours) and {other} (peer)")
    return figures


def environment(given: argparse.Namespace) -> dict[str, str]:
    """What the measured processes see."""
    return {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(given.threads), "PYTHONPATH": str(ROOT)}


def ratios(figures: dict[str, Any], name: str) -> dict[str, float]:
    """One of our runs over the peer's: speeds, and peak memory."""
    one, peer = figures[name], figures["peer"]
    return {
        "speed": one["samples_per_second"] / peer["samples_per_second"],
        "by_processor": peer["processor_seconds"] / one["processor_seconds"],
        "memory": one["peak_bytes_vm"] / peer["peak_bytes_vm"],
        "less_start": _over_start(one) / _over_start(peer),
    }


def _over_start(figures: dict[str, float]) -> float:
    return figures["peak_bytes_vm"] - figures["baseline_bytes"]


def rows(size: str, dtype: str, figures: dict[str, Any]) -> list[list[str]]:
    """Lines of the table."""
    lines = []
    for name, one in figures.items():
        line = [f"{size}, {dtype}" if name == "peer" else "", name]
        line += [f"{one['samples_per_second']:.2f}", f"{4 / one['processor_seconds']:.2f}"]
        line += [f"{one['peak_bytes_vm'] / 1e6:,.0f}", f"{_over_start(one) / 1e6:,.0f}", f"{100 * one['padding']:.1f}%"]
        line += [f"{100 * one['share_of_gemm_rate']:.0f}%" if "share_of_gemm_rate" in one else ""]
        if name != "peer":
            ratio = ratios(figures, name)
            line += [f"{ratio[key]:.2f} x" for key in ("speed", "by_processor", "memory", "less_start")]
        lines.append(line + [""] * (len(HEADS) - len(line)))
    return lines


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10, help="Of each run.")
    parser.add_argument("--skipped", type=int, default=3, help="First steps that are left out.")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for JSON and PNG (%(default)s)")
    given = parser.parse_args()
    path = given.output / "train_step.json"
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"sizes": {}}
    results |= {"machine": machine(), "threads": given.threads, "rounds": given.rounds, "steps": given.steps}
    for size in given.sizes:
        kept = results["sizes"].setdefault(size, {})
        for dtype, found in measure(size, given.dtypes, given).items():
            kept[dtype] = {"peers": found, "ratios": {name: ratios(found, name) for name in found if name != "peer"}}
        write_results(path, results)
    show(results, given.output / "train_step.png")


def show(results: dict[str, Any], picture: Path) -> None:
    """Print the table of all that was measured, and draw it."""
    lines: list[list[str]] = []
    panels: dict[str, dict[str, dict[str, float]]] = {"samples per second": {}, "peak memory, MB": {}}
    for size in (size for size in SIZES if size in results["sizes"]):
        for dtype in (dtype for dtype in DTYPES if dtype in results["sizes"][size]):
            found = results["sizes"][size][dtype]["peers"]
            lines += rows(size, dtype, found)
            group = f"{size}\n{dtype}"
            panels["samples per second"][group] = {n: one["samples_per_second"] for n, one in found.items()}
            panels["peak memory, MB"][group] = {n: one["peak_bytes_vm"] / 1e6 for n, one in found.items()}
    print(text_table(HEADS, lines))
    draw_bars(picture, "One training step, batches of 4", panels)


if __name__ == "__main__":
    main()
