"""PEFT's LoRA layer with its forward and backward pass written as the few products they consist of.

PEFT computes `base(x) + B(A(dropout(x))) * scale`: beside the products, two passes over the output, one more in the
backward pass, and under autocast copies of the input in fp32 and back. Here the update is added by the product itself.
Names, weights and files are PEFT's own.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn


class LeanLoraLinear(LoraLinear):
    """A LoRA layer of PEFT; what is out of the ordinary (merged, switched off, several adapters) is left to PEFT."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map (..., K) to (..., N)."""
        adapters = self.active_adapters
        name = adapters[0] if len(adapters) == 1 else ""
        plain = name in self.lora_A and not (args or kwargs or self.disable_adapters or self.merged)
        if not plain or name in self.lora_variant:
            return super().forward(x, *args, **kwargs)
        base, first, second = self.get_base_layer(), self.lora_A[name], self.lora_B[name]
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        else:
            dtype = x.dtype
            if not dtype == base.weight.dtype == first.weight.dtype:
                return super().forward(x)
        if first.bias is not None or second.bias is not None or base.weight.requires_grad:
            return super().forward(x)
        x = x.to(dtype)
        return _LoraProduct.apply(
            x, self.lora_dropout[name](x), base.weight, base.bias, first.weight, second.weight, self.scaling[name]
        )


def make_lean(model: nn.Module) -> None:
    """Turn PEFT's LoRA layers into lean ones, in place.

    Raises:
        ValueError: if one is over anything but a plain linear layer.
    """
    for name, module in model.named_modules():
        if type(module) is LoraLinear and type(module.get_base_layer()) is nn.Linear:
            module.__class__ = LeanLoraLinear
        elif isinstance(module, LoraLayer) and not isinstance(module, LeanLoraLinear):
            kind = type(module.get_base_layer()).__name__
            raise ValueError(f"{name} is of class {kind}; LoRA is for linear layers: leave it out of target_modules")


@torch.no_grad()
def merge_lean(model: nn.Module) -> None:
    """Add the update of every lean layer to its base weight, in place; computed in fp32 and rounded once."""
    for module in model.modules():
        if isinstance(module, LeanLoraLinear):
            name = module.active_adapters[0]
            layers: tuple[Any, ...] = (module.get_base_layer(), module.lora_A[name], module.lora_B[name])
            weight, first, second = (layer.weight for layer in layers)
            weight.copy_(weight.float().addmm_(second.float(), first.float(), alpha=module.scaling[name]))


class _LoraProduct(torch.autograd.Function):
    """x @ W.T + bias + scale · dropped @ A.T @ B.T, with gradients of x, dropped, A and B.

    Shapes: x and dropped (..., K), which may be the same tensor; W (N, K); bias (N,) or None; A (R, K); B (N, R). x and
    dropped have the dtype that is computed in; the others are brought to it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        first: Tensor,
        second: Tensor,
        scale: float,
    ) -> Tensor:
        dtype = x.dtype
        with torch.autocast(x.device.type, enabled=False):
            bias = bias if bias is None else bias.to(dtype)
            out = nn.functional.linear(x, weight.to(dtype), bias)
            inner = dropped.flatten(0, -2) @ first.to(dtype).t()
            out.view(-1, out.shape[-1]).addmm_(inner, second.to(dtype).t(), alpha=scale)
        ctx.scale, ctx.shape, ctx.same = scale, x.shape, dropped is x
        ctx.save_for_backward(dropped, inner, weight, first, second)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        dropped, inner, weight, first, second = ctx.saved_tensors
        dtype = dropped.dtype
        with torch.autocast(gradient.device.type, enabled=False):
            gradient = gradient.to(dtype).flatten(0, -2)
            by_inner = (gradient @ second.to(dtype)).mul_(ctx.scale)
            by_second = (gradient.t() @ inner).to(second.dtype).mul_(ctx.scale)
            by_first = (by_inner.t() @ dropped.flatten(0, -2)).to(first.dtype)
            by_x = by_dropped = None
            if ctx.needs_input_grad[0]:  # not where nothing below is trained: the first layer of a batch of texts
                by_x = gradient @ weight.to(dtype)
                if ctx.same:
                    by_x.addmm_(by_inner, first.to(dtype))
                else:
                    by_dropped = (by_inner @ first.to(dtype)).view(ctx.shape)
                by_x = by_x.view(ctx.shape)
        return by_x, by_dropped, None, None, by_first, by_second, None
