"""EXPORT.md: what an export is, how it was checked, and how to ask it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from qwen import IMAGE_TOKEN

from ..checkpoints.folder import LANGUAGE_MODEL
from .gguf_files import gguf_names
from .gguf_text import text_notes
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

llama.cpp does not read this folder; `--format gguf` writes what it reads (SigLIP towers only).{sglang}

## What differs from test.py

{notes}
- **Typed control tokens**: these readers turn `<|im_end|>` and the like in a question into control tokens; test.py
  takes all but `{image}` for text. Take them out of what strangers may type.
- **A question that begins with a line break** is split into other tokens than by test.py.
- **Pictures** are resized by the reader. With torchvision installed, pixels differ by up to 0.015 from Pillow's.
{float16}"""
_GGUF = """\
## How to ask it

```sh
llama-server -m {folder}/{text} --mmproj {folder}/{mmproj} --jinja --ctx-size {length} --host 127.0.0.1 --port 8080
llama-mtmd-cli -m {folder}/{text} --mmproj {folder}/{mmproj} --jinja --image picture.jpg -p "…"
```

The server has OpenAI's interface at http://127.0.0.1:8080/v1; `docs/serving.md` of the repository that made this folder
shows a question.

## What differs from test.py

- **Pictures** that are not square are padded with grey; test.py stretches them. Stretch them to {size} × {size} pixels
  first: then nothing is left to resize.
{notes}
- **Typed control tokens**: llama.cpp turns `<|im_end|>` and the like in a question into control tokens; test.py takes
  all but `{image}` for text. Take them out of what strangers may type.
- **Unicode**: llama.cpp does not compose characters (NFC): e and a combining accent are other tokens than é.
- **A question that begins with a line break** is split into other tokens than by test.py.
- **Several text parts** in one message get a line break between them.
- **Numbers**: activations in front of a matrix are rounded to its type, GELU is looked up in a table, and the
  server's caches are float16 by default (`--cache-type-k f32 --cache-type-v f32` was used for the comparison).
"""
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


def write_report(sources: Sources, folder: Path, name: str, kind: str, comparisons: Sequence[Comparison] | str) -> None:
    """Write `EXPORT.md` into an export.

    Args:
        sources: what was exported.
        folder: where the export is now.
        name: its final name.
        kind: its format.
        comparisons: with our own model, or why none were made.

    Raises:
        OSError: if it can't be written.
    """
    trained, language = sources.checkpoint, sources.language_name
    if trained.train_only == "all" and trained.config is not None:  # the language model is in the checkpoint
        language = trained.config.base_language_model
    language, vision = _shown(language), _shown(sources.vision_name)
    has_block = sources.takes_norm
    half = text_half(sources)
    text_file, mmproj_file = gguf_names(sources)
    text = {"llava": _LLAVA, "gguf": _GGUF, "merged": _MERGED, "peft": _PEFT}[kind].format(
        folder=name if kind == "peft" else shlex.quote(name),
        limit="" if half.max_length is None else f" --max-model-len {half.max_length}",
        length=half.max_length or getattr(sources.language, "max_position_embeddings", None),
        notes="\n".join(f"- {note}" for note in (text_notes(half) if kind == "gguf" else half.notes())),
        kind=half.name,
        image=IMAGE_TOKEN,
        size=sources.tower.image_size,
        text=text_file,
        mmproj=mmproj_file,
        language=language,
        vision=vision,
        sglang=" SGLang would apply SigLIP's last norm twice: do not use it." if has_block else "",
        float16="- **float16** overflows in SigLIP's last block: serve in bfloat16 or float32.\n" if has_block else "",
    )
    dtype = str(sources.dtype).removeprefix("torch.")
    states = {"lora": "with LoRA merged", "projector": "as published", "all": "trained as a whole"}
    language_model = f"{language} {states[trained.train_only]}"
    head = f"# {name}\n\n{language_model}, {vision} and a projector, as `--format {kind}` in {dtype}.\n"
    if kind == "peft":
        head = f"# {name}\n\nLoRA of {language}, as `--format peft`.\n"
    (folder / EXPORT_NOTE).write_text("\n".join([head, *table(comparisons, kind), text]), encoding="utf-8")


def _shown(base: str) -> str:
    """Return a base model's name without the path of this machine; one in a checkpoint is named with its folder."""
    path = Path(base)
    if not path.is_dir():
        return base
    return f"{path.parent.name}/{path.name}" if path.name == LANGUAGE_MODEL else path.name


def table(comparisons: Sequence[Comparison] | str, kind: str) -> list[str]:
    """Return the lines that say how the export compares with our own model, or why they were not compared."""
    if isinstance(comparisons, str):
        return [f"Not compared with the model that was trained: {comparisons}.", ""]
    both, values = "both in fp32", "logits"
    if kind == "gguf":
        both, values = "which computed in fp32, by asking llama.cpp's server", "log-probabilities"
    same = "the same prompt, token by token" + (", the same pixels" if kind == "llava" else "")
    lines = [
        f"Compared with the model that was trained, {both}: {same}, and",
        "",
        "| question | picture | prompt tokens | equal greedy tokens "
        f"| largest difference of {values} | largest logit |",
        "|---|---|---|---|---|---|",
    ]
    for one in comparisons:
        cells = (one.question, "yes" if one.has_image else "no", one.num_prompt_tokens)
        shown = f"{one.num_equal} of {one.num_tokens}", f"{one.difference:.2g}", f"{one.largest_logit:.3g}"
        lines.append(f"| {' | '.join(map(str, (*cells, *shown)))} |")
    if any(one.num_equal < one.num_tokens for one in comparisons):
        lines += ["", "Where tokens differ, our model finds the other one as likely, up to the rounding."]
    return [*lines, ""]
