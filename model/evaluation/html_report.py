"""report.html: tables, a histogram of answer lengths, and pictures with their questions, in one file."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Sequence
from html import escape
from typing import Any

from PIL import Image

from dataprocess.image_io import ImageError, load_image

from .captions import is_chinese

Table = tuple[list[str], list[list[str]]]

_MOST_SHOWN = 300  # questions
_SIDE = 240  # pixels of a picture
_BARS = 20

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:70em;padding:0 1em;color:#222;background:#fff}
table{border-collapse:collapse;margin:1em 0}td,th{border:1px solid #ccc;padding:.2em .6em;text-align:right}
td:first-child,th:first-child{text-align:left}.cards{display:flex;flex-wrap:wrap;gap:1em}
.card{border:1px solid #ccc;border-left:6px solid #2a7;padding:.7em;width:20em;overflow-wrap:anywhere}
.card.low{border-left-color:#c43}.card img{max-width:100%;display:block;margin-bottom:.4em}
.bar{background:#48b;height:1em;display:inline-block}.small{color:#666;font-size:.85em}
.row{display:flex;gap:.6em;align-items:center}.row span:first-child{width:7em;text-align:right}
"""
_SCRIPT = """
const kind=document.getElementById("kind"),text=document.getElementById("text");
function show(){for(const card of document.querySelectorAll(".card"))
card.hidden=(kind.value!=="*"&&card.dataset.kind!==kind.value)||!card.textContent.toLowerCase().includes(
text.value.toLowerCase())}
kind.addEventListener("change",show);text.addEventListener("input",show);
"""


def html_report(results: dict[str, Any], lines: Sequence[dict[str, Any]], tables: Sequence[Table]) -> str:
    """Return the page: at most 300 questions with their pictures, the worst of each kind first."""
    chosen = _worst(lines)
    kinds = sorted({str(line.get("kind", "")) for line in chosen})
    options = "".join(f'<option value="{escape(kind)}">{escape(kind) or "(none)"}</option>' for kind in kinds)
    variants = "".join(f"<li><b>{escape(name)}</b>: {escape(text)}</li>" for name, text in results["variants"].items())
    counts = results["counts"]
    missing = f", {counts['without_answer']:,} of them without an answer" if counts["without_answer"] else ""
    parts = [
        "<!DOCTYPE html><html><head><meta charset='utf-8'><title>Evaluation</title>",
        "<meta name='viewport' content='width=device-width'>",
        # The page shows what a model and a data set wrote: nothing in it may load anything from anywhere.
        "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'; img-src data:; "
        "style-src 'unsafe-inline'; script-src 'unsafe-inline'\">",
        f"<style>{_STYLE}</style></head><body><h1>Evaluation</h1>",
        f"<p>{counts['questions']:,} questions{missing}. Intervals: bootstrap over questions.</p>",
        *(_table(head, rows) for head, rows in tables),
        f"<h2>What the metrics are</h2><ul>{variants}</ul>",
        "<h2>Lengths of the answers</h2>",
        _histogram([str(line["answer"]) for line in lines]),
        f"<h2>Questions, worst first</h2><p>{len(chosen):,} of {len(lines):,} are shown. Kind: <select id='kind'>",
        f"<option value='*'>all</option>{options}</select> Text: <input id='text' type='search'></p>",
        f"<div class='cards'>{''.join(map(_card, chosen))}</div>",
        f"<p class='small'>{escape(' '.join(results['command']))}</p><script>{_SCRIPT}</script></body></html>\n",
    ]
    return "\n".join(parts)


def _worst(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Choose the questions with the lowest score, from all kinds in turn, and return them with the lowest first."""
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for line in sorted(lines, key=_score_of):
        by_kind.setdefault(str(line.get("kind", "")), []).append(line)
    share = max(1, _MOST_SHOWN // len(by_kind))
    chosen = [line for of_kind in by_kind.values() for line in of_kind[:share]]
    return sorted(chosen[:_MOST_SHOWN], key=_score_of)


def _score_of(line: dict[str, Any]) -> float:
    return next(iter(line["scores"].values()), 0.0)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{''.join(f'<th>{escape(cell)}</th>' for cell in head)}</tr>{lines}</table>"


def _histogram(answers: Sequence[str]) -> str:
    """Draw how many answers have how many words, or characters if most of them are Chinese."""
    in_characters = 2 * sum(map(is_chinese, answers)) > len(answers)
    lengths = [len(answer) if in_characters else len(answer.split()) for answer in answers]
    width = max(1, -(-(max(lengths) + 1) // _BARS))  # of a bar
    counts = Counter(length // width for length in lengths)
    most = max(counts.values())
    rows = []
    for bar in range(max(counts) + 1):
        name = f"{bar * width}" if width == 1 else f"{bar * width}-{bar * width + width - 1}"
        size = 100 * counts[bar] / most
        rows.append(
            f"<div class='row'><span>{name}</span><span class='bar' style='width:{0.4 * size:.2f}em'></span>"
            f"<span>{counts[bar]:,}</span></div>"
        )
    return f"<p class='small'>In {'characters' if in_characters else 'words'}.</p>{''.join(rows)}"


def _card(line: dict[str, Any]) -> str:
    images = line["image"] if isinstance(line["image"], list) else [line["image"]]
    scores = ", ".join(f"{name} {value:.3f}" for name, value in line["scores"].items())
    said = "<br>".join(escape(text) for text in dict.fromkeys(line["answers"]))
    blind = f"<br><b>Blind:</b> {escape(line['blind_answer'])}" if "blind_answer" in line else ""
    low = "low" if _score_of(line) < 0.5 else ""
    return (
        f"<div class='card {low}' data-kind=\"{escape(str(line.get('kind', '')))}\">"
        f"{''.join(_picture(name) for name in images if name)}"
        f"<b>{escape(line['prompt'])}</b><br><b>Answer:</b> {escape(line['answer']) or '<i>empty</i>'}{blind}"
        f"<br><b>References:</b> {said}<div class='small'>{escape(str(line['id']))} · "
        f"{escape(str(line.get('kind', '')))} · {scores}</div></div>"
    )


def _picture(name: str) -> str:
    try:
        image = load_image(name)
    except ImageError as error:
        return f"<p class='small'>{escape(error.reason)}: {escape(name)}</p>"
    image.thumbnail((_SIDE, _SIDE), Image.Resampling.BICUBIC)
    raw = io.BytesIO()
    image.save(raw, format="JPEG", quality=80)
    return f"<img alt='' src='data:image/jpeg;base64,{base64.b64encode(raw.getvalue()).decode('ascii')}'>"
