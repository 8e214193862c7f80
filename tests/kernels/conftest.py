"""Triton's interpreter, packed matrices with poisoned surroundings, and the forms of an op."""

import math
import os
from collections.abc import Callable, Sequence

import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU:
    # Read when a kernel is defined: it acts here only if no other test imported the kernels first.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from deltamux_kernels import ALIGNMENT, PackedMatrices  # noqa: E402
from deltamux_kernels.shrink import _shrink_kernel  # noqa: E402

TRITON_RUNS = GPU or type(_shrink_kernel).__name__ == "InterpretedFunction"

Pack = Callable[[Sequence[torch.Tensor | None], int], PackedMatrices]


@pytest.fixture
def triton_runs() -> bool:
    """Whether this process can run the Triton forms, on a GPU or in the interpreter."""
    return TRITON_RUNS


@pytest.fixture(params=["torch", "triton"])
def form(request: pytest.FixtureRequest) -> str:
    """Which implementation of the op a test runs."""
    if request.param == "triton" and not TRITON_RUNS:
        pytest.skip("run in a process of its own by test_interpreter.py")
    return request.param


@pytest.fixture
def device(form: str) -> torch.device:
    return torch.device("cuda" if GPU and form == "triton" else "cpu")


@pytest.fixture(params=["float32", "float16", "bfloat16"])
def dtype(request: pytest.FixtureRequest, form: str) -> torch.dtype:
    if request.param == "bfloat16" and form == "triton" and not GPU:
        pytest.skip("the interpreter's bfloat16 arithmetic is wrong")
    return getattr(torch, request.param)


@pytest.fixture
def pack(device: torch.device, dtype: torch.dtype) -> Pack:
    """Packs matrices, in an arena that is NaN wherever no matrix lies."""

    def packed(matrices: Sequence[torch.Tensor | None], width: int) -> PackedMatrices:
        step = math.lcm(ALIGNMENT, width)
        extents = [0 if m is None else -(-m.numel() // step) * step + step for m in matrices]
        arena = torch.full((sum(extents) + step,), torch.nan, dtype=dtype, device=device)
        result, end = PackedMatrices(arena, len(matrices), width), step
        for slot, (matrix, extent) in enumerate(zip(matrices, extents, strict=True)):
            if matrix is not None:
                result.write(slot, end, matrix)
            end += extent
        return result

    return packed
