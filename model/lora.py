"""LoRA on the language model, by PEFT (https://arxiv.org/abs/2106.09685): W becomes W + (alpha / R) · B A.

Shape legend: K inputs of a linear layer, N outputs, R LoRA's rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

_LINEAR = ("Linear", "Linear4bit", "Linear8bitLt")
"""Classes of linear layers: PyTorch's, and bitsandbytes' of a quantised model. PEFT's over these have their names."""


class LoraTargetError(ValueError):
    """Names of target modules that the language model does not have."""


@dataclass(frozen=True)
class LoraSettings:
    """Rank, scale, dropout and places of fresh LoRA layers."""

    rank: int = 128
    """Rank R of the update: A is (R, K), B is (N, R)."""
    alpha: int = 32
    """The update is scaled by alpha / R."""
    dropout: float = 0.1
    """Dropout before the update, 0 to 1."""
    target_modules: tuple[str, ...] | None = ("c_attn", "w1", "w2")
    """Last parts of the names of the linear layers that get an update; None: those of `default_targets`."""

    @classmethod
    def parse_targets(cls, text: str) -> tuple[str, ...]:
        """Split `c_attn|w1|w2` at the bars."""
        return tuple(name.strip() for name in text.split("|") if name.strip())


def add_lora(language_model: PreTrainedModel, settings: LoraSettings) -> PeftModel:
    """Wrap the language model with freshly initialised LoRA layers; they are fp32, whatever the base is.

    Raises:
        ValueError: if it has such layers already.
        LoraTargetError: if a target name matches no linear layer of the model; the message lists what exists.
    """
    if isinstance(language_model, PeftModel):
        raise ValueError("the language model has LoRA layers already; train or merge those")
    targets = settings.target_modules
    if targets is None:
        targets = default_targets(language_model)
    check_targets(language_model, targets)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(targets),
        task_type="CAUSAL_LM",
        bias="none",
    )
    wrapped = get_peft_model(language_model, config)
    make_lean(wrapped)
    return wrapped


def merge_lora(language_model: PeftModel) -> Any:
    """Add every LoRA update to its base weight, computed in fp32 and rounded once; return the base model alone."""
    base: Any = language_model.get_base_model()
    layers = [module for module in base.modules() if isinstance(module, LoraLayer)]
    if getattr(base, "is_quantized", False):
        from .scaling.quantised import dequantise

        dequantise(layers, base.get_input_embeddings().weight.dtype)
    for layer in layers:
        merge_layer(layer, base)
    return language_model.unload()


@torch.no_grad()
def merge_layer(layer: Any, base: Any) -> None:
    """Add a LoRA layer's update to its base weight, in place; `base` is the language model that it belongs to."""
    embedding = base.get_input_embeddings()
    if layer.get_base_layer().weight is embedding.weight:
        # A tied language head: the update is the head's alone, and the embedding keeps the old weights.
        layer.get_base_layer().weight = nn.Parameter(embedding.weight.clone(), requires_grad=False)
        base.config.tie_word_embeddings = False
    name = layer.active_adapters[0]
    W, A, B = layer.get_base_layer().weight, layer.lora_A[name].weight, layer.lora_B[name].weight
    W.copy_(W.float().addmm_(B.float(), A.float(), alpha=layer.scaling[name]))  # (N, K) + (N, R) (R, K)


def default_targets(language_model: PreTrainedModel) -> tuple[str, ...]:
    """Return the names of the layers that get LoRA unless told otherwise: all of attention and MLP; fewer in QWen."""
    if language_model.config.model_type == "qwen":
        return "c_attn", "w1", "w2"
    head = language_model.get_output_embeddings()
    layers = [
        name
        for name, module in language_model.named_modules()
        if type(module).__name__ in _LINEAR and module is not head
    ]
    return tuple(sorted({name.rsplit(".", 1)[-1] for name in layers}))


def check_targets(language_model: nn.Module, targets: tuple[str, ...]) -> None:
    """Raise LoraTargetError unless every target name is that of linear layers."""
    names = [name for name, module in language_model.named_modules() if isinstance(module, nn.Linear)]
    unmatched = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in names)]
    if not any("." in name for name in names):  # at most the language head
        raise LoraTargetError(
            f"--base_language_model: the blocks of {type(language_model).__name__} have no layers of type nn.Linear "
            "(GPT-2 has its own), and LoRA goes on those alone; give another language model, or --train_only"
        )
    if unmatched or not targets:
        existing = dict.fromkeys(name.rsplit(".", 1)[-1] for name in names)
        raise LoraTargetError(
            f"--target_modules {'|'.join(targets)!r}: no linear layer is called {', '.join(unmatched) or '(empty)'}; "
            f"the language model has {', '.join(existing)}. Separate names with '|'."
        )


