"""Calls of the C code, kept to be made again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

Call = Callable[[], object]


@dataclass(frozen=True)
class NativeCall:
    """One of a C function, whose arguments are integers, pointers or None."""

    # As ctypes has it.
    function: Any
    arguments: tuple[Any, ...]

    def __call__(self) -> None:
        self.function(*self.arguments)


class _Kept(threading.local):
    calls: list[Call] | None = None


_kept = _Kept()


@contextmanager
def recording(calls: list[Call]) -> Iterator[None]:
    """Appends to `calls` what this thread calls of the C code, with the arguments given."""
    _kept.calls = calls
    try:
        yield
    finally:
        _kept.calls = None


def recorded(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, for `recording` to see."""

    def call(*arguments: Any) -> Any:
        if _kept.calls is not None:
            _kept.calls.append(NativeCall(function, arguments))
        return function(*arguments)

    return call
