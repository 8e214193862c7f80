"""Real failures of allocators are told from other errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deltamux.base.out_of_memory import is_out_of_memory, memory_for
from deltamux.errors import StartupError

TOO_MANY = 1 << 58


@pytest.mark.parametrize(
    "allocate",
    [
        lambda: torch.empty(TOO_MANY, dtype=torch.uint8),
        lambda: torch.ones(1).expand(TOO_MANY).contiguous(),
        lambda: np.empty(TOO_MANY, dtype=np.uint8),
        lambda: bytearray(TOO_MANY),
    ],
)
def test_what_allocators_raise_is_told_apart(allocate):
    with pytest.raises((MemoryError, RuntimeError)) as caught:
        allocate()
    assert is_out_of_memory(caught.value)
    words = r"^there is not enough memory for a cake: .+$"
    with pytest.raises(StartupError, match=words), memory_for("a cake"):
        allocate()


@pytest.mark.parametrize(
    "words",
    [
        "could not create a primitive",
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasGemmEx(...)`",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
        "cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnCreate(handle)`",
        "Triton Error [CUDA]: out of memory",
    ],
)
def test_words_of_cuda_are_known(words):
    assert is_out_of_memory(RuntimeError(words))
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))


@pytest.mark.parametrize(
    "error",
    [RuntimeError("CUDA error: an illegal memory access was encountered"), ValueError("memory")],
)
def test_other_errors_are_not(error):
    assert not is_out_of_memory(error)
    with pytest.raises(type(error)), memory_for("a cake"):
        raise error
