"""The official test split of easy-vqa for evaluate.py, and the demo's table of its results.

    python -m benchmarks.easy_vqa.measure questions demo_output/test_split
    python -m benchmarks.easy_vqa.measure table demo_output/results demo_output/majority

The first command writes the 9,673 questions, and for each the answer that is most frequent in training for its kind.
The second compares the model with these answers, and with itself blind: each question about another test picture.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwen.tokenization_qwen import IMAGE_TOKEN

from .questions import KINDS, Question, image_path, load_questions

PUBLISHED_ACCURACY = 0.876
"""A CNN and an LSTM on the same split (https://github.com/vzhou842/easy-VQA-keras)."""


def majority_answers(training: Sequence[Question], questions: Sequence[Question]) -> list[str]:
    """Return for each question the answer that is most frequent for its kind in training."""
    counts: dict[str, Counter[str]] = {}
    for question in training:
        counts.setdefault(question.kind, Counter())[question.answer] += 1
    return [counts[question.kind].most_common(1)[0][0] for question in questions]


def write_questions(folder: Path) -> None:
    """Write questions.jsonl and majority.jsonl into a folder."""
    questions = load_questions("test")
    lines = [
        {
            "id": number,
            "image": str(image_path("test", question.image_id)),
            "prompt": IMAGE_TOKEN + question.text,
            "answers": [question.answer],
            "kind": question.kind,
        }
        for number, question in enumerate(questions)
    ]
    majority = majority_answers(load_questions("train"), questions)
    folder.mkdir(parents=True, exist_ok=True)
    for name, records in {
        "questions": lines,
        "majority": [{"id": number, "answer": answer} for number, answer in enumerate(majority)],
    }.items():
        text = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def table(results: dict[str, Any], majority: dict[str, Any]) -> str:
    """Return exact matches in percent, a line for each kind of question and a column for each way of answering.

    Args:
        results: what results.json of an evaluation with `--blind` holds.
        majority: the same, of the majority's answers.
    """
    columns = {"model": results, "blind": results["blind"], "majority": majority}
    lines = [f"{'question':<12}{'number':>8}" + "".join(f"{name:>12}" for name in columns)]
    for kind in (*KINDS, "all"):
        number = results["counts"]["questions"] if kind == "all" else results["by_kind"][kind]["questions"]
        values = [one["metrics"] if kind == "all" else one["by_kind"][kind] for one in columns.values()]
        cells = "".join(f"{100 * one['exact_match']:>11.1f}%" for one in values)
        lines.append(f"{kind:<12}{number:>8,}{cells}")
    lines.append(f"(A public CNN+LSTM reports {100 * PUBLISHED_ACCURACY:.1f}% on all.)")
    return "\n".join(lines)


def main() -> None:
    """Write the questions, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("questions", help="write the questions").add_argument("folder", type=Path)
    of_results = commands.add_parser("table", help="print the table")
    of_results.add_argument("results", type=Path, help="output folder of evaluate.py for the model")
    of_results.add_argument("majority", type=Path, help="output folder of evaluate.py for the majority's answers")
    args = parser.parse_args()
    if args.command == "questions":
        write_questions(args.folder)
    else:
        folders = (args.results, args.majority)
        print(table(*(json.loads((folder / "results.json").read_text(encoding="utf-8")) for folder in folders)))


if __name__ == "__main__":
    main()
