"""The output folder of an evaluation: results.json, answers.jsonl, report.html, and the table for stdout."""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import platform
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .blind import number_kept
from .files import read_json, to_json, write_whole
from .html_report import html_report
from .intervals import differences, intervals
from .items import Item, read_own
from .metrics import NAMES, Scored

logger = logging.getLogger(__name__)

RESULTS, ANSWERS, REPORT = "results.json", "answers.jsonl", "report.html"
_PACKAGES = ("numpy", "pycocoevalcap", "jieba", "pillow", "torch", "transformers")
_OURS = ("answer", "blind_answer", "error", "scores")  # keys of an earlier evaluation's lines
_MOST_KINDS = 30  # in tables; results.json has all


@dataclass(frozen=True)
class Evaluation:
    """Questions, answers to them and what they score; `blind` is the same with other questions' pictures."""

    items: Sequence[Item]
    answers: Sequence[str | None]
    scored: Sequence[Scored]
    blind_answers: Sequence[str | None] | None
    blind: Sequence[Scored] | None
    seed: int
    fingerprints: dict[str, Any]
    """All that the questions and answers were made from, as fingerprints."""


def file_digest(path: Path) -> str:
    """Return a short hash of a file's content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def summarise(done: Evaluation) -> dict[str, Any]:
    """Return what results.json holds."""
    results: dict[str, Any] = {
        "metrics": {name: value for one in done.scored for name, value in one.total.items()},
        "intervals": {name: pair for one in done.scored for name, pair in intervals(one, done.seed).items()},
        "counts": {
            "questions": len(done.items),
            "without_answer": sum(answer is None for answer in done.answers),
            **{one.family: len(one.rows) for one in done.scored},
        },
        "by_kind": _by_kind(done.items, done.scored),
    }
    if done.blind is not None:
        pairs = list(zip(done.blind, done.scored, strict=True))
        compared = {name: found for pair in pairs for name, found in differences(*pair, done.seed).items()}
        results["blind"] = {
            "without_answer": sum(answer is None for answer in done.blind_answers or ()),
            "with_own_pictures": number_kept([item.question for item in done.items]),
            "metrics": {name: found["first"] for name, found in compared.items()},
            "seeing_minus_blind": {name: found["difference"] for name, found in compared.items()},
            "intervals": {name: found["interval"] for name, found in compared.items()},
            "by_kind": _by_kind(done.items, done.blind),
        }
    return results | {
        "variants": {one.family: one.variant for one in done.scored},
        "judged_by": [one.main for one in done.scored],
        "command": sys.argv,
        "versions": {"python": platform.python_version(), **_versions()},
        "fingerprints": done.fingerprints,
    }


def _by_kind(items: Sequence[Item], scored: Sequence[Scored]) -> dict[str, dict[str, float]]:
    """Return for each kind of question the number of its questions, and the values over them."""
    counts = Counter(item.kind for item in items)
    found: dict[str, dict[str, float]] = {kind: {"questions": counts[kind]} for kind in sorted(counts)}
    for one in scored:
        rows: dict[str, list[int]] = {}
        for place, at in enumerate(one.rows):
            rows.setdefault(items[at].kind, []).append(place)
        for kind, chosen in rows.items():
            values = one.of(chosen).items()  # without POPE's values of single splits
            found[kind] |= {name: value for name, value in values if name in NAMES or one.family != "pope"}
    return found if len(found) > 1 else {}


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def answer_lines(done: Evaluation) -> list[dict[str, Any]]:
    """Return a line for each question: its keys, the answer, and its score in each family that it counts for."""
    scores: list[dict[str, float]] = [{} for _ in done.items]
    for one in done.scored:
        for at, value in zip(one.rows, one.each, strict=True):
            scores[at][one.main] = round(value, 6)
    lines = []
    for at, item in enumerate(done.items):
        images = [str(path) for path in item.question.images]
        line = {
            "id": item.question.id,
            "image": images[0] if len(images) == 1 else images or None,
            "prompt": item.question.prompt,
            **{key: value for key, value in item.question.further.items() if key not in _OURS},
            "answers": list(item.references),
            **({"kind": item.kind} if item.kind else {}),
            **({"split": item.split} if item.split else {}),
            "answer": done.answers[at] or "",
        }
        if done.answers[at] is None:
            line["error"] = "no answer"
        if done.blind_answers is not None:
            line["blind_answer"] = done.blind_answers[at] or ""
        lines.append({**line, "scores": scores[at]})
    return lines


def write_results(output: Path, done: Evaluation) -> dict[str, Any]:
    """Write the three files into the output folder; return what results.json holds."""
    results, lines = summarise(done), answer_lines(done)
    write_whole(output / ANSWERS, "".join(to_json(line) + "\n" for line in lines))
    write_whole(output / REPORT, html_report(results, lines, markdown_rows(results)))
    write_whole(output / RESULTS, to_json(results, indent=2) + "\n")
    return results


def markdown_rows(results: dict[str, Any]) -> list[tuple[list[str], list[list[str]]]]:
    """Return tables as (header, rows): the metrics, and the kinds of questions if there are several."""
    blind = results.get("blind")
    head = ["Metric", "Value", "95% interval", *(["Blind", "Seeing - blind", "95% interval"] if blind else [])]
    rows = []
    for name, value in results["metrics"].items():
        row = [name, f"{value:.4f}", _pair(results["intervals"][name])]
        if blind:
            row += [f"{blind['metrics'][name]:.4f}", f"{blind['seeing_minus_blind'][name]:+.4f}"]
            row += [_pair(blind["intervals"][name])]
        rows.append(row)
    tables = [(head, rows)]
    kinds = results["by_kind"]
    if kinds and len(kinds) <= _MOST_KINDS:
        names = results["judged_by"]
        head = ["Kind", "Questions", *names, *(f"{name}, blind" for name in names if blind)]
        rows = []
        for kind, values in kinds.items():
            row = [kind or "(none)", f"{values['questions']:,.0f}", *(_cell(values, name) for name in names)]
            rows.append(row + [_cell(blind["by_kind"][kind], name) for name in names if blind])
        tables.append((head, rows))
    return tables


def _pair(pair: Sequence[float]) -> str:
    return f"{pair[0]:.4f} to {pair[1]:.4f}"


def _cell(values: dict[str, float], name: str) -> str:
    return f"{values[name]:.4f}" if name in values else ""


def markdown(tables: Sequence[tuple[list[str], list[list[str]]]]) -> str:
    """Write tables in Markdown; bars and line breaks in cells are escaped, control characters replaced."""
    texts = []
    for head, rows in tables:
        lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
        cells = [[_markdown_cell(cell) for cell in line] for line in lines]
        texts.append("\n".join(f"| {' | '.join(line)} |" for line in cells))
    return "\n\n".join(texts)


def _markdown_cell(text: str) -> str:
    plain = "".join(character if character.isprintable() else "\ufffd" for character in " ".join(text.split()))
    return plain.replace("|", "\\|")


def read_results(path: Path) -> tuple[list[Item], list[str | None], list[str]]:
    """Read an output folder, or a file in it: questions, answers (None if missing), and families that were scored.

    Raises:
        ValueError: if it is not the output of an evaluation.
    """
    folder = path if path.is_dir() else path.parent
    for name in (RESULTS, ANSWERS):
        if not (folder / name).is_file():
            raise ValueError(f"--compare {path}: there is no {name} there; give output folders of evaluate.py")
    results = read_json(folder / RESULTS, "--compare")
    items = read_own(folder / ANSWERS).items
    try:
        families = [family for family in results["variants"] if not family.startswith("char_")]
        lines = [item.question.further for item in items]
        return items, [None if "error" in line else str(line["answer"]) for line in lines], families
    except (KeyError, TypeError) as error:
        raise ValueError(f"--compare {path}: not the output of evaluate.py ({error!r})") from error
