r"""Write a web page, one file, of the held-out pictures with the model's answers.

python -m benchmarks.real_parts.page --results demo_real_output/results \
        --annotations demo_real_output/annotations --output demo_real_output/answers.html
"""

from __future__ import annotations

import argparse
import base64
import io
import json
from html import escape
from pathlib import Path
from typing import Any

from dataset import load_image

from .evaluate import is_right
from .questions import KIND_QUESTION, NAME_QUESTION

SIDE = 160  # pixels of a picture on the page
_STYLE = """
body { font: 15px sans-serif; max-width: 1150px; margin: 2em auto; padding: 0 1em; color: #222; }
pre { background: #f4f4f4; padding: 0.8em; overflow-x: auto; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(175px, 1fr)); gap: 12px; }
figure { margin: 0; padding: 8px; border: 1px solid #ddd; border-radius: 6px; text-align: center; }
figcaption { font-size: 13px; text-align: left; }
.right { color: #176b2c; } .wrong { color: #a3291f; } .true { color: #666; }
dt { font-weight: bold; margin-top: 0.6em; }
"""


def data_uri(file: Path) -> str:
    """Return a picture as text that a page can hold."""
    buffer = io.BytesIO()
    load_image(file).resize((SIDE, SIDE)).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def figure(record: dict[str, Any], file: Path) -> str:
    """Return one picture with its kind and its name, as the model has them and as they are."""
    lines = []
    for what, true in (("kind", record["kind"]), ("name", record["caption"])):
        answer = record[f"model {what}"]
        colour = "right" if is_right(what, answer, record) else "wrong"
        lines.append(f'<span class="{colour}">{escape(answer)}</span> <span class="true">({escape(true)})</span>')
    return f'<figure><img src="{data_uri(file)}" alt=""><figcaption>{"<br>".join(lines)}</figcaption></figure>'


def page(results: Path, pictures: Path) -> str:
    """Return the page.

    Args:
        results: folder that evaluate.py wrote.
        pictures: folder of the held-out pictures.
    """
    records = json.loads((results / "answers.json").read_text(encoding="utf-8"))
    speech = json.loads((results / "speech.json").read_text(encoding="utf-8"))
    figures = "\n".join(figure(record, pictures / record["file"]) for record in records)
    spoken = "\n".join(
        f"<dt>{escape(said['question'])}</dt><dd>before: {escape(said['before'])}</dd>"
        f"<dd>after: {escape(said['after'])}</dd>"
        for said in speech
    )
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Held-out pictures</title><style>{_STYLE}</style></head><body>
<h1>Held-out pictures</h1>
<p>The model was trained on other pictures. It is asked “{escape(KIND_QUESTION)}” and “{escape(NAME_QUESTION)}”; what is
true stands in brackets. A name counts as right if it has a content word of the true caption. Nearly every picture has a
name of its own, so the kind is the figure that counts.</p>
<pre>{escape((results / "table.txt").read_text(encoding="utf-8"))}</pre>
<div class="grid">
{figures}
</div>
<h2>Without a picture, before and after training</h2>
<dl>
{spoken}
</dl>
</body></html>
"""


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="folder that evaluate.py wrote")
    parser.add_argument("--annotations", type=Path, required=True, help="folder that prepare_data.py wrote")
    parser.add_argument("--output", type=Path, required=True, help="HTML file to write")
    args = parser.parse_args()
    temporary = args.output.with_name(f"{args.output.name}.part")
    temporary.write_text(page(args.results, args.annotations / "held_out"), encoding="utf-8")
    temporary.replace(args.output)


if __name__ == "__main__":
    main()
