r"""Give a DINOv2 features of mean 0 and variance 1, by its last LayerNorm alone.

    python -m benchmarks.real_parts.standardise --tower demo_real_output/dinov2 \
        --annotations demo_real_output/annotations --output demo_real_output/tower

A few channels of this tower are many times as large as the others, and a freshly initialised projector would see little
else for hundreds of steps. The statistics are those of the training pictures. (x - mean) / std of what a LayerNorm
gives is again a LayerNorm, of weight / std and (bias - mean) / std: nothing else changes, and no information is lost.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dataset import load_image
from visual import VisionTower, build_vision_tower

from ..easy_vqa.fitting import written_whole

BATCH = 32


def features_of(tower: VisionTower, files: list[Path]) -> Tensor:
    """Return the features (N, P, D) of all patches of pictures."""
    parts = []
    for start in range(0, len(files), BATCH):
        pixels = torch.stack([tower.image_transform(load_image(file)) for file in files[start : start + BATCH]])
        parts.append(tower(pixels))  # (BATCH, P, D)
    return torch.cat(parts)


def folded(weight: Tensor, bias: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """Return weight and bias (D) of the LayerNorm whose features have mean 0 and variance 1 in every channel."""
    flat = features.flatten(0, -2)  # (N · P, D)
    mean, std = flat.mean(0), flat.std(0).clamp(min=1e-6)
    return weight / std, (bias - mean) / std


def standardise(source: Path, files: list[Path], folder: Path) -> None:
    """Write the tower of one folder to another, with standardised features."""
    features = features_of(build_vision_tower(str(source)), files)
    shutil.copytree(source, folder, dirs_exist_ok=True)
    weights = load_file(source / "model.safetensors")
    weights["layernorm.weight"], weights["layernorm.bias"] = folded(
        weights["layernorm.weight"], weights["layernorm.bias"], features
    )
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    """Write the standardised tower."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tower", type=Path, required=True, help="folder of a DINOv2")
    parser.add_argument("--annotations", type=Path, required=True, help="folder that prepare_data.py wrote")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    args = parser.parse_args()
    shown = json.loads((args.annotations / "pictures.json").read_text(encoding="utf-8"))
    files = [args.annotations / "pictures" / picture["file"] for picture in shown["training"]]
    with written_whole(args.output) as folder:
        standardise(args.tower, files, folder)


if __name__ == "__main__":
    main()
