"""Seconds and peak memory from the command to the first token, beside transformers' LLaVA of the same size.

    python -m benchmarks.answering.load
    python -m benchmarks.answering.load --layers 12 --width 1024 --rounds 3

Checkpoints with random weights are written in the published formats (QWen in shards, CLIP, and LoRA with projector for
ours; LLaVA's own for the peer), in bf16. Then `test.py` answers with one token, and a script of the peer does, in turn,
each in a process of its own. Memory is what was resident at the peak, and the same less what the imports alone take in
the same round.
Prints a table of medians; writes load.json and load.png into the output folder.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import measure
from ..vocabulary import vocabulary_file

ROOT = Path(__file__).resolve().parents[2]
GB = 1e9
QUESTION = "What is in the picture?"

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


def write_ours(size: Any, folder: Path, vocabulary: Path) -> None:
    """Write QWen and CLIP in bf16, in the published formats, and a checkpoint over them."""
    import torch

    from model import LoraSettings, VisionLanguageModel
    from qwen import QWenLMHeadModel

    from ..peers import save_tower

    torch.manual_seed(0)
    with torch.device("meta"):
        qwen = QWenLMHeadModel(size.qwen)
    qwen = qwen.to(torch.bfloat16).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in qwen.parameters():
            parameter.normal_(0, 0.02)
    qwen.save_pretrained(str(folder / "qwen"), max_shard_size="500MB")
    shutil.copy(vocabulary, folder / "qwen/qwen.tiktoken")
    settings = {"chat_format": "chatml", "eos_token_id": 151643, "pad_token_id": 151643, "max_window_size": 6144}
    (folder / "qwen/generation_config.json").write_text(json.dumps(settings))
    save_tower(size, folder / "clip", torch.bfloat16)
    del qwen
    model = VisionLanguageModel.from_pretrained(
        str(folder / "qwen"), str(folder / "clip"), dtype=torch.bfloat16, device="cpu", trainable=True
    )
    model.add_lora(LoraSettings())
    model.save_checkpoint(folder / "weights")


def write_llava(size: Any, folder: Path) -> None:
    """Write the peer, its own image processor beside it."""
    import torch
    from transformers import CLIPImageProcessorPil, LlavaForConditionalGeneration

    from ..peers import llava_config

    with torch.device("meta"):
        llava = LlavaForConditionalGeneration(llava_config(size))
    llava = llava.to(torch.bfloat16).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in llava.parameters():
            parameter.normal_(0, 0.02)
        for buffer in llava.buffers():  # positions and frequencies, which a published checkpoint does not hold
            buffer.zero_()
    llava.save_pretrained(str(folder / "llava"), max_shard_size="500MB")
    CLIPImageProcessorPil.from_pretrained(str(folder / "clip")).save_pretrained(str(folder / "llava"))


def prompt_of(size: Any, folder: Path) -> list[int]:
    """The token ids that test.py makes of the question."""
    from dataset.prompt import with_placeholders
    from model.asking.prompt_window import fit_prompt
    from model.language_model import load_tokenizer

    return fit_prompt(load_tokenizer(str(folder / "qwen")), with_placeholders(QUESTION, 1), size.num_image_tokens)


def write(size: Any, folder: Path, vocabulary: Path) -> None:
    """Write everything; in a process of its own, whose memory then is gone."""
    write_ours(size, folder, vocabulary)
    write_llava(size, folder)
    (folder / "prompt.json").write_text(json.dumps(prompt_of(size, folder)))


def commands(folder: Path) -> dict[str, list[str]]:
    """What is measured: both peers, and what each imports."""
    picture = str(ROOT / "test_img/1.jpg")
    ask = ["--image_path", picture, "--prompt", QUESTION, "--greedy", "--max_new_tokens", "1", "--dtype", "bfloat16"]
    ours = [str(ROOT / "test.py"), "--model_weights", str(folder / "weights"), "--device", "cpu", *ask]
    return {
        "ours": [sys.executable, *ours],
        "llava": [sys.executable, "-c", LLAVA, str(folder / "llava"), picture, (folder / "prompt.json").read_text()],
        "ours, imports": [sys.executable, "-c", OUR_IMPORTS],
        "llava, imports": [sys.executable, "-c", LLAVA],
    }


def weight_bytes(folder: Path, names: tuple[str, ...]) -> int:
    """What the files of weights in these folders hold."""
    return sum(file.stat().st_size for name in names for file in (folder / name).glob("*.safetensors"))


def figures_of(runs: Mapping[str, Sequence[measure.Run]]) -> dict[str, dict[str, float]]:
    """Medians of each peer, of its imports, and of what it takes less those: the difference is taken in each round."""
    figures = {name: measure.medians(done) for name, done in runs.items()}
    for peer in ("ours", "llava"):
        rounds = zip(runs[peer], runs[f"{peer}, imports"], strict=True)
        figures[f"{peer}, less imports"] = measure.medians([whole.less(imports) for whole, imports in rounds])
    return figures


def show(figures: dict[str, dict[str, float]]) -> str:
    """The table; a ratio above 1 means that ours is faster, or smaller."""
    rows = []
    for label, name, unit in (
        ("seconds", "seconds", 1.0),
        ("processor seconds", "cpu_seconds", 1.0),
        ("peak, GB", "peak_bytes", GB),
    ):
        for less in ("", ", less imports"):
            ours, llava = (figures[f"{peer}{less}"][name] / unit for peer in ("ours", "llava"))
            what = f"{label}, less the imports" if less else label
            rows.append([what, f"{ours:.2f}", f"{llava:.2f}", f"{llava / ours:.2f}x"])
    for peer, files in (("ours", figures["ours"]["files"]), ("llava", figures["llava"]["files"])):
        rows.append([f"files of weights, GB, {peer}", f"{files / GB:.2f}", "", ""])
    return measure.text_table(("to the first token", "ours", "LLaVA", "ratio"), rows)


def main() -> None:
    """Write the checkpoints, measure, and show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--layers", type=int, default=12, help="blocks of the language model (%(default)s)")
    add("--width", type=int, default=1024, help="its channels (%(default)s)")
    add("--rounds", type=int, default=3, help="processes of each peer (%(default)s)")
    add("--vocabulary", type=Path, help="qwen.tiktoken; default: that of the package dashscope")
    add("--output", type=Path, default=measure.RESULTS, help="folder for JSON and PNG (%(default)s)")
    add("--write", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.write:
        from ..peers import Size

        heads = max(1, args.width // 64)
        towers = {"tower_layers": 12, "tower_width": 768} if args.width > 512 else {}
        size = Size(layers=args.layers, width=args.width, inner=args.width * 43 // 16, heads=heads, **towers)
        write(size, args.write, args.vocabulary)
        return
    vocabulary = args.vocabulary or vocabulary_file()
    with tempfile.TemporaryDirectory() as name:
        sizes = ["--layers", str(args.layers), "--width", str(args.width), "--vocabulary", str(vocabulary)]
        measure.run_once([*measure.itself(__file__), "--write", name, *sizes])
        runs = measure.run_in_turn(commands(Path(name)), args.rounds)
        figures = figures_of(runs)
        figures["ours"]["files"] = weight_bytes(Path(name), ("qwen", "clip", "weights"))
        figures["llava"]["files"] = weight_bytes(Path(name), ("llava",))
    print(show(figures))
    settings = {"layers": args.layers, "width": args.width, "rounds": args.rounds}
    results = {"machine": measure.machine(), "settings": settings, "medians": figures}
    measure.write_results(args.output / "load.json", results)
    panels = {
        unit: {
            label: {peer: figures[f"{peer}{less}"][key] / by for peer in ("ours", "llava")}
            for label, less in (("all", ""), ("less the imports", ", less imports"))
        }
        for unit, key, by in (("seconds to the first token", "seconds", 1.0), ("peak memory, GB", "peak_bytes", GB))
    }
    measure.draw_bars(args.output / "load.png", "From the command to the first token", panels)


if __name__ == "__main__":
    main()
