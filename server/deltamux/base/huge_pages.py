"""Memory in pages of 2 MB, through which much of it is read faster than through pages of 4 KB."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import cache

import torch

_PAGE = 1 << 21
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25


def collapse(address: int, size: int) -> None:
    """Moves half a page of memory or more into huge pages, with what else is in its first and last.

    Only Linux since 6.1 can, at some 400 MB a second; where it cannot or finds no room, nothing
    changes.
    """
    _advise(address, size, _MADV_COLLAPSE)


def zeros(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[size]; on a CPU in huge pages, where Linux has some to give."""
    memory = torch.empty(size, dtype=dtype, device=device)
    if device.type == "cpu":
        # Said before its pages are first written, which is when they come.
        _advise(memory.data_ptr(), memory.nbytes, _MADV_HUGEPAGE)
    return memory.zero_()


def _advise(address: int, size: int, advice: int) -> None:
    if size < _PAGE // 2 or sys.platform != "linux":
        return
    # One by one, since an end that others share may be such as cannot move.
    for page in range(address // _PAGE * _PAGE, address + size, _PAGE):
        _madvise()(page, _PAGE, advice)


@cache
def _madvise() -> Callable[[int, int, int], int]:
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return madvise
