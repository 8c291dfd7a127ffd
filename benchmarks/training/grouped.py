"""Batches of similar length beside random ones: the padding of each, seconds by the sample, and what packing could add.

    python -m benchmarks.training.grouped
    python -m benchmarks.training.grouped --dtype bfloat16 --batches 4 --samples 96

The samples are those of `prepare.py`: as many as the real ones, of their lengths (210,000 Chinese captions, 23,000 long
and 77,000 longer English answers), 256 image tokens each. The first table counts the tokens of an epoch of all of them
and needs no model. Packing puts several samples into a row, each with attention of its own: at the very best it saves
what is left of padding, and nothing else. *Exact lengths* is grouping by true tokens in place of their estimate.

The second table is measured: batches of the epoch that `group_by_length` makes of all samples, taken evenly from short
to long, and the same samples in `random` order, each from the first step to the last. Both so train the same samples,
which are compared by the sample and by the token that is not padding. Runs take turns, each in a process of its own.
Prints both tables, writes `results/grouped.json` and `.png`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..measure import RESULTS, draw_bars, itself, machine, medians, run_in_turn, run_once, text_table, write_results

if TYPE_CHECKING:
    from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
IMAGE_TOKENS = 256
STRATEGIES = {"random": "random", "grouped": "sequential"}
"""The flag of each run: the samples stand in the order of a grouped epoch, which is gone through as it is."""


# ---- In a process of its own: lengths, and the samples to train


def lengths_of(folder: Path, scale: float) -> tuple[Any, Tensor, Tensor]:
    """Make annotations and open them; returns the data set, and estimated and true tokens of each sample."""
    from dataset.sample_lengths import estimated_lengths
    from qwen import QWenTokenizer

    from ..data.prepare import write_annotations
    from ..data.prepare_run import open_dataset
    from ..vocabulary import vocabulary_file

    write_annotations(folder, scale, pictures=1)
    command = [sys.executable, str(ROOT / "dataprocess/process_image.py"), "--config", str(folder / "config.yaml")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    dataset = open_dataset(folder, QWenTokenizer(str(vocabulary_file())))
    return dataset, estimated_lengths(dataset), true_lengths(dataset)


def true_lengths(dataset: Any) -> Tensor:
    """How many tokens samples have in the first epoch, (samples,) int32; one that can't be used has one."""
    import torch

    from dataset import SampleError

    lengths = torch.ones(len(dataset), dtype=torch.int32)
    for index, sample in enumerate(dataset.annotations):
        with contextlib.suppress(SampleError):
            lengths[index] = len(dataset.encode(sample).input_ids)
    return lengths


def padding_share(lengths: Tensor, batch: int) -> float:
    """The share of tokens that are padding, 0 to 1, where samples are put into batches in their order."""
    whole = sum(int(one.max()) * len(one) for one in lengths.split(batch))
    return 1 - int(lengths.sum()) / whole


def attention_share(lengths: Tensor, batch: int) -> float:
    """The share of attention's products that touch padding, 0 to 1: they grow with the square of a row's length."""
    whole = sum(float(one.max()) ** 2 * len(one) for one in lengths.split(batch))
    return 1 - float(lengths.double().square().sum()) / whole


