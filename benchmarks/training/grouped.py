"""Batches of similar length next to random ones: padding, seconds per sample, and what packing could add.

    python -m benchmarks.training.grouped
    python -m benchmarks.training.grouped --dtype bfloat16 --batches 4 --samples 96

The samples are those of `data/prepare.py`: as many as the real ones, of their lengths (210,000 Chinese captions, 23,000
long and 77,000 longer English answers), 256 image tokens each. The first table counts the tokens of an epoch of all of
them and needs no model. Packing puts several samples into a row, each with attention of its own: at the very best it
saves what is left of padding, and nothing else. *Exact lengths* is grouping by true tokens instead of their estimate.

The second table is measured: batches of the epoch that `group_by_length` makes of all samples, taken evenly from short
to long, and the same samples in `random` order, each from the first step to the last. As both train the same samples,
they are compared per sample and per token that is not padding. Runs take turns, each in a process of its own.
Prints both tables, writes `results/grouped.json` and `.png`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..measure import DTYPES, ROOT, itself, medians, parser, publish, run_in_turn, run_once, text_table

if TYPE_CHECKING:
    from torch import Tensor

RUNS = itself(str(Path(__file__).with_name("step_runs.py")))
IMAGE_TOKENS = 256
STRATEGIES = {"random": "random", "grouped": "sequential"}
"""The flag of each run: the samples are written in the order of a grouped epoch, which `sequential` keeps."""


# ---- In a process of its own: lengths, and the samples to train


def padding_share(lengths: Tensor, batch: int) -> float:
    """Return the share of tokens that are padding, 0 to 1, where samples are put into batches in their order."""
    whole = sum(int(one.max()) * len(one) for one in lengths.split(batch))
    return 1 - int(lengths.sum()) / whole


def attention_share(lengths: Tensor, batch: int) -> float:
    """Return the share of attention's products that touch padding: they grow with the square of a row's length."""
    whole = sum(float(one.max()) ** 2 * len(one) for one in lengths.split(batch))
    return 1 - float(lengths.double().square().sum()) / whole


def count(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Return the padding of an epoch in each order; writes samples to train, as many whole grouped batches."""
    import torch

    from dataset.epoch_order import epoch_permutation
    from dataset.grouped_order import estimated_lengths, grouped_permutation

    from ..data.prepare import write_annotations
    from ..data.prepare_run import new_tokenizer, open_dataset
    from ..inputs import SEED

    write_annotations(folder, given.scale, pictures=1)
    run_once([sys.executable, str(ROOT / "dataprocess/process_image.py"), "--config", str(folder / "config.yaml")])
    dataset = open_dataset(folder, new_tokenizer())
    true = torch.tensor([len(dataset.encode(sample).input_ids) for sample in dataset.annotations])  # (samples,)
    orders = {
        "random": epoch_permutation(len(true), SEED, 0),
        "grouped": grouped_permutation(estimated_lengths(dataset), SEED, 0),
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
    whole = orders["grouped"][: len(true) - len(true) % most].view(-1, most)  # (batches, samples of each)
    whole = whole[true[whole].sum(dim=1).argsort()]
    number = given.samples // most
    drawn = whole[[int((place + 0.5) * len(whole) / number) for place in range(number)]]
    write_inputs(folder / "inputs", [dataset.annotations[index] for index in drawn.flatten().tolist()], tiny=given.tiny)
    tokens = true - IMAGE_TOKENS
    return {
        "samples": len(true),
        "text_tokens": {"least": int(tokens.min()), "mean": float(tokens.double().mean()), "most": int(tokens.max())},
        "shares": shares,
    }


def write_inputs(folder: Path, chosen: list[Any], *, tiny: bool) -> None:
    """Write samples with the texts of those chosen, in this order, and the model that trains on them."""
    from ..inputs import write_samples
    from ..peers import SIZES, TINY, write_ours

    write_samples(folder, len(chosen))
    captions = {str(number): {"q": q, "a": a} for number, ((q, a),) in enumerate(sample.turns for sample in chosen)}
    (folder / "captions.json").write_text(json.dumps(captions), encoding="utf-8")
    write_ours(folder, TINY if tiny else SIZES["proportional"])


# ---- The comparison


def measure(folder: Path, batch: int, given: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Train the drawn samples once in each order, in turn; returns medians."""
    number = given.samples // max(given.batches) * max(given.batches)
    ours = [*RUNS, "ours", "--folder", str(folder / "inputs"), "--dtype", given.dtype]
    ours += ["--steps", str(number // batch), "--skipped", "0", "--per_device_train_batch_size", str(batch)]
    commands = {name: [*ours, "--train_sampling_strategy", flag] for name, flag in STRATEGIES.items()}
    return {name: medians(runs) for name, runs in run_in_turn(commands, given.rounds, given.threads).items()}


def share_table(counted: dict[str, Any]) -> str:
    """Return the padding of an epoch of all samples: what packing could save of each order."""
    heads = ("padding, the most that packing could save", "of tokens", "of attention")
    rows = [
        [name, *(f"{100 * one[key]:.2f}%" for key in ("padding", "attention"))]
        for name, one in counted["shares"].items()
    ]
    return text_table(heads, rows)


def speed_table(found: dict[int, dict[str, dict[str, float]]]) -> str:
    """Return what was measured, by batch size and order; ratios above 1 mean that grouping is faster."""
    heads = ("trained", "order", "padding", "s/sample", "ratio", "CPU s/sample", "ratio", "real tokens/s")
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
    parse = parser(__doc__, rounds=2, can_be_tiny=True)
    add = parse.add_argument
    add("--scale", type=float, default=1.0, help="share of the real number of samples (%(default)s)")
    add("--batches", nargs="+", type=int, default=[4, 8], help="batch sizes, of which the largest is a multiple")
    add("--samples", type=int, default=48, help="samples that are trained (%(default)s)")
    add("--dtype", choices=DTYPES, default="float32", help="of training (%(default)s)")
    add("--count", type=Path, help=argparse.SUPPRESS)
    given = parse.parse_args()
    if given.samples < max(given.batches):
        parse.exit(2, f"grouped.py: --samples {given.samples} make no batch of {max(given.batches)}; give more\n")
    if given.count:
        print(json.dumps(count(given.count, given)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        counted = run_once([*itself(__file__), *sys.argv[1:], "--count", temporary]).values
        print(f"{counted['samples']:,} samples with a mean of {counted['text_tokens']['mean']:.0f} tokens of text")
        print(share_table(counted), end="\n\n", flush=True)
        found = {batch: measure(Path(temporary), batch, given) for batch in given.batches}
    print(speed_table(found))
    settings = {"dtype": given.dtype, "trained": given.samples, "rounds": given.rounds, "threads": given.threads}
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
    results = {"settings": settings, "counted": counted, "measured": found}
    publish(given.output, "grouped", results, "Batches of similar length", panels)


if __name__ == "__main__":
    main()
