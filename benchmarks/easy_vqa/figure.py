"""Draw nine test pictures with a question each and the model's answer.

python -m benchmarks.easy_vqa.figure --results demo_output/results --output demo_output/answers.png
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot

from dataset import load_image
from qwen import IMAGE_TOKEN

from .questions import KINDS

SEED = 42
NUMBER = 9


def choose(answers: list[dict[str, Any]], number: int = NUMBER) -> list[dict[str, Any]]:
    """Choose questions about different pictures at random, all kinds in turn, whether answered right or not."""
    rng = random.Random(SEED)
    shuffled = rng.sample(answers, k=len(answers))
    chosen: list[dict[str, Any]] = []
    for position in range(number):
        kind = KINDS[position % len(KINDS)]
        seen = {record["image"] for record in chosen}
        chosen.append(next(record for record in shuffled if record["kind"] == kind and record["image"] not in seen))
    return chosen


def draw(records: list[dict[str, Any]], path: Path) -> None:
    """Write a PNG of three pictures in a row; right answers are green, wrong ones red and followed by the right one."""
    matplotlib.use("Agg")
    figure, axes = pyplot.subplots(3, 3, figsize=(9, 10))
    for axis, record in zip(axes.flat, records, strict=True):
        axis.imshow(load_image(record["image"]))
        axis.set_xticks([])
        axis.set_yticks([])
        answer, (right,) = record["answer"], record["answers"]
        axis.set_title(record["prompt"].replace(IMAGE_TOKEN, ""), fontsize=9)
        shown = answer if answer == right else f"{answer} (right: {right})"
        axis.set_xlabel(shown, fontsize=12, color="darkgreen" if answer == right else "firebrick")
    figure.tight_layout()
    temporary = path.with_name(f"{path.name}.part")
    figure.savefig(temporary, format="png", dpi=110)
    pyplot.close(figure)
    temporary.replace(path)


def main() -> None:
    """Draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="folder that evaluate.py wrote")
    parser.add_argument("--output", type=Path, required=True, help="PNG to write")
    args = parser.parse_args()
    lines = (args.results / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    draw(choose([json.loads(line) for line in lines]), args.output)


if __name__ == "__main__":
    main()
