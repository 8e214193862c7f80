"""The C code beside this file, compiled when it is first needed.

A decode step of a small model has hundreds of operations on a few kilobytes each, and torch spends
more time on calling its own than on their numbers.
"""

from __future__ import annotations

import ctypes
import logging
import struct
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

from deltamux_kernels.native.build import load_library
from deltamux_kernels.native.recording import recorded

# All that the functions take, so that each argument is a word: see run.c.
POINTER, INTEGER = ctypes.c_void_p, ctypes.c_int64

_log = logging.getLogger(__name__)


def as_word(number: float) -> int:
    """A double as an INTEGER of the same bits."""
    return int.from_bytes(struct.pack("=d", number), sys.byteorder, signed=True)


def available() -> bool:
    """Whether this machine could compile the C code; does so at the first call."""
    return _compiled() is not None


@cache
def function(name: str, *arguments: Any, result: Any = None) -> Callable[..., Any]:
    """A function of the C code that takes arguments of these ctypes; without a result, None."""
    code = _compiled()
    assert code is not None
    found = code[name]
    found.argtypes, found.restype = arguments, result
    return recorded(found)


@cache
def _compiled() -> ctypes.CDLL | None:
    try:
        return load_library()
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        _log.warning("torch computes what C would compute faster: %s", error)
        return None
