"""report.html: tables, a histogram of answer lengths, and pictures with their questions, in one file."""

from __future__ import annotations

import base64
import io
import math
import shlex
from collections import Counter
from collections.abc import Sequence
from html import escape
from typing import Any

from PIL import Image

from dataprocess.image_io import ImageError, load_image
from dataprocess.messages import format_count

from .captions import is_chinese

Table = tuple[list[str], list[list[str]]]

_EMPTY = "<i>empty</i>"
_UNSEEN = (*range(32), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A), *range(0xD800, 0xE000))
_ESCAPES = {code: f"\\u{code:04x}" for code in _UNSEEN if chr(code) not in "\t\n"}
"""Characters that HTML may not hold, or that turn the direction of what follows."""
_MOST_SHOWN = 300  # questions
_SIDE = 240  # pixels of a picture
_BARS = 20

_STYLE = """
*{box-sizing:border-box}
body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:70em;padding:0 1em;color:#222;background:#fff;
overflow-wrap:anywhere}
.table{overflow-x:auto;margin:1em 0}table{border-collapse:collapse}
td,th{border:1px solid #ccc;padding:.2em .6em;text-align:right;overflow-wrap:normal}
td:first-child,th:first-child{text-align:left;overflow-wrap:anywhere;min-width:8em}
.cards{display:flex;flex-wrap:wrap;gap:1em;align-items:flex-start}select,input{max-width:100%;font:inherit}
.card{border:1px solid #ccc;border-left:6px solid #2a7;padding:.7em;width:20em;max-width:100%;white-space:pre-line}
.card.low{border-left-color:#c43}.card.unscored{border-left-color:#bbb}.card[hidden]{display:none}
.card img{max-width:100%;display:block;margin-bottom:.4em}.small{color:#666;font-size:.85em}
.row{display:flex;gap:.6em;align-items:center}.row span:first-child{flex:none;width:7em;text-align:right}
.track{flex:0 1 40em;min-width:0}.bar{background:#48b;height:1em;display:block}
"""
_SCRIPT = """
const kind=document.getElementById("kind"),text=document.getElementById("text");
function show(){for(const card of document.querySelectorAll(".card"))
card.hidden=(kind.selectedIndex&&card.dataset.kind!==kind.value)||!card.textContent.toLowerCase().includes(
text.value.toLowerCase())}
kind.addEventListener("change",show);text.addEventListener("input",show);
"""


def html_report(results: dict[str, Any], lines: Sequence[dict[str, Any]], tables: Sequence[Table]) -> str:
    """Return the page: at most 300 questions with their pictures, the worst of each kind first."""
    chosen = _worst(lines)
    kinds = sorted({_kind(line) for line in chosen})
    options = "".join(f'<option value="{_text(kind)}">{_text(kind) or "(none)"}</option>' for kind in kinds)
    variants = "".join(f"<li><b>{_text(name)}</b>: {_text(text)}</li>" for name, text in results["variants"].items())
    counts = results["counts"]
    missing = f", {counts['without_answer']:,} of them without an answer" if counts["without_answer"] else ""
    kept = results.get("blind", {}).get("with_own_pictures")
    said = format_count(kept or 0, "question has", "questions have")
    same = f" {said} no other pictures to be asked with, and the same answer in both columns." if kept else ""
    parts = [
        "<!DOCTYPE html><html><head><meta charset='utf-8'><title>Evaluation</title>",
        "<meta name='viewport' content='width=device-width,initial-scale=1'>",
        # The page shows what a model and a data set wrote: nothing in it may load anything from anywhere.
        "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'; img-src data:; "
        "style-src 'unsafe-inline'; script-src 'unsafe-inline'\">",
        f"<style>{_STYLE}</style></head><body><h1>Evaluation</h1>",
        f"<p>{counts['questions']:,} questions{missing}. Intervals: bootstrap over questions.{same}</p>",
        *(_table(head, rows) for head, rows in tables),
        f"<h2>What the metrics are</h2><ul>{variants}</ul>",
        "<h2>Lengths of the answers</h2>",
        _histogram([str(line["answer"]) for line in lines]),
        f"<h2>Questions, worst first</h2><p>{len(chosen):,} of {len(lines):,} are shown. Kind: <select id='kind'>",
        f"<option>all</option>{options}</select> Text: <input id='text' type='search'></p>",
        f"<div class='cards'>{''.join(map(_card, chosen))}</div>",
        f"<p class='small'>{_text(shlex.join(results['command']))}</p><script>{_SCRIPT}</script></body></html>\n",
    ]
    return "\n".join(parts)


def _worst(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Choose the questions with the lowest score, at first from every kind as many; return them with the lowest first.

    Questions that no metric is defined for come last.
    """
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for line in sorted(lines, key=_score_of):
        by_kind.setdefault(_kind(line), []).append(line)
    share = max(1, _MOST_SHOWN // len(by_kind))
    chosen = [line for of_kind in by_kind.values() for line in of_kind[:share]]
    others = [line for of_kind in by_kind.values() for line in of_kind[share:]]
    chosen += sorted(others, key=_score_of)[: max(0, _MOST_SHOWN - len(chosen))]
    return sorted(chosen[:_MOST_SHOWN], key=_score_of)


def _score_of(line: dict[str, Any]) -> float:
    return next(iter(line["scores"].values()), math.inf)


def _kind(line: dict[str, Any]) -> str:
    return str(line.get("kind") or "")


def _text(value: object) -> str:
    """Write a text for HTML; control characters become visible escapes."""
    return escape(str(value).translate(_ESCAPES))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f"<div class='table'><table><tr>{''.join(f'<th>{_text(cell)}</th>' for cell in head)}</tr>{lines}</table></div>"
    )


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
        rows.append(
            f"<div class='row'><span>{name}</span><span class='track'><span class='bar' "
            f"style='width:{100 * counts[bar] / most:.1f}%'></span></span><span>{counts[bar]:,}</span></div>"
        )
    return f"<p class='small'>In {'characters' if in_characters else 'words'}.</p>{''.join(rows)}"


def _card(line: dict[str, Any]) -> str:
    images = line["image"] if isinstance(line["image"], list) else [line["image"]]
    kind = _text(_kind(line))
    scores = ", ".join(f"{name} {value:.3f}" for name, value in line["scores"].items()) or "no metric is defined for it"
    said = "<br>".join(_text(text) or _EMPTY for text in dict.fromkeys(line["answers"]))
    answer = "<i>none</i>" if "error" in line else _text(line["answer"]) or _EMPTY
    blind = f"<br><b>Blind:</b> {_text(line['blind_answer']) or _EMPTY}" if "blind_answer" in line else ""
    state = "low" if _score_of(line) < 0.5 else "" if line["scores"] else "unscored"
    return (
        f"<div class='card {state}' data-kind=\"{kind}\">{''.join(_picture(name) for name in images if name)}"
        f"<b>{_text(line['prompt'])}</b><br><b>Answer:</b> {answer}{blind}<br><b>References:</b> {said}"
        f"<div class='small'>{_text(line['id'])} · {kind} · {scores}</div></div>"
    )


def _picture(name: str) -> str:
    try:
        image = load_image(name)
    except ImageError as error:
        return f"<p class='small'>{_text(error.reason)}: {_text(name)}</p>"
    image.thumbnail((_SIDE, _SIDE), Image.Resampling.BICUBIC)
    raw = io.BytesIO()
    image.save(raw, format="JPEG", quality=80)
    return f"<img alt='' src='data:image/jpeg;base64,{base64.b64encode(raw.getvalue()).decode('ascii')}'>"
