"""What the programs say: escapes, and memory that runs out under many names."""

from __future__ import annotations

import pytest
import torch
from tiny_run import too_much_memory

from model.errors import is_out_of_memory, one_line, out_of_memory

OUT_OF_MEMORY = {
    "CPU": too_much_memory,
    "Python": MemoryError,
    "GPU": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has a total of 79 GiB."),
    "MPS": lambda: RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
    "cuBLAS": lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
}


@pytest.mark.parametrize("kind", OUT_OF_MEMORY)
def test_out_of_memory_is_known_by_all_its_names(kind):
    error = OUT_OF_MEMORY[kind]()
    assert is_out_of_memory(error)
    said = out_of_memory(error, "use less")
    assert said.endswith(": use less")
    assert "79 GiB" not in said  # the allocator's own advice and tables


def test_an_answer_takes_one_column_of_one_line():
    assert one_line("a\\n b\nc\r\nd\te") == "a\\\\n b\\nc\\r\\nd\\te"
