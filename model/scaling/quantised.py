"""A frozen language model whose linear layers take 4 or 8 bits a weight, by bitsandbytes.

4 bits, as QLoRA has it (https://arxiv.org/abs/2305.14314): 64 weights share a scale and are rounded to the 16 values of
NF4; the scales themselves take 8 bits each (double quantisation). A layer computes with W', its dequantised weights.
8 bits are LLM.int8() (https://arxiv.org/abs/2208.07339): a scale for each row, and inputs in 8 bits too, but for
outliers; training on the CPU leaves the inputs whole. Embedding, language head, tower, projector and LoRA stay whole.

Nothing of it is in a checkpoint: LoRA and projector fit the plain base model as well as a quantised one.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_bnb_weight
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

logger = logging.getLogger(__name__)

BLOCK = 64
"""Weights that share a scale in 4 bits."""
_SCALES = 256
"""Scales that share one of their own."""
_TABLES = 4 * (16 + 256 + 1)
"""Bytes of a layer's tables: the values of NF4 and of the scales, and the scales' mean."""


def check_quantised(kind: str, device: torch.device) -> None:
    """Check that this machine can quantise to `kind`: 4bit or 8bit.

    Raises:
        ValueError: if bitsandbytes is missing, or does not run on the device.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of each product's dtype
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"--load_in_{kind} needs bitsandbytes ({error}): pip install -r quantised-requirements.txt"
        ) from error
    if device.type not in ("cuda", "cpu"):
        raise ValueError(
            f"--load_in_{kind}: quantised weights are for CUDA GPUs and the CPU, not for {device.type}; choose one of "
            "them, or leave the flag out"
        )


def check_training_flags(model_args: Any, args: Any) -> None:
    """Check the flags of a run over a quantised language model, given the arguments of train.py.

    Raises:
        ValueError: if it can't be quantised, or would be trained itself.
    """
    if model_args.load_in_4bit and model_args.load_in_8bit:
        raise ValueError("--load_in_4bit and --load_in_8bit: weights take one of both; leave one out")
    if args.shard_model and model_args.load_in_8bit:
        raise ValueError(
            "--shard_model and --load_in_8bit: bitsandbytes' 8-bit layers can't run on weights gathered from shares; "
            "give --load_in_4bit, or leave one of them out"
        )
    if model_args.train_only == "all":
        raise ValueError(
            f"--train_only all trains the language model, and --load_in_{model_args.quantisation} freezes it in a few "
            "bits; leave one of them out"
        )
    if args.torch_compile and model_args.load_in_4bit:
        raise ValueError(
            "--torch_compile and --load_in_4bit: bitsandbytes' weights of 4 bits call themselves without end in a "
            "compiled graph; give --load_in_8bit, or leave one of them out"
        )
    check_quantised(model_args.quantisation, args.device)


def quantised_loader(kind: str, device: torch.device | None) -> Callable[[Any], Callable[..., Any]]:
    """Return what makes of a model class a `from_pretrained` that quantises every weight as soon as it is read.

    Layers compute in the `dtype` that it is called with, which all that stays whole has.

    Args:
        kind: 4bit or 8bit.
        device: where the weights go; None: the CPU.

    Raises:
        ValueError: as `check_quantised`; when it is called, as `check_blocks`.
    """
    device = device or torch.device("cpu")
    check_quantised(kind, device)
    return lambda model_class: partial(_load, model_class, kind, device)


def _load(model_class: Any, kind: str, device: torch.device, name: str, dtype: torch.dtype, **options: Any) -> Any:
    options |= {"dtype": dtype, "quantization_config": _how(kind, dtype), "device_map": {"": device}}
    loaded = model_class.from_pretrained(name, **options)
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    layers = linear_layers(model)
    check_blocks(kind, layers)
    quantised = {id(layer.weight) for layer in layers.values()}
    for parameter in model.parameters():
        if device.type == "cpu" and id(parameter) not in quantised:
            parameter.data = parameter.data.clone()  # or it would keep its whole file mapped, with what was quantised
    for layer in layers.values():
        # bitsandbytes' own kernel for CPUs with AVX512-BF16 repacks the weights in `eval()`. It rounds to bf16, and has
        # no gradient: training after an evaluation would fail.
        layer.support_avx512bf16_for_cpu = False
    _tell(kind, layers)
    return loaded


def _tell(kind: str, layers: dict[str, Any]) -> None:
    number, size = quantised_size(kind, layers.values())
    logger.info("language model: %s weights in %s, %.2f GB; the others whole", f"{number:,}", kind, size / 1e9)


