"""The projector: its shape, its first weights, its names."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from model import build_projector


def test_two_layers_are_linear_gelu_linear():
    projector = build_projector(6, 10)
    assert [type(layer) for layer in projector] == [nn.Linear, nn.GELU, nn.Linear]
    shapes = {name: tuple(value.shape) for name, value in projector.state_dict().items()}
    assert shapes == {"0.weight": (10, 6), "0.bias": (10,), "2.weight": (10, 10), "2.bias": (10,)}
    x = torch.randn(3, 4, 6)
    by_hand = nn.functional.gelu(x @ projector[0].weight.T + projector[0].bias) @ projector[2].weight.T
    torch.testing.assert_close(projector(x), by_hand + projector[2].bias)
    assert build_projector(6, 10, num_layers=1).state_dict().keys() == {"0.weight", "0.bias"}


@pytest.mark.parametrize("num_layers", [1, 2])
def test_weights_are_drawn_from_a_narrow_normal_distribution_and_biases_are_zero(num_layers):
    torch.manual_seed(0)
    for name, parameter in build_projector(400, 500, num_layers).named_parameters():
        assert parameter.dtype == torch.float32
        assert parameter.requires_grad
        if name.endswith("bias"):
            assert not parameter.any(), name
        else:
            assert parameter.std().item() == pytest.approx(0.01, rel=0.02), name
            assert parameter.mean().item() == pytest.approx(0.0, abs=1e-4), name
            # A normal distribution has 0.27% beyond three standard deviations, a uniform one nothing.
            assert 0.001 < (parameter.abs() > 0.03).float().mean() < 0.005, name
