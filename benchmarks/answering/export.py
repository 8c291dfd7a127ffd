"""Time and memory of export.py at the true size: the shapes of Qwen-7B-Chat and CLIP-L, and LoRA of rank 128.

    python -m benchmarks.answering.export --folder FOLDER [--scale 1.0] [--layers N] [--output OUTPUT]

Random bf16 weights of these shapes are written shard by shard, 17 GB in all, and the export is as large again. Then
`export.py --no_verify` runs, and its resident and anonymous memory are read four times a second. The difference is
pages of the weights' files, which the system may drop and read again.
Prints a table; writes export.json and export.png into the output folder. What was written is kept until the folder is
deleted.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..measure import ROOT, itself, parser
from ..training.full_size import report, shapes, watch

SHARD_BYTES = 2_000_000_000
_LORA_STD = 0.01


def write_inputs(folder: Path, scale: float, layers: int | None, rank: int) -> None:
    """Write both base models, and a checkpoint over them."""
    from ..random_weights import clip_config, qwen_config, write_language_model, write_tower  # imports torch

    sizes = shapes(scale)
    if layers is not None:
        sizes["qwen"]["layers"] = layers
    write_language_model(folder / "qwen", qwen_config(**sizes["qwen"]), shard_bytes=SHARD_BYTES)
    write_tower(folder / "clip", clip_config(**sizes["clip"]), shard_bytes=SHARD_BYTES)
    write_checkpoint(folder, rank)


def write_checkpoint(folder: Path, rank: int) -> None:
    """Write random LoRA and a random projector for the base models in this folder, whose weights are not read."""
    import torch
    from peft import LoraConfig, get_peft_model

    from model.checkpoints.base_models import read_language_config
    from model.checkpoints.readers import MultimodalConfig
    from model.checkpoints.saving import PACKAGE_VERSIONS, save_checkpoint
    from model.projector import build_projector
    from qwen import MultimodalQWenLMHeadModel
    from visual import read_tower_shape

    language, vision = str(folder / "qwen"), str(folder / "clip")
    config, tower = read_language_config(language), read_tower_shape(vision)
    with torch.device("meta"):
        model = MultimodalQWenLMHeadModel(config)
    lora = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=32, target_modules=["c_attn", "w1", "w2"])
    wrapped = get_peft_model(model, lora, low_cpu_mem_usage=True)
    names = [name for name, _ in wrapped.named_parameters() if "lora_" in name]
    values = {name: _LORA_STD * torch.randn(wrapped.get_parameter(name).shape) for name in names}
    wrapped.load_state_dict(values, strict=False, assign=True)
    note = MultimodalConfig(
        base_language_model=language,
        base_value_model=vision,
        vision_tower=tower.kind,
        num_image_tokens=tower.num_image_tokens,
        vision_hidden_size=tower.hidden_size,
        language_hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        projector_layers=2,
        vision_tower_fingerprint="",
        language_model_fingerprint="",
        drop_first_patch=False,
        dtype="bfloat16",
        package_versions=PACKAGE_VERSIONS,
    )
    save_checkpoint(folder / "weights", wrapped, build_projector(tower.hidden_size, config.hidden_size), note)


def main() -> int:
    """Write, export, and print what it took; returns the exit status."""
    parse = parser(__doc__)
    parse.add_argument("--folder", type=Path, required=True, help="where everything is written; 34 GB at full size")
    parse.add_argument("--scale", type=float, default=1.0, help="share of width and layers; 1 is the true size")
    parse.add_argument("--layers", type=int, help="layers of the language model, whatever the scale")
    parse.add_argument("--lora_rank", type=int, default=128)
    parse.add_argument("--least_free", type=float, default=1.0, help="GB that must stay available on the machine")
    parse.add_argument("--write_only", action="store_true", help=argparse.SUPPRESS)
    given = parse.parse_args()
    folder = given.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if given.write_only:
        write_inputs(folder, given.scale, given.layers, given.lora_rank)
        return 0
    flags = ["--model_weights", str(folder / "weights"), "--output", str(folder / "llava"), "--no_verify"]
    steps = {
        "writing the weights": [*itself(__file__), "--write_only", *sys.argv[1:]],
        "export.py": [sys.executable, str(ROOT / "export.py"), *flags],
    }
    found = {}
    for name, command in steps.items():
        log = folder / f"{name.replace(' ', '_')}.log"
        found[name] = watch(command, log, int(given.least_free * 1e9))
        if found[name].status:
            print(log.read_text(encoding="utf-8", errors="replace")[-2000:], file=sys.stderr)
            break
    return report(found, given, "export", "An export at the true size")


if __name__ == "__main__":
    sys.exit(main())