def _how(kind: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    in_4_bits = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
    return BitsAndBytesConfig(**{f"load_in_{kind}": True}, **(in_4_bits if kind == "4bit" else {}))


def linear_layers(language_model: Any) -> dict[str, Any]:
    """Return the layers that are quantised, or will be, by their names: all linear ones but the language head."""
    head = language_model.get_output_embeddings()
    modules = language_model.named_modules()
    return {name: module for name, module in modules if isinstance(module, nn.Linear) and module is not head}


def check_blocks(kind: str, layers: dict[str, Any]) -> None:
    """Refuse layers that bitsandbytes takes, and computes something else with: 4 bits of rows that share a block."""
    for name, layer in layers.items():
        if kind == "4bit" and layer.in_features % BLOCK:
            raise ValueError(
                f"--load_in_4bit: layer {name} has {layer.in_features} inputs, which must be a multiple of {BLOCK}; "
                "leave --load_in_4bit out, or give --load_in_8bit, which does not go with --shard_model"
            )


def quantised_shape(kind: str, language_model: nn.Module) -> dict[str, Any]:
    """Return what `ModelShape` says about a language model that will be quantised; it may be on the meta device.

    Raises:
        ValueError: as `check_blocks`.
    """
    layers = linear_layers(language_model)
    check_blocks(kind, layers)
    number, size = quantised_size(kind, layers.values())
    return {
        "quantised_parameters": number,
        "quantised_bytes": size,
        "dequantised_parameters": max(layer.in_features * layer.out_features for layer in layers.values()),
    }


def quantised_size(kind: str, layers: Iterable[Any]) -> tuple[int, int]:
    """Return the number of weights in these layers, and the bytes that they take quantised, scales and tables too."""
    number = size = 0
    for layer in layers:
        weights = layer.in_features * layer.out_features
        scales = math.ceil(weights / BLOCK)
        in_4_bits = math.ceil(weights / 2) + scales + 4 * math.ceil(scales / _SCALES) + _TABLES
        number += weights
        size += in_4_bits if kind == "4bit" else weights + 4 * layer.out_features
    return number, size


# ---- 4 bits split over processes, by `sharding.py`


def make_hollow_4bit(language_model: Any, dtype: torch.dtype) -> None:
    """Replace the layers of a hollow language model by hollow ones of 4 bits, in place; `pack` fills them.

    Raises:
        ValueError: as `check_blocks`.
    """
    from bitsandbytes.nn import Linear4bit

    layers = linear_layers(language_model)
    check_blocks("4bit", layers)
    for name, layer in layers.items():
        with torch.device("meta"):
            packed = Linear4bit(layer.in_features, layer.out_features, bias=False, compute_dtype=dtype)
        hollow = torch.zeros((), dtype=torch.uint8).expand(math.ceil(layer.weight.numel() / 2), 1)
        packed.weight, packed.bias = nn.Parameter(hollow, requires_grad=False), layer.bias
        packed.support_avx512bf16_for_cpu = False  # as in `_load`
        language_model.set_submodule(name, packed)
    language_model.config.quantization_config = _how("4bit", dtype)
    _tell("4bit", layers)


def is_4bit(layer: nn.Module) -> bool:
    """Return whether a layer takes 4 bits a weight."""
    return type(layer).__name__ == "Linear4bit"


def pack(layer: Any, weight: Tensor, device: torch.device) -> Tensor:
    """Return a layer's weight (N, K) in 4 bits, two in a byte: (N · K / 2, 1); the layer keeps its scales, whole."""
    from bitsandbytes.functional import quantize_4bit

    weight = weight.to(device, layer.compute_dtype)
    packed, layer.quant_state = quantize_4bit(weight, blocksize=BLOCK, compress_statistics=True, quant_type="nf4")
    return packed


# ---- LoRA over quantised layers


class Dequantised:
    """The weight of a quantised layer for LoRA's product, dequantised for the forward pass and again for the backward.

    PEFT's own layers copy their inputs in fp32 under autocast, and make four more tensors of the output's size. On the
    CPU, the holes that these left among what the backward pass needs took half as much memory again as that.
    """

    dtype = torch.float32  # that of LoRA: without autocast, all of a layer is computed in it

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def to(self, dtype: torch.dtype) -> Tensor:
        """Return W' (N, K)."""
        weight = self.layer.weight
        if is_4bit(self.layer):
            from bitsandbytes.functional import dequantize_4bit

            # The scales are the layer's: a weight gathered from its shares has none.
            return dequantize_4bit(weight.data, self.layer.quant_state).to(dtype)
        scales = self.layer.state.SCB if weight.SCB is None else weight.SCB  # moved at the first product of its own
        return weight.data.to(dtype).mul_(scales.unsqueeze(1) / 127)


def dequantise(layers: Iterable[LoraLayer], dtype: torch.dtype) -> None:
    """Replace the quantised layers under LoRA by plain ones of W', to which LoRA's update can be added."""
    for layer in layers:
        base: Any = layer.get_base_layer()
        weight = dequantize_bnb_weight(base.weight, state=getattr(base, "state", None)).to(dtype)
        with torch.device("meta"):
            whole = nn.Linear(base.in_features, base.out_features, bias=False)
        whole.weight = nn.Parameter(weight, requires_grad=False)
        whole.bias = base.bias
        layer.base_layer = whole
    logger.info("the layers with LoRA are whole again, in %s: their weights dequantised, and the update added", dtype)