def count(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Padding of an epoch in each order; writes samples to train, as many whole batches of the grouped order."""
    from dataset.epoch_order import epoch_permutation, grouped_permutation

    from ..peers import SEED

    dataset, estimated, true = lengths_of(folder, given.scale)
    orders = {
        "random": epoch_permutation(len(true), SEED, 0),
        "grouped": grouped_permutation(estimated, SEED, 0),
        "grouped, exact lengths": grouped_permutation(true, SEED, 0),
    }
    shares = {
        f"{name}, batch {batch}": {
            "padding": padding_share(true[order], batch),
            "attention": attention_share(true[order], batch),
        }
        for batch in given.batches
        for name, order in orders.items()
    }
    most = max(given.batches)
    whole = orders["grouped"][: len(true) - len(true) % most].view(-1, most)
    whole = whole[true[whole].sum(dim=1).argsort()]
    number = given.samples // most
    drawn = whole[[int((place + 0.5) * len(whole) / number) for place in range(number)]]
    write_samples(folder, dataset, drawn.flatten().tolist(), tiny=given.tiny)
    tokens = true - IMAGE_TOKENS
    return {
        "samples": len(true),
        "text_tokens": {"least": int(tokens.min()), "mean": float(tokens.double().mean()), "most": int(tokens.max())},
        "shares": shares,
    }


def write_samples(folder: Path, dataset: Any, chosen: list[int], *, tiny: bool) -> None:
    """Write pictures and both files of some samples, in this order, and the model that trains on them."""
    from ..peers import TINY
    from .step_inputs import SIZES, write_data, write_ours

    inputs = folder / "inputs"
    write_data(inputs, len(chosen))
    captions = {}
    for number, index in enumerate(chosen):
        ((question, answer),) = dataset.choose_answers(dataset.annotations[index])
        captions[str(number)] = {"q": question, "a": answer}
    (inputs / "captions.json").write_text(json.dumps(captions), encoding="utf-8")
    write_ours(inputs, TINY if tiny else SIZES["proportional"])


# ---- The comparison


def measure(folder: Path, batch: int, given: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Train the drawn samples once in each order, in turn; returns medians."""
    number = given.samples // max(given.batches) * max(given.batches)
    common = ["--folder", str(folder / "inputs"), "--dtype", given.dtype, "--steps", str(number // batch)]
    common += ["--skipped", "0", "--threads", str(given.threads), "--no_products"]
    common += ["--per_device_train_batch_size", str(batch)]
    ours = [sys.executable, "-m", "benchmarks.training.step_runs", "ours", *common]
    commands = {name: [*ours, "--train_sampling_strategy", flag] for name, flag in STRATEGIES.items()}
    environment = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(given.threads), "PYTHONPATH": str(ROOT)}
    return {name: medians(runs) for name, runs in run_in_turn(commands, given.rounds, environment).items()}


def share_table(counted: dict[str, Any]) -> str:
    """Padding of an epoch of all samples, and what packing could save of each order."""
    heads = ("padding, the most that packing could save", "of tokens", "of attention")
    rows = [
        [name, *(f"{100 * one[key]:.2f}%" for key in ("padding", "attention"))]
        for name, one in counted["shares"].items()
    ]
    return text_table(heads, rows)


def speed_table(found: dict[int, dict[str, dict[str, float]]]) -> str:
    """What was measured, by batch size and order; ratios above 1 mean that grouping is faster."""
    heads = ("trained", "order", "padding", "s/sample", "ratio", "cpu s/sample", "ratio", "real tokens/s")
    rows = []
    for batch, by_order in found.items():
        of_random = by_order["random"]
        for name, one in by_order.items():
            row = [f"batch {batch}" if name == "random" else "", name, f"{100 * one['padding']:.2f}%"]
            row += [f"{1 / one['samples_per_second']:.3f}"]
            row += [f"{one['samples_per_second'] / of_random['samples_per_second']:.2f}x"]
            row += [f"{one['processor_seconds'] / batch:.3f}"]
            row += [f"{of_random['processor_seconds'] / one['processor_seconds']:.2f}x"]
            rows.append([*row, f"{one['tokens_per_second']:,.0f}"])
    return text_table(heads, rows)


def main() -> None:
    """Count, measure, print, write; or be the process that counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--scale", type=float, default=1.0, help="share of the real number of samples (%(default)s)")
    add("--batches", nargs="+", type=int, default=[4, 8], help="batch sizes, of which the largest is a multiple")
    add("--samples", type=int, default=48, help="samples that are trained (%(default)s)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of training (%(default)s)")
    add("--rounds", type=int, default=2, help="runs of each (%(default)s)")
    add("--threads", type=int, default=os.cpu_count(), help="of a step (%(default)s)")
    add("--output", type=Path, default=RESULTS, help="folder for JSON and PNG (%(default)s)")
    add("--tiny", action="store_true", help="a model of no size, to try the script")
    add("--count", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.samples < max(given.batches):
        parser.exit(2, f"grouped.py: --samples {given.samples} make no batch of {max(given.batches)}; give more\n")
    if given.count:
        print(json.dumps(count(given.count, given)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        counted = run_once([*itself(__file__), *sys.argv[1:], "--count", temporary]).values
        print(f"{counted['samples']:,} samples of {counted['text_tokens']['mean']:.0f} tokens of text in the mean")
        print(share_table(counted), end="\n\n", flush=True)
        found = {batch: measure(folder, batch, given) for batch in given.batches}
    print(speed_table(found))
    settings = {"dtype": given.dtype, "trained": given.samples, "rounds": given.rounds, "threads": given.threads}
    results = {"machine": machine(), "settings": settings, "counted": counted, "measured": found}
    write_results(given.output / "grouped.json", results)
    panels: dict[str, dict[str, dict[str, float]]] = {
        "padding of an epoch, %": {
            f"batch {batch}": {
                name: 100 * counted["shares"][f"{name}, batch {batch}"]["padding"] for name in STRATEGIES
            }
            for batch in given.batches
        },
        "seconds per sample": {
            f"batch {batch}": {name: 1 / one["samples_per_second"] for name, one in by_order.items()}
            for batch, by_order in found.items()
        },
    }
    draw_bars(given.output / "grouped.png", "Batches of similar length", panels)


if __name__ == "__main__":
    main()
