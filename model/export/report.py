"""EXPORT.md: what an export is, how it was checked, and how to ask it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qwen import IMAGE_TOKEN

from .sources import Sources
from .text_half import text_half
from .verify import Comparison

EXPORT_NOTE = "EXPORT.md"

_LLAVA = """\
## How to ask it

```sh
vllm serve {folder}{limit}
python -m sglang.launch_server --model-path {folder}
transformers serve {folder}
mlx_vlm.generate --model {folder} --image picture.jpg --prompt "…"
```

llama.cpp does not read this folder.{sglang}

## What differs from test.py

{notes}
- **Typed control tokens**: these readers turn `<|im_end|>` and the like in a question into control tokens; test.py
  takes all but `{image}` for text. Take them out of what strangers may type.
- **A question that begins with a line break** is split into other tokens than by test.py.
- **Pictures** are resized by the reader. With torchvision installed, pixels differ by up to 0.015 from Pillow's.
{float16}"""
_MERGED = """\
## How to ask it

The language model is a {kind} as published, the projector is next to it, and the vision tower is {vision}.
`docs/serving.md` of the repository that made this folder has a short loader.
"""
_PEFT = """\
## How to ask it

```python
model = PeftModel.from_pretrained(base, "{folder}")  # base: the language model, {language}
```

The projector is not part of it, so it can't be asked about pictures.
"""


def write_report(
    sources: Sources, folder: Path, name: str, kind: str, comparisons: Sequence[Comparison] | None
) -> None:
    """Write `EXPORT.md` into an export.

    Args:
        sources: what was exported.
        folder: where the export is now.
        name: its final name.
        kind: its format.
        comparisons: with our own model; None: none were made.

    Raises:
        OSError: if it can't be written.
    """
    language, vision = (
        Path(base).name if Path(base).is_dir() else base for base in (sources.language_name, sources.vision_name)
    )
    has_block = sources.takes_norm
    half = text_half(sources)
    text = {"llava": _LLAVA, "merged": _MERGED, "peft": _PEFT}[kind].format(
        folder=name,
        limit="" if half.max_length is None else f" --max-model-len {half.max_length}",
        notes="\n".join(f"- {note}" for note in half.notes()),
        kind=half.name,
        image=IMAGE_TOKEN,
        language=language,
        vision=vision,
        sglang=" SGLang would apply SigLIP's last norm twice: do not use it." if has_block else "",
        float16="- **float16** overflows in SigLIP's last block: serve in bfloat16 or float32.\n" if has_block else "",
    )
    dtype = str(sources.dtype).removeprefix("torch.")
    states = {"lora": "with LoRA merged", "projector": "as published", "all": "trained as a whole"}
    language_model = f"{language} {states[sources.checkpoint.train_only]}"
    head = f"# {name}\n\n{language_model}, {vision} and a projector, as `--format {kind}` in {dtype}.\n"
    if kind == "peft":
        head = f"# {name}\n\nLoRA of {language}, as `--format peft`.\n"
    (folder / EXPORT_NOTE).write_text("\n".join([head, *table(comparisons), text]), encoding="utf-8")


def table(comparisons: Sequence[Comparison] | None) -> list[str]:
    """Return the lines that say how the export compares with our own model."""
    if comparisons is None:
        return ["Not compared with the model that was trained (`--no_verify`).", ""]
    lines = [
        "Compared with the model that was trained, both in fp32: the same prompt, token by token, the same pixels, and",
        "",
        "| question | picture | prompt tokens | equal greedy tokens | largest difference of logits | largest logit |",
        "|---|---|---|---|---|---|",
    ]
    for one in comparisons:
        cells = (one.question, "yes" if one.has_image else "no", one.num_prompt_tokens)
        shown = f"{one.num_tokens} of {one.num_tokens}", f"{one.difference:.2g}", f"{one.largest_logit:.3g}"
        lines.append(f"| {' | '.join(map(str, (*cells, *shown)))} |")
    return [*lines, ""]