# ---- The layer itself, faster than PEFT's


class _Lean:
    """PEFT's LoRA layer, with forward and backward pass written as the few products they are.

    PEFT computes `base(x) + B(A(dropout(x))) * scale`, with two more passes over the output and, under autocast, copies
    of the input in fp32. Here the product itself adds the update. A layer that is merged, disabled, or in two dtypes
    without autocast, and a quantised one's answers, are left to PEFT; names, weights and files are PEFT's own.
    """

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map (..., K) to (..., N)."""
        name, base = self.active_adapters[0], self.get_base_layer()
        W, A, B = base.weight, self.lora_A[name].weight, self.lora_B[name].weight
        left_to_peft = args or kwargs or self.disable_adapters or self.merged
        if type(base) is not nn.Linear:
            from .scaling.quantised import Dequantised

            W, left_to_peft = Dequantised(base), left_to_peft or not torch.is_grad_enabled()
        autocast = torch.is_autocast_enabled(x.device.type)
        if left_to_peft or not (autocast or x.dtype == W.dtype == A.dtype):
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        if autocast:
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return _LoraProduct.apply(x, self.lora_dropout[name](x), W, base.bias, A, B, self.scaling[name])


class LeanLoraLinear(_Lean, LoraLinear):
    """The lean layer over a plain linear one."""


def make_lean(model: nn.Module) -> None:
    """Turn PEFT's LoRA layers into lean ones, in place; raise ValueError if one is over anything but a linear layer."""
    for name, module in model.named_modules():
        if type(module) is LoraLinear and type(module.get_base_layer()).__name__ in _LINEAR:
            module.__class__ = LeanLoraLinear
        elif isinstance(module, LoraLayer) and type(module).__name__ in _LINEAR[1:]:
            module.__class__ = type(f"Lean{type(module).__name__}", (_Lean, type(module)), {})
        elif isinstance(module, LoraLayer) and not isinstance(module, _Lean):
            kind = type(module.get_base_layer()).__name__
            raise ValueError(f"{name} is of class {kind}; LoRA is for linear layers: leave it out of target_modules")


class _LoraProduct(torch.autograd.Function):
    """Compute x @ W.T + bias + scale · dropped @ A.T @ B.T, with gradients of x, dropped, A and B.

    Shapes: x and dropped (..., K), which may be the same tensor; W (N, K); bias (N,) or None; A (R, K); B (N, R).
    Computes in the dtype of x and dropped, to which the others are cast; all that is used of W is `to(dtype)`.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dropped: Tensor, W: Any, bias: Tensor | None, A: Tensor, B: Tensor, scale: float
    ) -> Tensor:
        dtype = x.dtype
        with torch.autocast(x.device.type, enabled=False):
            bias = bias if bias is None else bias.to(dtype)
            out = nn.functional.linear(x, W.to(dtype), bias)  # (..., N)
            inner = dropped.flatten(0, -2) @ A.to(dtype).t()  # (rows, R)
            out.view(-1, out.shape[-1]).addmm_(inner, B.to(dtype).t(), alpha=scale)
        ctx.scale, ctx.shape, ctx.same = scale, x.shape, dropped is x
        ctx.quantised = None if isinstance(W, Tensor) else W
        ctx.save_for_backward(dropped, inner, W if isinstance(W, Tensor) else None, A, B)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        dropped, inner, W, A, B = ctx.saved_tensors
        dtype = dropped.dtype
        with torch.autocast(grad_out.device.type, enabled=False):
            grad_out = grad_out.to(dtype).flatten(0, -2)  # (rows, N)
            grad_inner = (grad_out @ B.to(dtype)).mul_(ctx.scale)  # (rows, R)
            grad_B = (grad_out.t() @ inner).to(B.dtype).mul_(ctx.scale)  # (N, R)
            grad_A = (grad_inner.t() @ dropped.flatten(0, -2)).to(A.dtype)  # (R, K)
            grad_x = grad_dropped = None
            if ctx.needs_input_grad[0]:  # not in the first layer of a batch without images: nothing below is trained
                grad_x = grad_out @ (ctx.quantised if W is None else W).to(dtype)  # (rows, K)
                if ctx.same:
                    grad_x.addmm_(grad_inner, A.to(dtype))
                else:
                    grad_dropped = (grad_inner @ A.to(dtype)).view(ctx.shape)
                grad_x = grad_x.view(ctx.shape)
        return grad_x, grad_dropped, None, None, grad_A, grad_B, None
