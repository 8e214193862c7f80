"""shrink and expand in C, span by span; in a prompt they are too narrow for torch's kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from deltamux_kernels.native.library import INTEGER, POINTER, function

# x or y and its row, h, the arena, the width, and the tasks and how many.
_ARGUMENTS = (POINTER, INTEGER, POINTER, POINTER, INTEGER, POINTER, INTEGER)


class Task(NamedTuple):
    """Rows `start` to `start + rows` of a step and the matrix [rank, width] that they meet."""

    start: int
    rows: int
    matrix: int  # its offset in the arena, in elements
    rank: int
    first: int  # of their products with A, in h
    stride: int  # from one row's products to the next one's


class Tasks:
    """All that one call has to do. float32; the columns of `x` and `y` lie side by side."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        # The C code reads it at each call; the pointer keeps it.
        table = np.array(tasks, dtype=np.int64)
        self._arguments = (table.ctypes.data_as(POINTER), len(tasks))
        self._shrink = function("shrink", *_ARGUMENTS)
        self._expand = function("expand", *_ARGUMENTS)

    def shrink(self, x: torch.Tensor, h: torch.Tensor, arena: torch.Tensor, width: int) -> None:
        """h[t, j] = sum_k x[t, k] A_s[j, k]."""
        self._shrink(
            x.data_ptr(), x.stride(0), h.data_ptr(), arena.data_ptr(), width, *self._arguments
        )

    def expand(self, y: torch.Tensor, h: torch.Tensor, arena: torch.Tensor, width: int) -> None:
        """y[t, n] += sum_j h[t, j] B_s[j, n]."""
        self._expand(
            y.data_ptr(), y.stride(0), h.data_ptr(), arena.data_ptr(), width, *self._arguments
        )
