"""Seconds and peak memory from the command to the first token, next to transformers' LLaVA of the same size.

    python -m benchmarks.answering.load
    python -m benchmarks.answering.load --layers 12 --width 1024 --rounds 3

Checkpoints with random weights are written in the published formats (QWen in shards, CLIP, and LoRA with projector for
ours; LLaVA's own for the peer), in bf16. Then `test.py` answers with one token, and a script of the peer does, in turn,
each in a process of its own. Memory is the peak of what was resident; "less the imports" takes off what the imports
alone need, measured in the same round.
Prints a table of medians; writes load.json and load.png into the output folder.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..measure import ROOT, Run, itself, medians, parser, publish, run_in_turn, run_once, text_table

GB = 1e9
QUESTION = "What is in the picture?"
PEERS = ("ours", "llava")

LLAVA = """
import json, sys, torch
from transformers import CLIPImageProcessorPil, LlavaForConditionalGeneration
if sys.argv[1:]:
    from PIL import Image
    folder, picture, prompt = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16).eval()
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(images=Image.open(picture), return_tensors="pt")
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=1, pad_token_id=0,
            pixel_values=pixels["pixel_values"].to(torch.bfloat16),
        )
    print(int(out[0, -1]))
"""
OUR_IMPORTS = f"import sys, runpy; sys.path.insert(0, {str(ROOT)!r}); runpy.run_path({str(ROOT / 'test.py')!r})"


def write_ours(size: Any, folder: Path) -> None:
    """Write QWen and CLIP, and a checkpoint over them."""
    import torch

    from model import LoraSettings, VisionLanguageModel

    from ..random_weights import write_language_model, write_tower

    write_language_model(folder / "qwen", size.qwen, shard_bytes=500_000_000)
    write_tower(folder / "clip", size.clip)
    model = VisionLanguageModel.from_pretrained(
        str(folder / "qwen"), str(folder / "clip"), dtype=torch.bfloat16, device="cpu", trainable=True
    )
    model.add_lora(LoraSettings())
    model.save_checkpoint(folder / "weights")


def write_llava(size: Any, folder: Path) -> None:
    """Write the peer and its image processor."""
    import torch
    from transformers import CLIPImageProcessorPil, LlavaForConditionalGeneration

    from ..peers import llava_config
    from ..random_weights import write_weights

    config = llava_config(size)
    with torch.device("meta"):
        llava = LlavaForConditionalGeneration(config)
    write_weights(folder / "llava", llava, config, torch.bfloat16, 500_000_000)
    CLIPImageProcessorPil.from_pretrained(str(folder / "clip")).save_pretrained(str(folder / "llava"))


def prompt_of(size: Any, folder: Path) -> list[int]:
    """Return the token ids that test.py makes of the question."""
    from dataset.prompt import encode_question
    from model.asking.assistant import with_placeholders
    from model.checkpoints.base_models import load_tokenizer

    return encode_question(load_tokenizer(str(folder / "qwen")), with_placeholders(QUESTION, 1), size.num_image_tokens)


def write_inputs(folder: Path, args: argparse.Namespace) -> None:
    """Write everything; in a process of its own, whose memory is then free again."""
    from ..peers import Size

    heads = max(1, args.width // 64)
    towers = {"tower_layers": 12, "tower_width": 768} if args.width > 512 else {}
    size = Size(layers=args.layers, width=args.width, inner=args.width * 43 // 16, heads=heads, **towers)
    write_ours(size, folder)
    write_llava(size, folder)
    (folder / "prompt.json").write_text(json.dumps(prompt_of(size, folder)))


def commands(folder: Path) -> dict[str, list[str]]:
    """Return what is measured: both peers, and what each imports."""
    picture = str(ROOT / "test_img/1.jpg")
    ask = ["--image_path", picture, "--prompt", QUESTION, "--greedy", "--max_new_tokens", "1", "--dtype", "bfloat16"]
    ours = [str(ROOT / "test.py"), "--model_weights", str(folder / "weights"), "--device", "cpu", *ask]
    return {
        "ours": [sys.executable, *ours],
        "llava": [sys.executable, "-c", LLAVA, str(folder / "llava"), picture, (folder / "prompt.json").read_text()],
        "ours, imports": [sys.executable, "-c", OUR_IMPORTS],
        "llava, imports": [sys.executable, "-c", LLAVA],
    }


def figures_of(runs: Mapping[str, Sequence[Run]]) -> dict[str, dict[str, float]]:
    """Return medians of each peer, of its imports, and of what it takes without them, subtracted in each round."""
    figures = {name: medians(done) for name, done in runs.items()}
    for peer in PEERS:
        rounds = zip(runs[peer], runs[f"{peer}, imports"], strict=True)
        figures[f"{peer}, less imports"] = medians([_difference(whole, imports) for whole, imports in rounds])
    return figures


def _difference(whole: Run, part: Run) -> Run:
    seconds, cpu_seconds = whole.seconds - part.seconds, whole.cpu_seconds - part.cpu_seconds
    return Run(seconds, cpu_seconds, whole.peak_bytes - part.peak_bytes, {})


def show(figures: dict[str, dict[str, float]]) -> str:
    """Return the table; a ratio above 1 means that ours is faster, or smaller."""
    rows = []
    for label, name, unit in (
        ("seconds", "seconds", 1.0),
        ("processor seconds", "cpu_seconds", 1.0),
        ("peak, GB", "peak_bytes", GB),
    ):
        for less in ("", ", less imports"):
            ours, llava = (figures[f"{peer}{less}"][name] / unit for peer in PEERS)
            what = f"{label}, less the imports" if less else label
            rows.append([what, f"{ours:.2f}", f"{llava:.2f}", f"{llava / ours:.2f}x"])
    files = [f"{figures[peer]['files'] / GB:.2f}" for peer in PEERS]
    rows.append(["files of weights, GB", *files, ""])
    return text_table(("to the first token", "ours", "LLaVA", "ratio"), rows)


def main() -> None:
    """Write the checkpoints, measure, and show."""
    parse = parser(__doc__, rounds=3)
    add = parse.add_argument
    add("--layers", type=int, default=12, help="blocks of the language model (%(default)s)")
    add("--width", type=int, default=1024, help="its channels (%(default)s)")
    add("--write", type=Path, help=argparse.SUPPRESS)
    args = parse.parse_args()
    if args.write:
        write_inputs(args.write, args)
        return
    with tempfile.TemporaryDirectory() as name:
        run_once([*itself(__file__), "--write", name, "--layers", str(args.layers), "--width", str(args.width)])
        figures = figures_of(run_in_turn(commands(Path(name)), args.rounds, args.threads))
        for peer, folders in (("ours", ("qwen", "clip", "weights")), ("llava", ("llava",))):
            files = [file for folder in folders for file in (Path(name) / folder).glob("*.safetensors")]
            figures[peer]["files"] = sum(file.stat().st_size for file in files)
    print(show(figures))
    panels = {
        unit: {
            label: {peer: figures[f"{peer}{less}"][key] / by for peer in PEERS}
            for label, less in (("all", ""), ("less the imports", ", less imports"))
        }
        for unit, key, by in (("seconds to the first token", "seconds", 1.0), ("peak memory, GB", "peak_bytes", GB))
    }
    settings = {"layers": args.layers, "width": args.width, "rounds": args.rounds}
    results = {"settings": settings, "medians": figures}
    publish(args.output, "load", results, "From the command to the first token", panels)


if __name__ == "__main__":
    main()
