"""Compute in fp32 with a model whose weights don't fit into memory so: each block becomes fp32 when it runs, no longer.

Weights stay as loading mapped them from their files, which takes no memory while their dtype is that of the files.
"""

from __future__ import annotations

import copy
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import nn

from ..lora import merge_layer


class ComputedByBlock(nn.Module):
    """A block that runs as a copy of itself in fp32, with LoRA merged; `.float()` and `.parameters()` do not see it."""

    def __init__(self, block: nn.Module, base: nn.Module) -> None:
        super().__init__()
        self._hidden = (block, base)  # in a tuple, modules are not registered

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._hidden[0], name)  # some models ask a block for its kind of attention

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Do as the block does."""
        block, base = self._hidden
        block = copy.deepcopy(block)
        merge_in_place(block, base)
        return block.float()(*args, **kwargs)


def compute_by_block(base: Any) -> None:
    """Change a language model, in place, to compute in fp32 block by block; LoRA is merged, rounded to its dtype.

    Call `.float()` on the model that holds it afterwards: all but the blocks becomes fp32 at once.

    Args:
        base: of transformers, or QWen, in `eval()`; with LoRA layers or without.
    """
    names = [name for name, part in base.named_modules() if type(part).__name__ in base._no_split_modules]
    for name in names:
        base.set_submodule(name, ComputedByBlock(base.get_submodule(name), base))
    merge_in_place(base, base)  # LoRA on the language head, say


def merge_in_place(part: nn.Module, base: nn.Module) -> None:
    """Merge the LoRA layers in a part of the language model `base`, and put plain linear layers in their places."""
    for name, layer in list(part.named_modules()):
        if isinstance(layer, LoraLayer):
            merge_layer(layer, base)
            part.set_submodule(name, layer.get_base_layer())
