"""Neighbouring calls of the C code as one.

Other threads have Python to themselves while C computes, and between two calls a step waits until
they hand it back: beside a thread that parses adapters, a fifth of its time.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from itertools import groupby
from typing import Any, cast

from deltamux_kernels.native.library import INTEGER, POINTER, function
from deltamux_kernels.native.recording import Call, NativeCall

_WORDS = 16


class _Words(ctypes.Structure):
    _fields_ = (("operation", POINTER), ("words", INTEGER * _WORDS))


class _Run:
    """So many calls, made by C."""

    def __init__(self, calls: list[NativeCall]) -> None:
        # Some arguments are memory of their own.
        self._calls = calls
        self._words = (_Words * len(calls))()
        for words, call in zip(self._words, calls, strict=True):
            words.operation = ctypes.cast(call.function, POINTER)
            for place, argument in enumerate(call.arguments):
                words.words[place] = _word(argument)
        self._run = function("run", POINTER, INTEGER)

    def __call__(self) -> None:
        self._run(self._words, len(self._words))


def joined(calls: Iterable[Call]) -> list[Call]:
    """The same calls, in the same order."""
    result: list[Call] = []
    for in_c, group in groupby(calls, lambda call: isinstance(call, NativeCall)):
        neighbours = list(group)
        result += [_Run(cast(list[NativeCall], neighbours))] if in_c else neighbours
    return result


def _word(argument: Any) -> int:
    if isinstance(argument, int):
        return argument
    # A pointer, or None.
    return ctypes.cast(argument, POINTER).value or 0
