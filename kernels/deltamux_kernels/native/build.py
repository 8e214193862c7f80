"""Compiles the C code beside this file, and keeps the library for the starts to come."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

_FILES = sorted(Path(__file__).parent.glob("*.[ch]"))
# Vectors of one column's products would be multiplied first and added then, others do both at once:
# the last columns of a row would depend on how it was cut.
_FLAGS = ["-O3", "-march=native", "-fno-tree-slp-vectorize", "-fPIC", "-fopenmp"]
if platform.machine() == "x86_64":
    # GCC does so in some loops for processors on which it finds chains of the latter too slow.
    _FLAGS.append("--param=avoid-fma-max-bits=0")
_SECONDS = 60


def load_library() -> ctypes.CDLL:
    """The functions of all C files, compiled at the first start on a machine.

    Raises OSError or subprocess.SubprocessError where there is no compiler that can do it, and
    ValueError for a CC that is no command.
    """
    compiler = shlex.split(os.environ.get("CC") or "cc")
    name = f"{_key(compiler)}.so"
    with suppress(OSError):
        return _loaded(_cache() / name)
    with tempfile.TemporaryDirectory() as folder:
        made = _compile(compiler, Path(folder))
        # One of both folders may be mounted so that nothing in it can be run.
        with suppress(OSError):
            return _loaded(_keep(made, _cache() / name))
        return _loaded(made)


def _loaded(library: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(library))


def _cache() -> Path:
    """A folder of this user. Raises FileNotFoundError where there is no home to have it in."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    above = given if given.is_absolute() else Path(os.path.expanduser("~/.cache"))
    if not above.is_absolute():
        raise FileNotFoundError(errno.ENOENT, "no home", str(above))
    return above / "deltamux" / "native"


def _key(compiler: Sequence[str]) -> str:
    """Of all that a library depends on: what the compiler says of itself and of the processor, how
    it is called, the code."""
    asked = _run([*compiler, *_FLAGS, "-dM", "-E", "-x", "c", os.devnull])
    digest = hashlib.sha256(asked + shlex.join([*compiler, *_FLAGS]).encode())
    for file in _FILES:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:32]


def _compile(compiler: Sequence[str], folder: Path) -> Path:
    def compiled(source: Path) -> str:
        unlinked = str(folder / f"{source.stem}.o")
        _run([*compiler, *_FLAGS, "-c", str(source), "-o", unlinked])
        return unlinked

    with ThreadPoolExecutor() as pool:
        objects = list(pool.map(compiled, (file for file in _FILES if file.suffix == ".c")))
    library = folder / "native.so"
    # Without -fopenmp: the threads are to be torch's own, whose OpenMP is loaded already.
    _run([*compiler, "-shared", *objects, "-o", str(library)])
    return library


def _keep(library: Path, kept: Path) -> Path:
    """Complete or not at all, whoever else starts meanwhile, and after a crash."""
    kept.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent) as beside:
        copy = Path(shutil.copy(library, beside))
        with copy.open("rb") as file:
            os.fsync(file.fileno())
        return copy.rename(kept)


def _run(command: Sequence[str]) -> bytes:
    return subprocess.run(command, check=True, capture_output=True, timeout=_SECONDS).stdout
