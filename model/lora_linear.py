"""An optional optimisation: PEFT's LoRA layer with forward and backward pass written as the few products they are.

PEFT computes `base(x) + B(A(dropout(x))) * scale`. Next to the products that takes two passes over the output, one
more in the backward pass, and under autocast copies of the input in fp32 and back. Here the product itself adds the
update. Names, weights and files are PEFT's own, and without `make_lean` everything works the same, only slower.

Shape legend: K inputs, N outputs, R LoRA's rank.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn


class LeanLoraLinear(LoraLinear):
    """A LoRA layer of PEFT; whatever is unusual (merged, disabled, several adapters) is left to PEFT."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map (..., K) to (..., N)."""
        adapters = self.active_adapters
        name = adapters[0] if len(adapters) == 1 else ""
        plain = name in self.lora_A and not (args or kwargs or self.disable_adapters or self.merged)
        if not plain or name in self.lora_variant:
            return super().forward(x, *args, **kwargs)
        base, lora_A, lora_B = self.get_base_layer(), self.lora_A[name], self.lora_B[name]
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        else:
            dtype = x.dtype
            if not dtype == base.weight.dtype == lora_A.weight.dtype:
                return super().forward(x)
        if lora_A.bias is not None or lora_B.bias is not None or base.weight.requires_grad:
            return super().forward(x)
        x = x.to(dtype)
        dropped = self.lora_dropout[name](x)
        return _LoraProduct.apply(x, dropped, base.weight, base.bias, lora_A.weight, lora_B.weight, self.scaling[name])


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


class _LoraProduct(torch.autograd.Function):
    """Compute x @ W.T + bias + scale · dropped @ A.T @ B.T, with gradients of x, dropped, A and B.

    Shapes: x and dropped (..., K), which may be the same tensor; W (N, K); bias (N,) or None; A (R, K); B (N, R).
    Computes in the dtype of x and dropped, to which the others are cast.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dropped: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float
    ) -> Tensor:
        dtype = x.dtype
        with torch.autocast(x.device.type, enabled=False):
            bias = bias if bias is None else bias.to(dtype)
            out = nn.functional.linear(x, W.to(dtype), bias)  # (..., N)
            inner = dropped.flatten(0, -2) @ A.to(dtype).t()  # (rows, R)
            out.view(-1, out.shape[-1]).addmm_(inner, B.to(dtype).t(), alpha=scale)
        ctx.scale, ctx.shape, ctx.same = scale, x.shape, dropped is x
        ctx.save_for_backward(dropped, inner, W, A, B)
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
                grad_x = grad_out @ W.to(dtype)  # (rows, K)
                if ctx.same:
                    grad_x.addmm_(grad_inner, A.to(dtype))
                else:
                    grad_dropped = (grad_inner @ A.to(dtype)).view(ctx.shape)
                grad_x = grad_x.view(ctx.shape)
        return grad_x, grad_dropped, None, None, grad_A, grad_B, None
