"""shrink and expand on a CPU in C, which is compiled when it is first needed.

A decode step has some hundred of these products, of a few kilobytes each, and torch spends more
time on calling its own than on their numbers. In a prompt they are too narrow for its kernels.
"""

from __future__ import annotations

import ctypes
import logging
import os
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

_SOURCE = Path(__file__).with_name("low_rank.c")
# Vectors of one column's products would be multiplied first and added then, others do both at once:
# the last columns of a row would depend on how it was cut.
_FLAGS = ("-O3", "-march=native", "-fno-tree-slp-vectorize", "-fPIC", "-fopenmp")
_SECONDS = 60

_log = logging.getLogger(__name__)


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
        # The C code reads it at each call.
        self._table = np.array(tasks, dtype=np.int64)
        self._arguments = (self._table.ctypes.data, len(tasks))

    def shrink(self, x: torch.Tensor, h: torch.Tensor, arena: torch.Tensor, width: int) -> None:
        """h[t, j] = sum_k x[t, k] A_s[j, k]."""
        _code().shrink(
            x.data_ptr(), x.stride(0), h.data_ptr(), arena.data_ptr(), width, *self._arguments
        )

    def expand(self, y: torch.Tensor, h: torch.Tensor, arena: torch.Tensor, width: int) -> None:
        """y[t, n] += sum_j h[t, j] B_s[j, n]."""
        _code().expand(
            y.data_ptr(), y.stride(0), h.data_ptr(), arena.data_ptr(), width, *self._arguments
        )


def available() -> bool:
    """Whether this machine could compile the C code; does so at the first call."""
    return _compiled() is not None


def _code() -> ctypes.CDLL:
    code = _compiled()
    assert code is not None
    return code


@cache
def _compiled() -> ctypes.CDLL | None:
    compiler = shlex.split(os.environ.get("CC", "cc"))
    with tempfile.TemporaryDirectory() as folder:
        unlinked, library = Path(folder) / "low_rank.o", Path(folder) / "low_rank.so"
        try:
            _call([*compiler, *_FLAGS, "-c", str(_SOURCE), "-o", str(unlinked)])
            # Without -fopenmp: the threads are to be torch's own, whose OpenMP is loaded already.
            _call([*compiler, "-shared", str(unlinked), "-o", str(library)])
            code = ctypes.CDLL(str(library))
        except (OSError, subprocess.SubprocessError) as error:
            _log.warning("low-rank adapters are computed by torch, more slowly: %s", error)
            return None
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    for function in (code.shrink, code.expand):
        function.argtypes = (pointer, integer, pointer, pointer, integer, pointer, integer)
        function.restype = None
    return code


def _call(command: Sequence[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=_SECONDS)
