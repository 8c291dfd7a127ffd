"""A whole training step, next to the same model built and trained with transformers, PEFT and the stock Trainer.

    python -m benchmarks.training.train_step                                     # both sizes, fp32 and bf16
    python -m benchmarks.training.train_step --sizes proportional --dtypes float32
    python -m benchmarks.training.train_step --language_model qwen2 --rounds 1   # ours over the peer's own Qwen2

Loading, tower, model, loss, backward pass and optimizer, in batches of 4; the first steps are left out. The large
vocabulary is Qwen's 151,936 tokens over 8 layers of width 512; *proportional* has the same layers with a language head
that is as large a share of the model as in Qwen-7B. `step_runs.py` says who the peers are.
Prints a table, writes `results/train_step.json` and `.png`; results of other sizes and dtypes stay in them.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from ..measure import DTYPES, itself, medians, parser, publish, run_in_turn, run_once, text_table

SIZES = ("large-vocabulary", "proportional")
RUNS = itself(str(Path(__file__).with_name("step_runs.py")))
LOSSES_AGREE = {"float32": 1e-5, "bfloat16": 2e-3}
"""By how much the first losses may differ, relatively: by the order of additions."""
HEADS = (
    *("size, dtype", "who", "samples/s", "per CPU s", "peak MB", "less imports", "padding"),
    *("speed", "by CPU", "memory", "less imports"),
)
LEGEND = """per CPU s, by CPU: by the processor time of all threads, which other programs on the machine change little
less imports: peak memory less what the process had after its imports"""


def measure(size: str, dtypes: list[str], given: Any) -> dict[str, dict[str, Any]]:
    """Run the peers of one size in turn; returns the medians by dtype and peer.

    Raises:
        SystemExit: if the peers do not start from the same loss.
    """
    figures: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = ["--folder", folder, "--language_model", given.language_model]
        run_once([*RUNS, "write", *model, "--size", "tiny" if given.tiny else size])
        for dtype in dtypes:
            common = [*model, "--dtype", dtype, "--steps", str(given.steps), "--skipped", str(given.skipped)]
            commands = {who: [*RUNS, who, *common] for who in ("peer", "ours")}
            runs = run_in_turn(commands, given.rounds, given.threads)
            figures[dtype] = {who: medians(done) | {"runs": [run.values for run in done]} for who, done in runs.items()}
            first, other = (figures[dtype][who]["first_loss"] for who in ("ours", "peer"))
            same_lengths = figures[dtype]["ours"]["padding"] == figures[dtype]["peer"]["padding"]
            if abs(first - other) > LOSSES_AGREE[dtype] * other or not same_lengths:
                raise SystemExit(f"{size}, {dtype}: the first losses are {first} (ours) and {other} (peer)")
    return figures


def ratios(figures: dict[str, Any]) -> dict[str, float]:
    """Return our speeds and peak memory over the peer's."""
    ours, peer = figures["ours"], figures["peer"]
    return {
        "speed": ours["samples_per_second"] / peer["samples_per_second"],
        "by_processor": peer["processor_seconds"] / ours["processor_seconds"],
        "memory": ours["peak_bytes_vm"] / peer["peak_bytes_vm"],
        "less_imports": _over_imports(ours) / _over_imports(peer),
    }


def _over_imports(figures: dict[str, float]) -> float:
    return figures["peak_bytes_vm"] - figures["baseline_bytes"]


def rows(size: str, dtype: str, figures: dict[str, Any]) -> list[list[str]]:
    """Return the table's lines of one size and dtype."""
    lines = []
    for who in ("peer", "ours"):
        one = figures[who]
        line = [f"{size}, {dtype}" if who == "peer" else "", who]
        line += [f"{one['samples_per_second']:.2f}", f"{4 / one['processor_seconds']:.2f}"]
        line += [
            f"{one['peak_bytes_vm'] / 1e6:,.0f}",
            f"{_over_imports(one) / 1e6:,.0f}",
            f"{100 * one['padding']:.1f}%",
        ]
        line += [f"{ratio:.2f} x" for ratio in ratios(figures).values()] if who == "ours" else [""] * 4
        lines.append(line)
    return lines


def main() -> None:
    """Measure, print, write."""
    parse = parser(__doc__, rounds=3, can_be_tiny=True)
    parse.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parse.add_argument("--language_model", choices=["qwen", "qwen2"], default="qwen", help="ours (%(default)s)")
    parse.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parse.add_argument("--steps", type=int, default=10, help="of each run (%(default)s)")
    parse.add_argument("--skipped", type=int, default=3, help="first steps that are left out (%(default)s)")
    given = parse.parse_args()
    path = given.output / "train_step.json"
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"sizes": {}}
    results.pop("machine", None)
    results |= {"threads": given.threads, "steps": given.steps}
    for size in given.sizes:
        kept = results["sizes"].setdefault(size + ", Qwen2" * (given.language_model == "qwen2"), {})
        for dtype, found in measure(size, given.dtypes, given).items():
            kept[dtype] = {"rounds": given.rounds, "peers": found, "ratios": {"ours": ratios(found)}}
        publish(given.output, "train_step", results, "One training step, batches of 4", panels(results))
    measured = [(size, dtype, one["peers"]) for size, kept in results["sizes"].items() for dtype, one in kept.items()]
    print(text_table(HEADS, [line for one in measured for line in rows(*one)]), LEGEND, sep="\n")


def panels(results: dict[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """Return what the picture shows of all that was measured."""
    made: dict[str, dict[str, dict[str, float]]] = {"samples per second": {}, "peak memory, MB": {}}
    for size, kept in results["sizes"].items():
        for dtype, one in kept.items():
            group, peers = f"{size}\n{dtype}", one["peers"]
            made["samples per second"][group] = {who: figures["samples_per_second"] for who, figures in peers.items()}
            made["peak memory, MB"][group] = {who: figures["peak_bytes_vm"] / 1e6 for who, figures in peers.items()}
    return made


if __name__ == "__main__":
    main()
