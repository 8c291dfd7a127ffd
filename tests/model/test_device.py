"""Where a model runs and in which dtype, on machines that the tests do not have too."""

from __future__ import annotations

import pytest
import torch

from model.device import parse_dtype, pick_device, pick_dtype


@pytest.fixture
def machine(monkeypatch):
    """Make this machine look as if it had so many accelerators of a type."""

    def has(number: int, kind: str = "cuda") -> None:
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: number > 0)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind) if number else None)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: number)

    return has


@pytest.mark.parametrize(
    ("number", "kind", "asked", "picked"),
    [
        (0, "cuda", None, "cpu"),
        (2, "cuda", None, "cuda"),
        (1, "mps", None, "mps"),
        (2, "cuda", "cpu", "cpu"),
        (2, "cuda", "cuda:1", "cuda:1"),
    ],
)
def test_the_device_asked_for_else_the_accelerator_else_the_cpu(machine, number, kind, asked, picked):
    machine(number, kind)
    assert pick_device(asked) == torch.device(picked)


@pytest.mark.parametrize(
    ("number", "kind", "asked"),
    [(0, "cuda", "cuda"), (2, "cuda", "cuda:2"), (1, "mps", "cuda"), (1, "cuda", "meta"), (1, "cuda", "abacus")],
)
def test_a_device_that_is_not_there_is_refused_by_its_name(machine, number, kind, asked):
    machine(number, kind)
    with pytest.raises(ValueError, match=f"--device '?{asked}"):
        pick_device(asked)


@pytest.mark.parametrize(
    ("device", "has_bf16", "dtype"),
    [
        ("cuda", True, torch.bfloat16),
        ("cuda:1", False, torch.float16),
        ("cpu", True, torch.float32),
        ("mps", True, torch.float32),
    ],
)
def test_the_dtype_is_bf16_where_cuda_has_it(monkeypatch, device, has_bf16, dtype):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: has_bf16)
    assert pick_dtype(torch.device(device)) == dtype


def test_dtypes_have_two_names():
    assert parse_dtype("bf16") == parse_dtype("bfloat16") == torch.bfloat16
    with pytest.raises(ValueError, match=r"int8.*fp16"):
        parse_dtype("int8")
