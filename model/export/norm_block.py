"""SigLIP's last norm as one more block of the tower; `llava.py` writes it, and `from_llava.py` recognises it.

Shape legend: D width of the tower, I inner width of its MLP.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_SCALE = 2.0**40
"""By this the extra block's output outweighs what it is added to; a power of two, so that nothing is rounded."""


def norm_block(weight: Tensor, bias: Tensor, inner: int) -> dict[str, Tensor]:
    """Return a SigLIP block that gives c · LayerNorm(x), for a layer norm and c = `BLOCK_SCALE`.

    Its attention is zero. Its MLP computes c · (f(z) - f(-z)) = c · z of the normalised z, whatever GELU f is. What the
    block adds this to is smaller by 2^40 and vanishes below rounding; the projector's first layer divides by c.

    Args:
        weight: (D,) of the layer norm.
        bias: (D,) likewise.
        inner: I, at least 2 · D.
    """
    width = len(weight)
    unit, rest = torch.eye(width).to(weight), inner - 2 * width
    block = {"layer_norm2.weight": weight, "layer_norm2.bias": bias}
    block |= {"layer_norm1.weight": torch.ones_like(weight), "layer_norm1.bias": torch.zeros_like(bias)}
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        block |= {f"self_attn.{name}.weight": weight.new_zeros(width, width)}
        block |= {f"self_attn.{name}.bias": torch.zeros_like(bias)}
    first = torch.cat((unit, -unit, unit.new_zeros(rest, width)))  # (I, D)
    block |= {"mlp.fc1.weight": first, "mlp.fc1.bias": unit.new_zeros(inner)}
    return block | {"mlp.fc2.weight": BLOCK_SCALE * first.T, "mlp.fc2.bias": torch.zeros_like(bias)}
