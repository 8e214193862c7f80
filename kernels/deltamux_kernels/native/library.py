"""The C code beside this file, compiled when it is first needed.

A decode step of a small model has hundreds of operations on a few kilobytes each, and torch spends
more time on calling its own than on their numbers.
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from deltamux_kernels.native.recording import recorded

_SOURCES = sorted(Path(__file__).parent.glob("*.c"))
# Vectors of one column's products would be multiplied first and added then, others do both at once:
# the last columns of a row would depend on how it was cut.
_FLAGS = ["-O3", "-march=native", "-fno-tree-slp-vectorize", "-fPIC", "-fopenmp"]
if platform.machine() == "x86_64":
    # GCC does so in some loops for processors on which it finds chains of the latter too slow.
    _FLAGS.append("--param=avoid-fma-max-bits=0")
_SECONDS = 60

POINTER, INTEGER, NUMBER = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double

_log = logging.getLogger(__name__)


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
    compiler = shlex.split(os.environ.get("CC", "cc"))
    with tempfile.TemporaryDirectory() as folder:
        objects = [Path(folder) / f"{source.stem}.o" for source in _SOURCES]
        library = Path(folder) / "native.so"
        try:
            for source, unlinked in zip(_SOURCES, objects, strict=True):
                _call([*compiler, *_FLAGS, "-c", str(source), "-o", str(unlinked)])
            # Without -fopenmp: the threads are to be torch's own, whose OpenMP is loaded already.
            _call([*compiler, "-shared", *map(str, objects), "-o", str(library)])
            return ctypes.CDLL(str(library))
        except (OSError, subprocess.SubprocessError) as error:
            _log.warning("torch computes what C would compute faster: %s", error)
            return None


def _call(command: Sequence[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=_SECONDS)
