"""Adapters' matrices on their way from memory while the base's products compute.

A product of a few rows takes as long to compute as to read its matrix, but not both at once: while
the first rows meet a panel memory is busy, while the others do it is not. Calls that are known
beforehand can use that for the matrices of the adapters, which they read right after.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from itertools import takewhile
from typing import TypeGuard

from deltamux_kernels.native.by_slot import BY_SLOT
from deltamux_kernels.native.recording import Call, NativeCall


class _Matrices(ctypes.Structure):
    _names = ("arena", "offsets", "ranks", "width", "spans", "count")
    _fields_ = tuple(zip(_names, BY_SLOT, strict=True))


def fetching_ahead(calls: Sequence[Call]) -> list[Call]:
    """The same calls, but each product fetches what those between it and the next one read."""
    return [
        _fetching(call, calls[place + 1 :]) if _is(call, "multiply") else call
        for place, call in enumerate(calls)
    ]


def _fetching(product: NativeCall, following: Sequence[Call]) -> NativeCall:
    until_next = takewhile(lambda call: not _is(call, "multiply"), following)
    read = [call.arguments[-len(BY_SLOT) :] for call in until_next if _is(call, "shrink", "expand")]
    matrices = (_Matrices * len(read))(*(_Matrices(*one) for one in read))
    return NativeCall(product.function, (*product.arguments[:-2], matrices, len(read)))


def _is(call: Call, *names: str) -> TypeGuard[NativeCall]:
    return isinstance(call, NativeCall) and call.function.__name__ in names
