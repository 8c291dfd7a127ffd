"""The projector: maps patch features from the vision tower's space into the language model's."""

from __future__ import annotations

from torch import nn

INIT_STD = 0.01


def build_projector(vision_dim: int, language_dim: int, num_layers: int = 2) -> nn.Sequential:
    """Build a freshly initialised projector, in fp32; it maps (N, P, vision_dim) to (N, P, language_dim).

    Two layers with a GELU in between are those of LLaVA-1.5 (https://arxiv.org/abs/2310.03744); one layer is the first
    Linear alone. Weights are drawn from N(0, 0.01²), biases are 0. The state dict's names are `0.weight 0.bias` and,
    with two layers, `2.weight 2.bias`.

    Args:
        vision_dim: channels of a patch feature.
        language_dim: channels of the language model's embedding.
        num_layers: linear layers, 1 or 2.

    Raises:
        ValueError: if `num_layers` is neither.
    """
    if num_layers not in (1, 2):
        raise ValueError(f"the projector has 1 or 2 layers, not {num_layers}")
    layers: list[nn.Module] = [nn.Linear(vision_dim, language_dim)]
    if num_layers == 2:
        layers += [nn.GELU(), nn.Linear(language_dim, language_dim)]
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=INIT_STD)
            nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)
